"""Which units a round removes."""
