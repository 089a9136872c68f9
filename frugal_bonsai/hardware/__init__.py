"""Profiles of machines, their measurement, and predicted time."""
