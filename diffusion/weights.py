"""Other weights for the same network: averages, the behaviour policy and the frozen reference.

Nothing here holds on to a parameter: sharding may replace parameters after the model was built, so
the current ones are passed in by name each time.  Sharded parameters are DTensors; copies of them
are sharded the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that receive gradients, by name; shards where it is sharded."""
    reshard(model)
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def reshard(model: nn.Module) -> None:
    """Drop gathered weights, which FSDP2 keeps after a forward without a backward.

    Until then they stand in for the shards: writes to them are lost, and writes to the shards do
    not reach the next forward.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
        """The copy, by parameter name: whole tensors on the CPU, so every process must call it."""
        return whole(self._values)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state``, with the same whole tensors on every process.

        ``ValueError`` unless the names agree.
        """
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
        value.copy_(_distributed_like(value, source[name]))


def _distributed_like(target: Tensor, source: Tensor) -> Tensor:
    """A whole ``source`` cut up like ``target``, where that is sharded."""
    if not isinstance(target, DTensor) or isinstance(source, DTensor):
        return source
    mesh = target.device_mesh
    source = source.to(mesh.device_type)
    # No source rank: every process holds all of it already, and only keeps its part.
    return distribute_tensor(source, mesh, target.placements, src_data_rank=None)
