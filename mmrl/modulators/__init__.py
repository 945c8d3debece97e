"""Maps from advantages to advantages, applied in order: one file each, ``Config`` and ``modulate``."""
