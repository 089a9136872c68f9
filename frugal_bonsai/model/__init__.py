"""What a unit is, and one table per architecture."""
