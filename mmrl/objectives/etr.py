"""Clipped policy gradient whose clip range follows from the outcome: wider where it tells more.

    loss   = max(-A r, -A clamp(r, 1 - low e, 1 + high e)),   r = exp(logp - logp_old)
    e      = (1 + micro tanh |A|) (1 + macro v),   v = min(1, Var(R in the group) / (range / 2)^2)

ETR (arXiv:2601.03723) scales the clip range of a sample with the size of its advantage, and that of
a group with the variance of its rewards; for rewards of 0 and 1 and a success rate p, v is
4 p (1 - p).  The published formula was not reachable: this one has the properties that the abstract
names, and micro, macro and the bounds are ours.  With advantages over the group's deviation a rare
outcome has the largest |A| and the smallest v, so the two factors counteract: try them apart.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, model_validator
from torch import Tensor

from mmrl.objectives._groups import by_group
from mmrl.objectives._ratio import approx_kl, clipped_surrogate, log_ratio, ratio_metrics
from mmrl.reduction import tallies
from mmrl.schema import StrictModel
from mmrl.types import Advantages, LossTerms, PolicyTerms, Scores, UpdateBatch

PAPER = "ETR 2026, arXiv:2601.03723"
EVIDENCE: str = "reconstructed"
TAKES_STALE = True


class Config(StrictModel):
    """Clip range before scaling, the two scales, and the bounds of the result; all ours."""

    clip_low: float = Field(default=0.2, ge=0, description="1 less the lower bound, unscaled.")
    clip_high: float = Field(default=0.28, ge=0, description="Upper bound less 1, unscaled.")
    micro: float = Field(default=0.25, ge=0, description="Widening where |A| is large; 0: none.")
    macro: float = Field(default=0.25, ge=0, description="Widening where v is 1; 0: none.")
    clip_min: float = Field(default=0.1, ge=0, description="Least of both after scaling.")
    clip_max: float = Field(default=0.4, gt=0, le=1, description="Greatest of both after scaling.")
    reward_range: float = Field(default=1.0, gt=0, description="Greatest reward less the least.")

    @model_validator(mode="after")
    def _within_the_bounds(self) -> Config:
        for name in ("clip_low", "clip_high"):
            value: float = getattr(self, name)
            if not self.clip_min <= value <= self.clip_max:
                raise ValueError(
                    f"{name}: {value:g} is not allowed; allowed: clip_min to clip_max, "
                    f"{self.clip_min:g} to {self.clip_max:g}"
                )
        return self


def signals(scores: Scores, advantages: Advantages, config: Config) -> Mapping[str, Tensor]:
    """``spread`` [N]: v of each sample's group, in [0, 1]; 0 at invalid samples."""
    del advantages
    most = (config.reward_range / 2) ** 2

    def spread(rewards: Tensor) -> Tensor:
        return (rewards.var(unbiased=False) / most).clamp(max=1.0)

    return {"spread": by_group(scores.combined, scores.group, scores.valid, spread)}


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Clipped surrogate [B, K].

    Metrics: those of ``grpo`` with each sample's own bounds; ``etr/scale``, the mean of e before
    clip_min and clip_max.
    """
    ratio = log_ratio(terms, batch, "decision").exp()
    advantages = batch.advantages[:, None]
    scale = 1.0 + config.micro * advantages.abs().tanh()
    scale = scale * (1.0 + config.macro * batch.signal("spread"))
    low, high = (
        (clip * scale).clamp(config.clip_min, config.clip_max)
        for clip in (config.clip_low, config.clip_high)
    )
    advantages = advantages.to(ratio.dtype)
    metrics = ratio_metrics(ratio, advantages, low, high)
    metrics |= {"etr/scale": scale, "approx_kl": approx_kl(terms, batch)}
    value = clipped_surrogate(ratio, advantages, low, high)
    return LossTerms(loss=value, metrics=tallies(metrics, batch.mask, batch.weights))
