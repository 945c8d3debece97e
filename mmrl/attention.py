"""Attention kernels that a machine may lack: which of them work here, and which one is used."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mmrl.errors import UserError

ALWAYS = "sdpa"
"""PyTorch's own choice of kernel, which works everywhere."""
HALF_ONLY = ("flash",)


class Availability(NamedTuple):
    """Whether an attention kernel runs on a device, and if not, why."""

    name: str
    works: bool
    reason: str


def probe(
    name: str, attempt: Callable[[], Any], device: torch.device, dtype: torch.dtype
) -> Availability:
    """Whether ``attempt()``, a tiny forward and backward pass of the kernel, succeeds."""
    if name != ALWAYS and device.type != "cuda":
        return Availability(name, False, f"it needs a CUDA device, and this is {device.type!r}")
    if name in HALF_ONLY and dtype == torch.float32:
        return Availability(name, False, "it takes bf16 and fp16, and model.dtype is fp32")
    try:
        attempt()
    except ModuleNotFoundError as error:
        package = (error.name or name).split(".")[0]
        return Availability(name, False, f"{error}; pip install --upgrade {package}")
    except Exception as error:  # no operator for this device, a broken build
        return Availability(name, False, f"{type(error).__name__}: {error}".split("\n", 1)[0])
    return Availability(name, True, f"works on {device.type} in {str(dtype).split('.')[-1]}")


def pick(
    requested: str,
    preference: Sequence[str],
    tried: Callable[[str], Availability],
    device: torch.device,
) -> Availability:
    """The kernel to use and why; ``auto``: the first of ``preference`` that works on CUDA.

    ``tried``: what ``probe`` says of a name.  ``UserError`` if the requested one does not run here.
    """
    if requested == "auto":
        if device.type != "cuda":
            return Availability(ALWAYS, True, f"auto on {device.type}")
        return next(found for found in map(tried, preference) if found.works)
    found = tried(requested)
    if not found.works:
        raise UserError(
            f"model.attention = {requested!r} does not work here: {found.reason}; "
            f"allowed here: auto, {ALWAYS}"
        )
    return found


def describe(requested: str, choose: Callable[[torch.device], Availability]) -> str:
    """A line for ``mmrl check``, which may run on another machine than the training.

    ``choose``: the kernel for a device; its ``UserError`` is what the line says.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = choose(device)
    except UserError as error:
        return f"attention: {error}"
    return f"attention: {requested}, here {found.name} ({found.reason})"


def memory_efficient_attention() -> Callable[..., torch.Tensor]:
    """That of xformers, without what it says of its own build when first imported."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from xformers.ops import (  # pyright: ignore[reportMissingImports] - Linux x86-64 only
            memory_efficient_attention,
        )
    return memory_efficient_attention
