"""What is left of a layer, refitted to the dense model without gradients."""
