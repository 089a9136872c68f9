"""Export a checkpoint, dense or pruned, to the format of another runtime."""
