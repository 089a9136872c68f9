"""Measurements of models: perplexity and latency."""
