"""Penalties added to an objective: one file each, with ``Config``, ``needs`` and ``loss``."""
