"""What a configuration would build and hold in memory: as for a text model."""

from __future__ import annotations

from mmrl.resolve import resolve
from mmrl.text import estimate
from vlm.config import Config

LOADER = "AutoModelForImageTextToText"


def describe(config: Config) -> list[str]:
    """Lines for ``mmrl check``."""
    return estimate.describe(config, LOADER, _targets(config))


def estimate_memory(config: Config) -> dict[str, float]:
    """See ``mmrl.text.estimate``; images in a prompt are not counted."""
    return estimate.estimate_memory(config, LOADER, _targets(config))


def _targets(config: Config) -> str:
    return resolve("vision_models", config.model.family).LORA_TARGETS
