"""Export: a checkpoint, dense or pruned, in the format of another runtime."""
