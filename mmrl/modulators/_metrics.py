"""What modulators log."""

from __future__ import annotations

from torch import Tensor


def share(selected: Tensor, among: Tensor) -> float:
    """Number of true entries of ``selected`` over that of ``among``; 0 if there are none."""
    return float(selected.sum()) / max(int(among.sum()), 1)
