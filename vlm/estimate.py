"""What a configuration would build and hold in memory: as for a text model."""

from __future__ import annotations

from mmrl.resolve import resolve
from mmrl.text import estimate
from vlm.config import Config

LOADER = "AutoModelForImageTextToText"


def describe(config: Config) -> list[str]:
    """Lines for ``mmrl check``."""
    return estimate.describe(config, _parts(config))


def estimate_memory(config: Config) -> dict[str, float]:
    """See ``mmrl.text.estimate``; images and videos in a prompt are not counted."""
    return estimate.estimate_memory(config, _parts(config))


def _parts(config: Config) -> estimate.Parts:
    kind, trained = resolve("vision_models", config.model.family).load, config.model.train_vision
    freeze = None if trained else kind.freeze_vision
    return estimate.Parts(LOADER, kind.lora_targets(train_vision=trained), freeze)
