"""Floors to compare with: how fast this machine multiplies matrices, and how much there is to do.

A floating-point operation is one addition or one multiplication.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmrl.attention import Availability
from mmrl.errors import UserError
from mmrl.schema import nearest

Result = TypeVar("Result")
PEAK_BF16 = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}
"""Dense bf16 operations a second of NVIDIA's data sheets, by part of the device name."""


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


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What ``work()`` returns, and its wall time in seconds."""
    results: list[Result] = []
    time = seconds(lambda: results.append(work()), device)
    return results[0], time


def within_memory(work: Callable[[], Result], device: torch.device) -> Result | None:
    """What ``work()`` returns, or ``None`` if it runs out of the device's memory."""
    try:
        return work()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def peak_rate(name: str | None) -> float | None:
    """Data-sheet peak of a device, if it is known here."""
    return next((rate for part, rate in PEAK_BF16.items() if name and part in name), None)


def working(names: Sequence[str] | None, found: Sequence[Availability]) -> list[str]:
    """Attention kernels to measure: ``names``, or all that work.

    ``UserError`` for a name that is none or does not run.
    """
    known, works = [a.name for a in found], [a.name for a in found if a.works]
    for name in names or []:
        if name not in known:
            raise UserError(f"--attention {name!r}: {nearest(name, known)}")
        if name not in works:
            reason = next(a.reason for a in found if a.name == name)
            raise UserError(f"--attention {name!r} does not work here: {reason}")
    return list(names or works)


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
