"""Offline text sources for calibration and for the example model."""
