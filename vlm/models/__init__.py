"""One file for each family of vision-language models."""
