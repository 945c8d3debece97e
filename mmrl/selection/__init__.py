"""Which samples and decisions of a step are trained: one file each, ``Config`` and ``select``."""
