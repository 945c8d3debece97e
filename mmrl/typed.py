"""Functions of torch whose types its stubs leave open, with types."""

from __future__ import annotations

import torch
from torch import Tensor


def integers(values: Tensor) -> list[int]:
    """The numbers of a one-dimensional integer tensor."""
    return values.tolist()


def floats(values: Tensor) -> list[float]:
    """The numbers of a one-dimensional floating-point tensor."""
    return values.tolist()


def distinct(values: Tensor) -> Tensor:
    """[M] the different values, ascending."""
    return torch.unique(values)


def numbered(values: Tensor) -> tuple[Tensor, Tensor]:
    """``distinct(values)`` [M], and [N] int64 the place of each value among them."""
    return torch.unique(values, return_inverse=True)


def normal_quantiles(levels: Tensor) -> Tensor:
    """Phi^-1 of numbers in (0, 1)."""
    return torch.special.ndtri(levels)


def pieces(values: Tensor, sizes: Tensor) -> list[Tensor]:
    """Consecutive parts of ``values``, as long as ``sizes`` says, which add up to its length."""
    return list(values.split(integers(sizes)))
