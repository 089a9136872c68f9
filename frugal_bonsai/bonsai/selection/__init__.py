"""Selection of the units that a round removes."""
