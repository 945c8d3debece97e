"""Floors to compare with: how fast this machine multiplies matrices, and how much there is to do.

A floating-point operation is one addition or one multiplication.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(work: Callable[[], Any]) -> int:
    """Operations in the matrix products, convolutions and attentions of ``work()``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of ``work()``, waiting for the device before and after."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def matmul_rate(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    min_seconds: float = 0.3,
) -> float:
    """Operations a second of [m, k] @ [k, n], repeated for about ``min_seconds``."""
    m, k, n = shape
    left = torch.randn(m, k, device=device).to(dtype)
    right = torch.randn(k, n, device=device).to(dtype)

    def repeated(times: int) -> float:
        return seconds(lambda: [left @ right for _ in range(times)], device)

    repeated(1)
    times = 1 + int(min_seconds / max(repeated(1), 1e-6))
    return times * 2 * m * k * n / repeated(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
