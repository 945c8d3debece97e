"""Steers the entropy of the policy by advantages that are weighted under another temperature.

    A'_ik = (1 - alpha) A_i + alpha b_i rho_ik,    rho_ik = p_T(k) / p(k) at most max_weight
    T     = temperature_up where H <= target_entropy, else temperature_down
    alpha = a / (1 + a),   a = min(|target_entropy - H|, max_gap) / mean(b)
    b_i   = 1[r_i > success_above]

DCPO, Distribution-Centric Policy Optimization (arXiv:2601.12730), in the form of its code.  H is
the mean of -logp over the samples trained on in the step before, 0 at first, so that the first
step pushes up with full strength; p is the policy that sampled, p_T the same at temperature T.
Averaged over what the policy samples, the second part moves it towards p_T: flatter where T > 1,
sharper where T < 1.  Division by the mean of b keeps the strength about independent of how often
samples succeed; where none does, nothing is added.

Nothing may re-centre A' afterwards, so it stands last.  Where top-k or top-p cut the distribution,
the mean of rho is not 1.  The bound of rho is a suggestion, not of the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores, Tempering

PAPER = "DCPO 2026, arXiv:2601.12730"
EVIDENCE = "code"
TEMPERS = True
"""Decisions of a sample get advantages of their own, which no other modulator may change."""


class Config(StrictModel):
    """Target, and how hard it is steered to."""

    target_entropy: float = Field(
        default=0.5,
        ge=0,
        description="Entropy in nats per decision, as -logp of what was sampled; in the released "
        "script 0.5, best of 0.25 to 1 in its README: 0.25.",
    )
    temperature_up: float = Field(
        default=1.2,
        ge=1,
        description="T while the entropy is not above the target; 1: no push on average.",
    )
    temperature_down: float = Field(
        default=0.8, gt=0, le=1, description="T while it is above; 1: no push on average."
    )
    max_gap: float = Field(
        default=0.1,
        ge=0,
        description="Gap in nats beyond which the push grows no further; 0: none.",
    )
    success_above: float = Field(
        default=0.05, description="A reward above it counts as good, in units of the reward."
    )
    max_weight: float | None = Field(
        default=10.0, ge=1, description="Largest rho, not published; null: no bound."
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp", "logp_tempered"})


def modulate(
    advantages: Advantages, scores: Scores, config: Config, state: dict[str, Any]
) -> Advantages:
    """Scaled advantages with a ``tempering``; as they were where nothing is to be added.

    ``state``: ``surprise``, H.  Metric ``dcpo/alpha``.
    """
    gap = config.target_entropy - state.get("surprise", 0.0)
    good = advantages.keep & (scores.combined > config.success_above)
    alpha = strength(gap, float(good.sum()) / max(int(advantages.keep.sum()), 1), config.max_gap)
    metrics = {**advantages.metrics, "dcpo/alpha": alpha}
    if alpha == 0:
        return replace(advantages, metrics=metrics)
    temperature = config.temperature_up if gap >= 0 else config.temperature_down
    scale = alpha * good.to(advantages.values)
    return replace(
        advantages,
        values=(1 - alpha) * advantages.values,
        tempering=Tempering(scale=scale, temperature=temperature, cap=config.max_weight),
        metrics=metrics,
    )


def strength(gap: float, good: float, max_gap: float) -> float:
    """alpha in [0, 1) of a ``gap`` in nats, where a share ``good`` of the samples is good."""
    if good == 0:
        return 0.0
    pushed = min(abs(gap), max_gap) / good
    return pushed / (1 + pushed)


def learn(metrics: Mapping[str, float], config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """The state after a step, by what is logged of it."""
    del config
    return {**state, "surprise": metrics["surprise"]} if "surprise" in metrics else state
