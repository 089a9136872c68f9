"""What fits: caps, hardware, the plan, and meters of what was really used."""
