"""A modulator after which advantages have mean 0."""

from dataclasses import replace

from mmrl.schema import StrictModel

PAPER = ""
RECENTRES = True


class Config(StrictModel):
    """Nothing to configure."""


def modulate(advantages, scores, config):
    mean = advantages.values[advantages.keep].mean()
    return replace(advantages, values=(advantages.values - mean) * advantages.keep)
