"""The modulators of a run, one after another, and what those that remember keep of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.config import Part
from mmrl.types import Advantages, Scores

States = Mapping[str, dict[str, Any]]
"""By the place of a modulator in the list, as a text."""


def modulated(
    parts: Sequence[Part], advantages: Advantages, scores: Scores, states: States
) -> Advantages:
    """What the modulators make of ``advantages``; those with ``learn`` are given their state."""
    for place, part in enumerate(parts):
        state = (states.get(str(place), {}),) if hasattr(part.module, "learn") else ()
        advantages = part.module.modulate(advantages, scores, part.config, *state)
    return advantages


def taught(
    parts: Sequence[Part], metrics: Mapping[str, float], states: States
) -> dict[str, dict[str, Any]]:
    """The states after a step, by what is logged of it over all processes."""
    return {
        str(place): part.module.learn(metrics, part.config, states.get(str(place), {}))
        for place, part in enumerate(parts)
        if hasattr(part.module, "learn")
    }
