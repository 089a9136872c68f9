"""Stream layers from disk, one at a time, and run sweeps over them."""
