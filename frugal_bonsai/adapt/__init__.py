"""Adaptation after pruning: a teacher's cache, a student of frozen weights and adapters."""
