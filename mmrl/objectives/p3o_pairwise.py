"""Clipped policy gradient on pairs of samples of one prompt, by the difference of their rewards.

    D = A_1 - A_2,   r = exp(l),   l: log-ratio of the sample, new to old policy

    separate:  loss = -1/2 [min(D r_1, D clip(r_1)) + min(-D r_2, -D clip(r_2))]
    joint:     loss = -1/2  min(D r, D clip(r)),   r = exp(l_1 - l_2)

P3O (pairwise; arXiv:2310.00212).  A constant added to the rewards of a prompt changes nothing.  For
groups, ours: the mean over all pairs, in both orders for ``joint``, which is not symmetric in them
away from ratio 1; there a step of several micro-batches takes one more forward.  In ``separate``
that needs no table of pairs: sample i has -(P r - M r') / (n - 1), P and M the sums of positive
and negative parts of A_i - A_j, r clipped above and r' below.  At ratio 1 the gradient is that of
leave-one-out REINFORCE.

A are the run's advantages; ``group`` with ``deviation: none`` keeps differences of rewards as they
are, which dividing by a deviation does not.  The divergence that the paper takes off the reward is
``kl_in_reward``.  ``joint`` sees only l_1 - l_2: both log-probabilities may fall together, so watch
them.  The clipped forms are reconstructed from their description, and the clip range is ours.  Use
an aggregation that is a mean over samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.divergences import clamp_log_ratio, raw_log_ratio
from mmrl.objectives._groups import coupled_by_group, pair_excess
from mmrl.objectives._ratio import approx_kl, clipped_surrogate
from mmrl.reduction import coupled_loss, masked_mean, tallies
from mmrl.schema import StrictModel
from mmrl.types import Advantages, LossTerms, PolicyTerms, Scores, Survey, UpdateBatch

PAPER = "Wu et al. 2023, arXiv:2310.00212"
EVIDENCE: str = "reconstructed"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2
WHOLE_GROUPS = True


class Config(StrictModel):
    """Which ratio is clipped, and what the ratio of a sample is."""

    form: Literal["separate", "joint"] = Field(
        default="separate", description="separate: ratio of each sample. joint: of a pair."
    )
    clip: float = Field(default=0.2, ge=0, description="Ratios are clipped to 1 -+ clip; ours.")
    ratio: Literal["mean", "product"] = Field(
        default="mean",
        description="exp of the mean log-ratio (ours), or of the sum (published; smaller clip).",
    )


def signals(scores: Scores, advantages: Advantages, config: Config) -> Mapping[str, Tensor]:
    """``gain`` and ``loss`` [N], P and M over n - 1, of kept samples; ``advantage`` if joint."""
    if config.form == "joint":
        return {"advantage": advantages.values}
    values, keep = advantages.values, advantages.keep
    found = {"gain": pair_excess(values, scores.group, keep)}
    return found | {"loss": pair_excess(-values, scores.group, keep)}


def survey(config: Config) -> frozenset[str]:
    """Whose log-ratios ``couple`` reads."""
    return frozenset({"old"} if config.form == "joint" else ())


def needs_whole_samples(config: Config) -> bool:
    """Whether a micro-batch must hold all decisions of its samples."""
    return config.form == "separate"


def couple(survey: Survey, config: Config) -> Mapping[str, Tensor]:
    """``value`` and ``slope`` [W] of the joint form."""
    advantage, length = survey.signals["advantage"], survey.length
    scale = torch.ones_like(length) if config.ratio == "product" else length

    def pairs(log_ratio: Tensor, rows: Tensor) -> Tensor:
        ratio = clamp_log_ratio(log_ratio[:, None] - log_ratio[None]).exp()
        gap = advantage[rows][:, None] - advantage[rows][None]
        count = max(len(log_ratio) * (len(log_ratio) - 1), 1)
        return 0.5 * clipped_surrogate(ratio, gap, config.clip, config.clip).sum() / count

    return coupled_by_group(survey, scale, pairs)


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Pairwise loss, each sample's share of its group: [B, 1], or [B, K] for ``joint``.

    Metrics: ``ratio/mean``, of samples and without for ``joint``; ``approx_kl``, k3 of KL(old ||
    new) in nats per decision.
    """
    gaps, metrics = raw_log_ratio(terms, batch), {"approx_kl": approx_kl(terms, batch)}
    if config.form == "joint":
        found = coupled_loss(batch, gaps)
    else:
        gain, cost = (batch.signal(name).to(gaps.dtype) for name in ("gain", "loss"))
        product = config.ratio == "product"
        total = gaps.sum(dim=1, keepdim=True) if product else masked_mean(gaps, batch.mask)
        metrics["ratio/mean"] = ratio = clamp_log_ratio(total).exp()
        low, high = ratio.clamp(min=1.0 - config.clip), ratio.clamp(max=1.0 + config.clip)
        found = cost * low - gain * high
    return LossTerms(loss=found, metrics=tallies(metrics, batch.mask, batch.weights))
