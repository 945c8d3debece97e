"""Beta densities of success rates, as BNPO (arXiv:2506.02864) divides by them."""

from __future__ import annotations

import torch
from torch import Tensor


def fitted(rates: Tensor) -> tuple[float, float]:
    """alpha and beta for success rates [M]; 1 and 1 where they do not differ.

    max(1, 1 + a / 3) and max(1, 1 + b / 3), with Beta(a, b) of their mean and sample variance.
    """
    mean, spread = float(rates.mean()), float(rates.var()) if len(rates) > 1 else 0.0
    if spread == 0:
        return 1.0, 1.0
    concentration = mean * (1 - mean) / spread - 1
    return max(1.0, 1 + concentration * mean / 3), max(1.0, 1 + concentration * (1 - mean) / 3)


def density(rates: Tensor, alpha: float, beta: float) -> Tensor:
    """Beta density at ``rates`` within (0, 1)."""
    a, b = torch.tensor([alpha, beta], dtype=rates.dtype)
    scale = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    return ((a - 1) * rates.log() + (b - 1) * torch.log1p(-rates) - scale).exp()
