"""Sharing work among processes: any number of processes serves any number of groups."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed.nn  # before there is a group, which its functions' defaults would keep
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env

from mmrl.errors import UserError
from mmrl.zero import configure_zero, uses_zero

Item = TypeVar("Item")
_ENVIRONMENT = dict(os.environ)  # as launched: accelerate adds its own variables to it later


@dataclass(frozen=True)
class Share:
    """One piece of work of a process: the ``index`` of the item; ``padding`` if done for nothing.

    Sharded models make every forward a collective call, so all processes do equally many.
    """

    index: int
    padding: bool = False


def owner(index: int, world: int) -> int:
    """The process that owns item ``index``."""
    return index % world


def deal(count: int, rank: int, world: int) -> list[Share]:
    """Items of ``rank``, as even as possible, padded to the longest share with repeats."""
    if count < 1:
        return []
    longest = -(-count // world)
    mine = [Share(i) for i in range(rank, count, world)]
    filler = mine[0].index if mine else rank % count
    return mine + [Share(filler, padding=True)] * (longest - len(mine))


def gather_items(accelerator: Accelerator, items: Sequence[Item]) -> list[Item]:
    """The items of all processes, in rank order, on every process."""
    if accelerator.num_processes == 1:
        return list(items)
    return gather_object(list(items))


def agree_or_raise(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise on every process if any process failed, so that none waits for the others."""
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    messages = [m for m in gather_items(accelerator, [str(error) if error else ""]) if m]
    if messages:
        raise error if error is not None else UserError(messages[0])


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Element-wise sums of a list of numbers over all processes, exact in float64."""
    if accelerator.num_processes == 1:
        return list(values)
    # Summed in rank order on every process: the result does not depend on the collective's order.
    rows = gather_items(accelerator, [list(values)])
    return torch.tensor(rows, dtype=torch.float64).sum(0).tolist()


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return any(gather_items(accelerator, [flag]))


def make_accelerator(mixed_precision: str, **options: Any) -> Accelerator:
    """An ``Accelerator`` that also forms a group of CPU processes.

    Without ``cpu=True`` accelerate leaves several CPU processes unaware of each other.
    """
    cpu, zero = not torch.cuda.is_available(), parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if cpu:
        share_cores(_ENVIRONMENT)
        if mixed_precision == "fp16":
            raise UserError("model.dtype: fp16 needs a GPU; allowed on this machine: fp32, bf16")
        if zero:
            PartialState(cpu=True)  # with ``cpu=True`` below, accelerate would ignore DeepSpeed
    accelerator = Accelerator(cpu=cpu and not zero, mixed_precision=mixed_precision, **options)
    if uses_zero(accelerator):
        configure_zero(accelerator, mixed_precision)
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError(
                "FSDP version 1 hides parameters in flat buffers and is not supported; set "
                "fsdp_config.fsdp_version: 2, as configs/accelerate/fsdp2.yaml does"
            )
        keep_own_dtypes(accelerator)
    return accelerator


def leave(accelerator: Accelerator) -> None:
    """End the trackers and the group of processes; nobody may use the wrapped model any more.

    A thread of the group may still hold a tensor of the last collective and needs the interpreter
    to release it: if that ends first, the process aborts.  The group joins its threads when the
    last wrapped model is gone.
    """
    if accelerator.num_processes > 1:
        accelerator.free_memory()
    accelerator.end_training()


@contextmanager
def one_group_of_processes() -> Iterator[None]:
    """Keep the processes connected from one run to the next.

    The store of a launcher still holds the addresses of a group that was left, so a second group
    would try to meet at the old ones.  accelerate leaves a group unless this variable says that
    somebody else looks after it.
    """
    variable = "FORK_LAUNCHED"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
        gc.collect()  # wrapped models, as ``leave`` says
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def keep_own_dtypes(accelerator: Accelerator) -> None:
    """Undo accelerate's FSDP2 mixed precision; the backend's autocast chooses dtypes.

    It would round the inputs (noise levels too) and the reduced gradients to half precision.
    """
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None, "only called under FSDP"
    plugin.mixed_precision_policy = None


def share_cores(environment: Mapping[str, str]) -> None:
    """Let the processes of this machine use all of its cores.

    Launchers set ``OMP_NUM_THREADS=1`` where nobody chose a number, which leaves cores idle; any
    other number is somebody's choice and stays.  ``MMRL_NUM_THREADS`` overrules both.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment or "LOCAL_WORLD_SIZE" in environment
    chosen = environment.get("MMRL_NUM_THREADS")
    if chosen is not None:
        torch.set_num_threads(int(chosen))
    elif launched and environment.get("OMP_NUM_THREADS", "1") == "1":
        local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, available_cores() // local))


def available_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
