"""Read llama.cpp's GGUF files as models of transformers: config, tensors, tokenizer."""
