"""Clipped policy gradient with an importance ratio for each decision or each sample.

    loss = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)),   r = exp(logp - logp_old)

PPO's surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7) with the group-relative advantages
of GRPO, the separate bounds of DAPO (arXiv:2503.14476) and, with ``importance: sample``,
the sequence ratio of GSPO (arXiv:2507.18071).  With a flow-matching likelihood it is AWM
(arXiv:2509.25050).

Where A < 0 nothing bounds the loss as r grows.  Two published systems do, and agree where the bound
is above 1 + clip_high: dual-clip PPO (Ye et al. 2020, arXiv:1912.09729) takes at most -A dual_clip,
and INTELLECT-2 (arXiv:2505.07291), in TRL's form, at most ``delta`` for the r outside the clamp.
"""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from mmrl.objectives._ratio import (
    Importance,
    approx_kl,
    clipped_surrogate,
    log_ratio,
    ratio_metrics,
)
from mmrl.reduction import tallies
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Shao et al. 2024, arXiv:2402.03300"
EVIDENCE = "code"
TAKES_STALE = True


class Config(StrictModel):
    """Clip range and level of the ratio."""

    clip_low: float = Field(
        default=0.2, ge=0, description="The ratio is clipped below at 1 - clip_low; 1 disables it."
    )
    clip_high: float = Field(
        default=0.2, ge=0, description="The ratio is clipped above at 1 + clip_high."
    )
    importance: Importance = Field(
        default="decision",
        description="decision: a ratio for each decision. sample: one ratio for each sample, "
        "exp of the mean log-ratio over its decisions.",
    )
    dual_clip: float | None = Field(
        default=None,
        gt=1,
        description="Largest loss of a negative advantage A, in units of -A (published: 3); null: "
        "no such bound.",
    )
    delta: float | None = Field(
        default=None,
        description="Largest ratio of a negative advantage, above 1 + clip_high (INTELLECT-2: 4); "
        "null: no such bound.",
    )

    @field_validator("delta")
    @classmethod
    def _outside_the_clip_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        top = 1.0 + info.data.get("clip_high", 0.0)
        if value is not None and not value > top:
            raise ValueError(f"should be greater than 1 + clip_high, {top:g}")
        return value


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Clipped surrogate, [B, K] for ``importance: decision`` and [B, 1] for ``sample``.

    Metrics: ``ratio/mean``; ``clip_ratio/low`` and ``clip_ratio/high``, the shares of ratios whose
    clip is active given the sign of the advantage, and ``clip_ratio/region``, their sum;
    ``approx_kl``, k3 of KL(old || new) in nats per decision; with a ``dual_clip`` or ``delta``
    ``clip_ratio/capped``, the share of ratios above it whose advantage is negative.
    """
    ratio = log_ratio(terms, batch, config.importance).exp()
    advantages = batch.advantages[:, None].to(ratio.dtype)
    low, high, dual, delta = config.clip_low, config.clip_high, config.dual_clip, config.delta
    surrogate = clipped_surrogate(ratio, advantages, low, high, dual_clip=dual, delta=delta)
    metrics = ratio_metrics(ratio, advantages, low, high)
    metrics["approx_kl"] = approx_kl(terms, batch)
    caps = [cap for cap in (dual, delta) if cap is not None]
    if caps:
        metrics["clip_ratio/capped"] = (ratio.detach() > min(caps)) & (advantages < 0)
    return LossTerms(loss=surrogate, metrics=tallies(metrics, batch.mask, batch.weights))
