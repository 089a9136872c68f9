"""Layers from disk, one at a time, and the sweep over them."""
