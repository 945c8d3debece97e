"""One file for each model family: how to encode, denoise and decode with its diffusers pipeline."""
