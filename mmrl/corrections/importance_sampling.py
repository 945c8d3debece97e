"""Importance weight of what the sampler drew, against the policy that is scored.

    w = exp(logp_old - logp_sampled)              loss * min(w, cap)              mode truncate
                                                  loss * w, but 0 where w > cap   mode mask

``logp_old`` are the log-probabilities that the ratio of the objective starts from, those of the
same weights asked again; ``logp_sampled`` those of the distribution that each decision really came
from.  They differ where top-k, top-p or forbidden tokens cut that distribution off, and by the
rounding of another kernel or dtype.  Truncated importance sampling (Ionides 2008), brought to this
gap by Yao et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL training");
``vllm_importance_sampling_*`` in TRL, whose defaults are ``level: sample, mode: mask, cap: 3``, and
were ``decision``, ``truncate`` and 2.

The weight has no gradient.  Every mean keeps its denominator: what is masked counts as 0.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmrl.divergences import clamp_log_ratio, logp_before
from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Ionides 2008, doi:10.1198/106186008X320456"
EVIDENCE = "paper"


class Config(StrictModel):
    """Whose weight it is, and what becomes of a large one."""

    level: Literal["decision", "sample"] = Field(
        default="decision",
        description="decision: a weight for each decision. sample: one for each sample, the "
        "product over its decisions.",
    )
    mode: Literal["truncate", "mask"] = Field(
        default="truncate",
        description="truncate: a weight above cap is cap. mask: it is 0.",
    )
    cap: float = Field(default=2.0, gt=0, description="Largest weight that stays as it is.")


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp", "logp_sampled"})


def correct(policy: LossTerms, terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """The objective's loss ``policy`` times its weights; [B, K], or [B, 1] if both are.

    Metrics beside its own, under TRL's names: ``sampling/importance_sampling_ratio/`` ``mean``,
    ``min`` and ``max``, of the weights as they are applied;
    ``sampling/sampling_logp_difference/`` ``mean`` and ``max``, of |logp_old - logp_sampled| in
    nats per decision.
    """
    gap = logp_before(terms, batch) - terms.need("logp_sampled").detach()
    gap = where_active(gap, batch.mask)
    log_weight = gap.sum(dim=1, keepdim=True) if config.level == "sample" else gap
    weight = clamp_log_ratio(log_weight).exp()
    above = weight > config.cap
    weight = weight.masked_fill(above, config.cap if config.mode == "truncate" else 0.0)
    ratio, difference = "sampling/importance_sampling_ratio", "sampling/sampling_logp_difference"
    metrics = {f"{ratio}/{kind}": weight for kind in ("mean", "min", "max")}
    metrics |= {f"{difference}/{kind}": gap.abs() for kind in ("mean", "max")}
    return LossTerms(
        loss=policy.loss * weight.to(policy.loss.dtype),
        metrics={**policy.metrics, **tallies(metrics, batch.mask, batch.weights)},
    )
