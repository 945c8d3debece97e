"""Vision-language models on transformers."""
