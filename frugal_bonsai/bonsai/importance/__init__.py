"""Importance scores: how much each unit matters, by a cheap statistic of its activations."""
