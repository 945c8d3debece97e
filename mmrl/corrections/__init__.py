"""Weights on an objective's loss: one file each, with ``Config``, ``needs`` and ``correct``."""
