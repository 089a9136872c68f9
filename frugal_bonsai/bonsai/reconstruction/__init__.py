"""Reconstruction: refit the remaining weights to the dense model's activations."""
