"""What a machine can do, and how long work takes on it."""
