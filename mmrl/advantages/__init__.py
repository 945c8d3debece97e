"""Advantage estimators: one file each, with ``Config`` and ``estimate``."""
