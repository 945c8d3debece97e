"""One-dimensional optimal transport of values to a standard normal distribution.

    q_k = Phi^-1((k - 1/2) / n) for the k-th smallest of n values; equal values share the mean

Pairing both in ascending order minimises the mean squared distance (arXiv:2604.08539).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.typed import distinct, normal_quantiles, numbered, pieces


def transport(
    values: Tensor, part: Tensor, active: Tensor, *, round_to: float = 0.0, min_spread: float = 0.0
) -> Tensor:
    """[N] float64 quantiles of ``values`` within each part; 0 where not ``active``.

    Args:
        values: [N] float64; where not active they may be anything, NaN included.
        part: [N] int64, which values belong together.
        active: [N] bool, values that take part.
        round_to: values are rounded to multiples of it first; 0: not.
        min_spread: a part gets 0 when its largest value exceeds its smallest by no more than this.
    """
    result = torch.zeros_like(values)
    for each in distinct(part[active]):
        rows = active & (part == each)
        result[rows] = quantiles(values[rows], round_to, min_spread).to(values.device)
    return result


def quantiles(values: Tensor, round_to: float, min_spread: float) -> Tensor:
    """[n] normal quantiles of ``values`` [n] by rank, on the CPU; 0 if they are all equal."""
    # Float64 on the CPU adds in one order, so equal patterns of ties give equal bits.
    levels, level = numbered(_in_units(values.double().cpu(), round_to))
    number, count = len(values), torch.bincount(level)
    if levels[-1] - levels[0] <= _in_units(torch.tensor(min_spread, dtype=torch.float64), round_to):
        return torch.zeros(number, dtype=torch.float64)
    normal = normal_quantiles((torch.arange(number, dtype=torch.float64) + 0.5) / number)
    shared = torch.stack([equal.mean() for equal in pieces(normal, count)])
    return shared[level]


def _in_units(values: Tensor, unit: float) -> Tensor:
    return values if unit == 0 else (values / unit).round()
