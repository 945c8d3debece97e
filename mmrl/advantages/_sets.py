"""Functions of a set of samples: what a group is worth together.

    max                max_i r_i                                     best of G, pass@G
    distinct           number of different answers with r_i > success
    facility_location  sum_v max_i r_i k(v, i)                       v: every sample of the group
    log_det            log det(I + D^1/2 K D^1/2),  D = diag(r)      K_ij = k(i, j)

of the samples i in the set, 0 for an empty one; k is the cosine of their features, in
``facility_location`` at least 0.  All are monotone and submodular for rewards of at least 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.typed import integers
from mmrl.types import Scores

Name = Literal["max", "distinct", "facility_location", "log_det"]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The n samples of a group: ``rewards`` [n] float64, ``answers`` length n, ``kernel`` [n, n].

    ``success``: reward above which an answer counts.  What a function does not read may be empty.
    """

    rewards: Tensor
    answers: Sequence[str | None] = ()
    kernel: Tensor | None = None
    success: float = 0.5


def cosines(features: Tensor) -> Tensor:
    """[n, n] cosine of each two of ``features`` [n, D]; of a point at 0 it is 0."""
    points = torch.nn.functional.normalize(features, dim=1)
    return points @ points.T


def largest(pool: Pool, chosen: Sequence[int]) -> float:
    """Best reward of the samples ``chosen``."""
    return float(pool.rewards[list(chosen)].max()) if chosen else 0.0


def distinct(pool: Pool, chosen: Sequence[int]) -> float:
    """Different right answers among them; a sample without an answer has none."""
    right = {pool.answers[i] for i in chosen if pool.rewards[i] > pool.success}
    return float(len(right - {None}))


def facility_location(pool: Pool, chosen: Sequence[int]) -> float:
    """How well they stand for all samples of the pool."""
    assert pool.kernel is not None, "it reads features"
    if not chosen:
        return 0.0
    served = pool.rewards * pool.kernel.clamp(min=0)
    return float(served[:, list(chosen)].amax(1).sum())


def log_det(pool: Pool, chosen: Sequence[int]) -> float:
    """Volume that they span."""
    assert pool.kernel is not None, "it reads features"
    root = pool.rewards[list(chosen)].sqrt()
    kernel = root[:, None] * pool.kernel[list(chosen)][:, list(chosen)] * root
    # At least the identity, so it needs no jitter.
    return float(torch.eye(len(root), dtype=root.dtype).add(kernel).logdet())


FUNCTIONS: dict[Name, Callable[[Pool, Sequence[int]], float]] = {
    "max": largest,
    "distinct": distinct,
    "facility_location": facility_location,
    "log_det": log_det,
}
READS: dict[Name, frozenset[str]] = {
    "max": frozenset(),
    "distinct": frozenset({"answer"}),
    "facility_location": frozenset({"features"}),
    "log_det": frozenset({"features"}),
}
"""Facts about samples that each needs."""


def pool(scores: Scores, rows: Tensor, name: Name, success: float) -> Pool:
    """The samples at ``rows`` as the named function reads them.

    Raises:
        UserError: a reward below 0, where rewards weigh features.
    """
    rewards, read = scores.combined[rows], READS[name]
    if "features" in read and bool((rewards < 0).any()):
        raise UserError(
            f"advantage.function: {name!r} weighs samples by reward, and one is "
            f"{float(rewards.min()):g}; allowed: rewards of 0 or more"
        )
    return Pool(
        rewards=rewards,
        answers=[scores.need("answer")[i] for i in integers(rows)] if "answer" in read else (),
        kernel=cosines(scores.need("features")[rows]) if "features" in read else None,
        success=success,
    )


def leave_one_out(function: Callable[[Pool, Sequence[int]], float], pool: Pool) -> Tensor:
    """[n] F(S) - F(S without i), with S all samples of the pool."""
    everyone = range(len(pool.rewards))
    whole = function(pool, everyone)
    gains = [whole - function(pool, [j for j in everyone if j != i]) for i in everyone]
    return torch.tensor(gains, dtype=torch.float64)
