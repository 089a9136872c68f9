"""The description of a model: its units and its architecture."""
