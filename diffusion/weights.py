"""Other weights for the same network: averages, the behaviour policy and the frozen reference.

Nothing here holds on to a parameter: sharding may replace parameters after the model was built, so
the current ones are passed in by name each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that receive gradients, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class Snapshot:
    """A float32 copy of some parameters that can stand in for them."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        # clone: on the CPU, or in float32, detach() and to() would alias the live storage.
        self._values = {name: value.detach().float().clone() for name, value in parameters.items()}

    @contextmanager
    def applied(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it ``parameters`` hold this copy; afterwards exactly the bits they held before."""
        live = {name: value.detach().clone() for name, value in parameters.items()}
        _write(parameters, self._values)
        try:
            yield
        finally:
            _write(parameters, live)

    @torch.no_grad()
    def move_towards(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """copy <- decay copy + (1 - decay) parameters, exact for decay 0 and 1."""
        for name, value in parameters.items():
            if decay == 0:
                self._values[name].copy_(value)
            else:
                self._values[name].mul_(decay).add_(value.detach().float(), alpha=1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The copy, by parameter name."""
        return dict(self._values)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state``; ``ValueError`` unless the names agree."""
        if state.keys() != self._values.keys():
            odd = sorted(state.keys() ^ self._values.keys())[:3]
            raise ValueError(f"saved weights belong to another set of parameters, e.g. {odd}")
        _write(self._values, state)


def ema_decay(step: int, max_decay: float, rate: float) -> float:
    """Decay of the slow copy phi after training step ``step`` (AWM): min(max_decay, rate step)."""
    return min(max_decay, rate * step)


def evaluation_decay(step: int, decay: float) -> float:
    """Decay of the average for evaluation: min((1 + step) / (10 + step), decay)."""
    return min((1 + step) / (10 + step), decay)


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` on the CPU, with sharded tensors gathered (then every process must call it)."""
    return {
        name: getattr(value, "full_tensor", value.detach)().detach().cpu().contiguous()
        for name, value in state.items()
    }


@torch.no_grad()
def _write(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
