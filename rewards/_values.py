"""What a reward may return: N numbers, and which samples it failed on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PartlyFailed:
    """``values`` of N samples, NaN for ``num_failed`` that could not be scored, and why."""

    values: Sequence[float]
    num_failed: int
    message: str


class BadReturnError(Exception):
    """What a reward returned is not N numbers."""


def as_values(returned: Any, size: int) -> Tensor:
    """float64 [size] from a tensor, array or list, NaN for None; else ``BadReturnError``."""
    if isinstance(returned, np.ndarray):
        returned = returned.tolist()
    if isinstance(returned, list | tuple):
        returned = [math.nan if value is None else value for value in returned]
    if isinstance(returned, Tensor) and returned.is_complex():
        raise BadReturnError(f"complex values, not {size} numbers")
    try:
        values = torch.as_tensor(returned, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadReturnError(f"{type(returned).__name__}, not {size} numbers ({error})") from error
    if values.ndim != 1:
        raise BadReturnError(f"shape {list(values.shape)}, not [{size}]")
    if len(values) != size:
        raise BadReturnError(f"{len(values)} values for {size} samples")
    return values
