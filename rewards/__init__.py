"""Rewards: one file each, with ``Config`` and ``build``; ``combine`` runs and adds them up."""
