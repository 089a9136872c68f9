"""Measuring models: perplexity, streamed under the same caps."""
