"""Rewards as labels: each sample's mean log-ratio is a logit, and its verdict the class.

    s = mean of logp - logp_old over the sample's decisions;   P, Q: right and wrong of the group
    softmax:  loss of a group = log(1 + sum_P exp(-s / tau)) + log(1 + sum_Q exp(s / tau))
    bce:      loss of a group = mean softplus(-y s / tau),   y = 1 in P, -1 in Q

REAL (arXiv:2602.05630; softmax form of the ms-swift port, bce reconstructed).  The 1 is an anchor,
a logit fixed at 0.  In the softmax form the weight of a right sample falls with its own s, that of
a wrong one rises, and each class of a group weighs less than 1 / tau together, whatever its size.
There is neither clip nor advantage.  At s = 0 the gradient is that of -w logp with w = n / tau /
(1 + |P|) for a right sample, minus n / tau / (1 + |Q|) for a wrong one, n samples in the group.

The port takes for right what is above the mean of its group, and the rest for wrong; here a sample
just at the mean is neither.  Groups of one class add nothing but count in the denominator (the
port); ``keep`` trains on them, which takes a ``threshold``: equal rewards all have advantage 0.
The loss couples the samples of a group, which share an optimizer step: where the ratio is not 1 and
the step has several micro-batches, it takes one more forward, and none has to hold a group.  Use an
aggregation that is a mean over samples; published: tau 0.5, one update for each rollout, 8 samples,
kl_reference 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad, softplus

from mmrl.divergences import raw_log_ratio
from mmrl.objectives._groups import coupled_by_group
from mmrl.objectives._ratio import approx_kl
from mmrl.reduction import coupled_loss, tallies
from mmrl.schema import StrictModel
from mmrl.types import Advantages, LossTerms, PolicyTerms, Scores, Survey, UpdateBatch

PAPER = "REAL 2026, arXiv:2602.05630"
EVIDENCE: str = "code"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2
WHOLE_GROUPS = True


class Config(StrictModel):
    """Sharpness of the classes, and what makes a sample right."""

    temperature: float = Field(default=0.5, gt=0, description="tau, in nats per decision.")
    form: Literal["softmax", "bce"] = Field(
        default="softmax", description="softmax: a class shares one weight. bce: each by itself."
    )
    threshold: float | None = Field(
        default=None, description="Greatest reward of a wrong sample; null: by the sign of A."
    )
    single_class: Literal["skip", "keep"] = Field(
        default="skip", description="keep: train on groups of one class too; needs a threshold."
    )


def signals(scores: Scores, advantages: Advantages, config: Config) -> Mapping[str, Tensor]:
    """``label`` [N]: 1 of a right sample, -1 of a wrong one, 0 of others and where not kept."""
    label = advantages.values.sign()
    if config.threshold is not None:
        label = torch.where(scores.combined > config.threshold, 1.0, -1.0).double()
    return {"label": label.masked_fill(~(advantages.keep & scores.valid), 0.0)}


def survey(config: Config) -> frozenset[str]:
    """Whose log-ratios ``couple`` reads."""
    del config
    return frozenset({"old"})


def couple(survey: Survey, config: Config) -> Mapping[str, Tensor]:
    """``value`` and ``slope`` [W]: the loss of each sample's group, and its part in it.

    ``logit`` [W]: y s, which a micro-batch with a part of the sample could not tell.
    """
    label = survey.signals["label"]

    def classes(logit: Tensor, rows: Tensor) -> Tensor:
        scaled, y = logit / config.temperature, label[rows]
        right, wrong = -scaled[y > 0], scaled[y < 0]
        if config.single_class == "skip" and not (len(right) and len(wrong)):
            return scaled.new_zeros(())
        if config.form == "bce":
            return softplus(torch.cat([right, wrong])).sum() / len(logit)
        return pad(right, (1, 0)).logsumexp(0) + pad(wrong, (1, 0)).logsumexp(0)

    logit = label * survey.log_ratio["old"] / survey.length
    return {"logit": logit, **coupled_by_group(survey, survey.length, classes)}


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Loss [B, K]: that of the sample's group, with the gradient of the sample's part in it.

    Metrics: ``real/right``, the share of right samples; ``real/logit``, the mean of y s;
    ``real/weight``, that of the size of its slope; ``approx_kl``, k3 of KL(old || new) in nats per
    decision.
    """
    del config
    label, logit, slope = (batch.signal(name) for name in ("label", "logit", "slope"))
    metrics = {"real/right": label > 0, "real/logit": logit, "real/weight": slope.abs()}
    metrics["approx_kl"] = approx_kl(terms, batch)
    pairs = tallies(metrics, batch.mask, batch.weights)
    return LossTerms(loss=coupled_loss(batch, raw_log_ratio(terms, batch)), metrics=pairs)
