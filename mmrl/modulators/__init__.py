"""Maps from advantages to advantages: one file each, with ``Config`` and ``modulate``."""
