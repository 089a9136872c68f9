"""Find a model, read and write safetensors files, and commit output atomically."""
