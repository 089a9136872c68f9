"""Safetensors in and out: headers, pread-based reading, atomic writing, finding a model."""
