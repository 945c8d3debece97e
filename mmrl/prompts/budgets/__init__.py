"""How many samples each prompt of a step gets: one file each, with ``Config`` and ``allocate``."""
