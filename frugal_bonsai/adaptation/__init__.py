"""Adaptation after pruning: a teacher's cached predictions, a student, its training, the merge."""
