"""Trains on samples whose advantages vary most, and there on decisions that are open and matter.

    samples     S = argmax over |S| = n of Var(A_i, i in S)
    decisions   the largest |A_i| H_ik of S, a share of them all, H: entropy of the sampling policy

D3S, Dynamic Dual-Level Down-Sampling (arXiv:2509.22115).  The variance is largest for the k lowest
and n - k highest advantages, for some k.  Advantages stay as they were, and both shares grow
linearly with the progress of training, n / N = (1 - p) start + p end: the source reports that
without the schedule leaving out tokens harms.

Known from notes on the paper; its code was not to be had, its end points are not known, and no
study of them was reported: the defaults are a suggestion.  What is left out is trained by no
penalty either.  An objective sees all decisions of the samples in S, so that the ratio of a sample
is that of all its decisions; those left out only lose their place in the sum and its denominator.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.schema import StrictModel
from mmrl.selection._kept import narrowed
from mmrl.selection._widest import widest
from mmrl.typed import distinct
from mmrl.types import Advantages, Moment, PolicyTerms, Scores

PAPER = "D3S 2025, arXiv:2509.22115"
EVIDENCE = "paper"
MIN_GROUP_SIZE = 2
LEAST = 2
"""Samples without which there is no variance."""


class Config(StrictModel):
    """Shares of samples and decisions at both ends of training; 1 leaves nothing out."""

    scope: Literal["step", "group"] = Field(
        default="step",
        description="Where the variance is: step: among all samples of a step (the main form). "
        "group: within each group, the same share of each.",
    )
    samples_start: float = Field(
        default=0.25, gt=0, le=1, description="Share of samples at the start; not published."
    )
    samples_end: float = Field(
        default=1.0, gt=0, le=1, description="Share of samples at the end; not published."
    )
    decisions_start: float = Field(
        default=0.2, gt=0, le=1, description="Share of decisions at the start; not published."
    )
    decisions_end: float = Field(
        default=1.0, gt=0, le=1, description="Share of decisions at the end; not published."
    )


def needs(config: Config) -> frozenset[str]:
    """Terms of the policy that sampled; none where all decisions are kept."""
    filters = min(config.decisions_start, config.decisions_end) < 1
    return frozenset({"logp", "entropy"} if filters else ())


def select(advantages: Advantages, scores: Scores, moment: Moment, config: Config) -> Advantages:
    """Unchanged advantages, fewer of them kept; none where all are 0.  Metrics of ``narrowed``."""
    share = _between(config.samples_start, config.samples_end, moment)
    keep, values = advantages.keep, advantages.values
    if share < 1 or decision_share(moment, config) < 1:
        keep = keep & bool(values[keep].any())
    if share < 1:
        part = scores.group if config.scope == "group" else torch.zeros_like(scores.group)
        parts = [keep & (part == each) for each in distinct(part)]
        keep = torch.stack([_widest_of(one, values, share) for one in parts]).any(0)
    return narrowed(advantages, keep)


def decision_share(moment: Moment, config: Config) -> float:
    """Share of the decisions of the selected samples that are trained, in (0, 1]."""
    return _between(config.decisions_start, config.decisions_end, moment)


def decision_keys(values: Tensor, terms: PolicyTerms, config: Config) -> Tensor:
    """|A| H [B, K] of advantages ``values`` [B]: the decisions with the largest are trained."""
    del config
    return values.abs()[:, None] * terms.need("entropy").double()


def _widest_of(part: Tensor, values: Tensor, share: float) -> Tensor:
    """Of the samples ``part`` [N] bool, those with the largest variance, [N] bool."""
    total = int(part.sum())
    count = min(total, max(LEAST, math.floor(share * total + 0.5)))
    chosen = torch.zeros_like(part)
    if total:
        chosen[part] = widest(values[part], count)
    return chosen


def _between(start: float, end: float, moment: Moment) -> float:
    """Linear in the progress; exactly its ends there."""
    return start if start == end else (1 - moment.progress) * start + moment.progress * end
