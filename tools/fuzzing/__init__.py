"""Parts of tools/fuzz.py: valid samples, mutations of them, and what must not happen."""
