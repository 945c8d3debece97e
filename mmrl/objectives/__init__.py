"""Policy-gradient objectives: one file each, with ``Config``, ``needs`` and ``loss``."""
