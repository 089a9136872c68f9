"""Write the pruned model: a checkpoint and a keep mask in, a smaller checkpoint out."""
