"""The vision-language backend, on transformers; its models come with a later release."""
