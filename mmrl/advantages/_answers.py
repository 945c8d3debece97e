"""How much the answers of a group differ."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from mmrl.advantages._groups import rows_of_groups
from mmrl.typed import integers
from mmrl.types import Scores

Unparsed = Literal["one", "distinct"]
"""Whether samples without an answer count as one answer, or each as one of its own."""

PUBLISHED_ENTROPY, PUBLISHED_GROUP = 1.5, 6


def even_entropy(count: Tensor, threshold: float | None) -> Tensor:
    """[M] ``threshold``, or without one COPO's 1.5 log(n) / log(6) for groups of ``count`` [M].

    In nats; 0 for a group of one or none.
    """
    if threshold is not None:
        return torch.full_like(count, threshold)
    return PUBLISHED_ENTROPY * count.clamp(min=1).log() / math.log(PUBLISHED_GROUP)


def answer_entropy(scores: Scores, unparsed: Unparsed) -> Tensor:
    """[M] entropy of the answers of the valid samples of each group, in nats."""
    answers = scores.need("answer")
    found: list[Tensor] = []
    for rows in rows_of_groups(scores):
        given = [answers[i] for i in integers(rows)]
        if unparsed == "distinct":
            given = [i if answer is None else answer for i, answer in enumerate(given)]
        counts = torch.tensor(list(Counter(given).values()), dtype=torch.float64)
        shares = counts / max(len(given), 1)
        found.append(-torch.xlogy(shares, shares).sum())
    return torch.stack(found)
