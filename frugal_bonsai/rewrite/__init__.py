"""Physical shrink: a checkpoint and a keep mask in, a smaller model that loads elsewhere out."""
