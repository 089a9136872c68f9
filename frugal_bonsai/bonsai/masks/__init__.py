"""Masked sub-models: drawn, evaluated, and what their utilities say about the units."""
