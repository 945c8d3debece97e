"""Prompt sets (``dataset``) and the samplers that decide which prompts a step rolls out."""
