"""The part of some numbers with the largest variance.

It consists of the k lowest and of the highest, for some k; prefix sums try every k in O(n log n).
"""

from __future__ import annotations

import torch
from torch import Tensor


def widest(values: Tensor, count: int) -> Tensor:
    """[n] bool: ``count`` >= 1 of ``values`` [n] with the largest variance."""
    order = values.argsort(stable=True)
    ordered = values[order] - values.mean()
    lowest = torch.arange(count + 1)
    highest = len(values) - (count - lowest)
    sums, squares = (
        total[lowest] + total[-1] - total[highest]
        for total in (_running(ordered), _running(ordered.square()))
    )
    best = int((squares / count - (sums / count).square()).argmax())
    chosen = torch.ones(len(values), dtype=torch.bool)
    chosen[order[best : len(values) - (count - best)]] = False
    return chosen


def _running(values: Tensor) -> Tensor:
    """[n + 1] sums of the first 0, 1, ... values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
