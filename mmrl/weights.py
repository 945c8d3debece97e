"""Other weights for the same network: averages, the behaviour policy and the frozen reference.

Nothing here holds on to a parameter: sharding may replace parameters after the model was built, so
the current ones are passed in by name each time.  Copies of split parameters are split alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mmrl.sharding import layout_of, part_of, reshard, trainable, whole

__all__ = ["Snapshot", "ema_decay", "evaluation_decay", "reshard", "trainable", "whole"]


class Snapshot:
    """A float32 copy of some parameters that can stand in for them."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._layouts = {name: layout_of(value) for name, value in parameters.items()}
        # clone: on the CPU, or in float32, a conversion would alias the live storage.
        self._parts = {name: part_of(value).float().clone() for name, value in parameters.items()}

    @contextmanager
    def applied(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it ``parameters`` hold this copy; afterwards exactly the bits they held before."""
        live = {name: part_of(value).clone() for name, value in parameters.items()}
        _write(parameters, self._parts)
        try:
            yield
        finally:
            _write(parameters, live)

    @torch.no_grad()
    def move_towards(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """copy <- decay copy + (1 - decay) parameters, exact for decay 0 and 1."""
        for name, value in parameters.items():
            if decay == 0:
                self._parts[name].copy_(part_of(value))
            else:
                self._parts[name].mul_(decay).add_(part_of(value).float(), alpha=1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The copy, by parameter name: whole tensors on the CPU, so every process must call it."""
        return {
            name: self._layouts[name].gather(part).cpu().contiguous()
            for name, part in self._parts.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state``, with the same whole tensors on every process.

        ``ValueError`` unless the names agree.
        """
        if state.keys() != self._parts.keys():
            odd = sorted(state.keys() ^ self._parts.keys())[:3]
            raise ValueError(f"saved weights belong to another set of parameters, e.g. {odd}")
        for name, part in self._parts.items():
            part.copy_(self._layouts[name].cut(state[name]))


def ema_decay(step: int, max_decay: float, rate: float, start: int = 0) -> float:
    """Decay of the slow copy phi after optimizer step ``step``.

    min(max_decay, rate step) (AWM); DiffusionNFT also has one that stays 0 until ``start``.
    """
    return min(max_decay, rate * max(0, step - start))


def evaluation_decay(step: int, decay: float) -> float:
    """Decay of the average for evaluation: min((1 + step) / (10 + step), decay)."""
    return min((1 + step) / (10 + step), decay)


@torch.no_grad()
def _write(parameters: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
    """Parameters where this process' parts are ``parts``."""
    for name, value in parameters.items():
        part_of(value).copy_(parts[name])
