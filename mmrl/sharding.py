"""Parameters that several processes share (FSDP2, DeepSpeed's ZeRO 3), seen as all others are.

A parameter has a local part, a plain tensor over its memory, and a layout, which makes whole
tensors of parts and parts of whole tensors.  What is no more than arithmetic on each element
(copies, averages, swaps) works on the parts and never gathers anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


class Layout(Protocol):
    """How a tensor is split; every process must call ``gather`` alike."""

    def gather(self, part: Tensor) -> Tensor:
        """The whole tensor, of the parts of all processes."""
        ...

    def cut(self, whole: Tensor) -> Tensor:
        """The part of this process."""
        ...


@dataclass(frozen=True)
class Unsplit:
    """Every process holds all of it."""

    def gather(self, part: Tensor) -> Tensor:
        return part

    def cut(self, whole: Tensor) -> Tensor:
        return whole


@dataclass(frozen=True)
class Meshed:
    """Split as a DTensor is, by FSDP2."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def gather(self, part: Tensor) -> Tensor:
        return DTensor.from_local(
            part.to(self.mesh.device_type),
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        ).full_tensor()

    def cut(self, whole: Tensor) -> Tensor:
        whole = whole.to(self.mesh.device_type)
        # No source rank: every process holds all of it already, and only keeps its part.
        cut = distribute_tensor(whole, self.mesh, self.placements, src_data_rank=None)
        return cut.to_local()


@dataclass(frozen=True)
class Flattened:
    """Split by ZeRO 3: flattened, padded, and cut into equal rows, one for each process.

    DeepSpeed leaves the padding unwritten, so parts are without it.
    """

    shape: torch.Size
    device: torch.device
    group: Any

    def gather(self, part: Tensor) -> Tensor:
        row = self.pad(part.to(self.device))
        rows = row.new_empty(self._world * self._row)
        torch.distributed.all_gather_into_tensor(rows, row, group=self.group)
        return rows[: self.shape.numel()].view(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        return whole.flatten()[self._start : self._start + self._row]

    def trim(self, row: Tensor) -> Tensor:
        """The part in this process' row, which may end in padding."""
        return row[: max(0, self.shape.numel() - self._start)]

    def pad(self, part: Tensor) -> Tensor:
        """Inverse of ``trim``, with zeros for padding."""
        return torch.nn.functional.pad(part, (0, self._row - len(part)))

    @property
    def _world(self) -> int:
        return torch.distributed.get_world_size(self.group)

    @property
    def _row(self) -> int:
        return -(-self.shape.numel() // self._world)

    @property
    def _start(self) -> int:
        return torch.distributed.get_rank(self.group) * self._row


def layout_of(parameter: Tensor) -> Layout:
    """How ``parameter`` is split."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, tuple(parameter.placements)
        return Meshed(mesh, placements, parameter.shape, parameter.stride())
    return flattened(parameter) if in_zero3(parameter) else Unsplit()


def part_of(parameter: Tensor) -> Tensor:
    """The part that this process holds, without history; writing to it changes the parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    if in_zero3(parameter):
        return flattened(parameter).trim(parameter.ds_tensor.detach())  # type: ignore[attr-defined]
    return parameter.detach()


def flattened(parameter: Any) -> Flattened:
    """How ZeRO 3 splits ``parameter``."""
    return Flattened(parameter.ds_shape, parameter.device, parameter.ds_process_group)


def in_zero3(parameter: Tensor) -> bool:
    """Whether ZeRO 3 holds ``parameter``, whose own storage is empty between forwards."""
    return hasattr(parameter, "ds_tensor")


def is_split(model: nn.Module) -> bool:
    """Whether a forward of ``model`` gathers weights, so that all processes must make it alike."""
    return any(isinstance(x, FSDPModule) for x in model.modules()) or any(
        map(in_zero3, model.parameters())
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that receive gradients, by name; parts where it is split."""
    reshard(model)
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def reshard(model: nn.Module) -> None:
    """Drop gathered weights, some of which stay after a forward without a backward.

    Until then they stand in for the parts: writes to them are lost, and writes to the parts do not
    reach the next forward.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    held: Any = next(filter(in_zero3, model.parameters()), None)
    if held is not None:
        held._z3_optimizer.empty_partition_cache()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of a model that FSDP2 splits.

    So forwards exchange nothing, and processes need not make equally many.  For ZeRO 3, which has
    no such state, see ``any_goes_on``.
    """
    split = [module for module in model.modules() if isinstance(module, FSDPModule)]
    kept = [_reshards(module) for module in split]
    for module in split:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module, reshards in zip(split, kept, strict=True):
            module.set_reshard_after_forward(reshards, recurse=False)
            module.reshard()


def _reshards(module: FSDPModule) -> bool:
    groups = module._get_fsdp_state()._fsdp_param_groups
    return any(group._reshard_after_forward for group in groups)


def any_goes_on(model: nn.Module) -> Callable[[bool], bool]:
    """Of whether this process makes another forward: whether any does, so that all must.

    Only ZeRO 3 needs to ask the others.
    """
    held: Any = next(filter(in_zero3, model.parameters()), None)
    if held is None:
        return bool

    def asked(goes_on: bool) -> bool:
        flag = torch.tensor(int(goes_on), device=held.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, held.ds_process_group)
        return bool(flag)

    return asked


def whole(state: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Copies of ``state`` on the CPU, one split parameter after another gathered.

    Every process must call it, but may have no use for the result: then ``keep`` nothing.
    """
    found = {}
    for name, value in state.items():
        gathered = layout_of(value).gather(part_of(value))
        if keep:
            found[name] = gathered.to("cpu", copy=True).contiguous()
    return found


@torch.no_grad()
def write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set ``parameters`` to whole ``values``, which every process has."""
    for name, parameter in parameters.items():
        part_of(parameter).copy_(layout_of(parameter).cut(values[name]))
