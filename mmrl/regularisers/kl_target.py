"""Divergence from the frozen reference, with a weight that holds it at a target.

    loss   = multiplier D,   D: as in ``kl_reference``
    multiplier <- multiplier (1 + rate clip(D / target - 1, -0.2, 0.2))    after each optimizer step

The controller of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2; rate 0.1) in the loss; there
it acts on a reward.  D is the mean over all decisions of the optimizer step, on all processes, in
the unit of the estimator: nats per decision for k1, k2 and k3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from mmrl.regularisers import kl_reference
from mmrl.regularisers._multiplier import multiplied
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Ziegler et al. 2019, arXiv:1909.08593"
EVIDENCE: str = "paper"
LIMIT = 0.2
"""Largest relative error that counts."""


class Config(kl_reference.Config):
    """Weight at the start, estimator, and the target."""

    target: float = Field(
        default=0.01, gt=0, description="Divergence to hold, in the unit of the estimator."
    )
    rate: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of the relative error by which the weight changes; 0: `kl_reference`. "
        "Published: 0.1.",
    )
    multiplier_min: float = Field(
        default=1e-3, gt=0, le=1, description="Least weight, in units of coef; ours."
    )
    multiplier_max: float = Field(
        default=1e3, ge=1, description="Greatest weight, in units of coef; ours."
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute; none when ``coef`` is 0."""
    return kl_reference.needs(config)


def initial_state(config: Config) -> dict[str, Any]:
    """``multiplier`` 1."""
    del config
    return {"multiplier": 1.0}


def update_state(
    state: Mapping[str, Any], metrics: Mapping[str, float], config: Config
) -> dict[str, Any]:
    """The state after an optimizer step with these means; unchanged where none was logged."""
    if "kl_reference" not in metrics:
        return dict(state)
    error = min(max(metrics["kl_reference"] / config.target - 1.0, -LIMIT), LIMIT)
    multiplier = state["multiplier"] * (1.0 + config.rate * error)
    return {"multiplier": min(max(multiplier, config.multiplier_min), config.multiplier_max)}


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Penalty [B, K], not multiplied by ``coef``.

    Metrics: those of ``kl_reference``, of D alone, and ``kl_target/multiplier``.
    With ``coef`` 0 it is zero and logs nothing, whatever terms are there.
    """
    multiplier = (batch.state or initial_state(config))["multiplier"]
    found = kl_reference.loss(terms, batch, config)
    return multiplied(found, multiplier, "kl_target/multiplier")
