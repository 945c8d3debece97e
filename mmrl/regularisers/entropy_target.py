"""Bonus for an undecided policy, with a weight that rises while its entropy is below a target.

    loss   = -multiplier H,   0 where the entropy of the optimizer step before was not below target
    multiplier <- multiplier + 1 if H < target else multiplier - 1,   within 0 and max_multiplier

The adaptive entropy control of Skywork-OR1 (He et al. 2025, arXiv:2505.22312): ``coef`` is the
change of the weight, and the greatest weight is coef max_multiplier; known from its port's
configuration (change 1e-4, at most 5e-3, target 0.2 nats).  H is the mean over all decisions of an
optimizer step, on all processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from mmrl.regularisers import entropy
from mmrl.regularisers._multiplier import multiplied
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "He et al. 2025, arXiv:2505.22312"
EVIDENCE: str = "code"


class Config(entropy.Config):
    """Target, and how the weight follows it."""

    ASCENDING = (("start", "max_multiplier"),)

    coef: float = Field(
        default=1e-4,
        ge=0,
        description="What the weight of the bonus rises or falls by after each optimizer step; 0 "
        "computes nothing at all. Published: 1e-4.",
    )
    target: float = Field(
        default=0.2, ge=0, description="Entropy to hold, in nats per decision. Published: 0.2."
    )
    max_multiplier: float = Field(
        default=50.0, ge=0, description="Greatest weight, in units of coef. Published: 50."
    )
    start: float = Field(default=0.0, ge=0, description="Weight at the start, in units of coef.")


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute; none when ``coef`` is 0."""
    return entropy.needs(config)


def initial_state(config: Config) -> dict[str, Any]:
    """``multiplier`` at the start, and whether it is applied."""
    return {"multiplier": config.start, "applied": True}


def update_state(
    state: Mapping[str, Any], metrics: Mapping[str, float], config: Config
) -> dict[str, Any]:
    """The state after an optimizer step with these means; unchanged where none was logged."""
    if "entropy" not in metrics:
        return dict(state)
    below = metrics["entropy"] < config.target
    multiplier = state["multiplier"] + (1.0 if below else -1.0)
    return {"multiplier": min(max(multiplier, 0.0), config.max_multiplier), "applied": below}


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Minus the weighted entropy [B, K], not multiplied by ``coef``.

    Metrics: ``entropy``, in nats per decision, and ``entropy_target/multiplier``, as applied.
    With ``coef`` 0 the loss is zero and nothing is logged, whatever terms are there.
    """
    state = batch.state or initial_state(config)
    multiplier = state["multiplier"] if state["applied"] else 0.0
    found = entropy.loss(terms, batch, config)
    return multiplied(found, multiplier, "entropy_target/multiplier")
