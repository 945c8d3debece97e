"""DeepSpeed's ZeRO: told by its configuration to compute what the other launchers compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.sharding import flattened, in_zero3

STEP = "step"  # the one entry of Adam's state that has no elements of its own for each parameter
ALLOWED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "stage": (0, (1, 2, 3)),
    "offload_optimizer.device": ("none", ("none", "cpu")),
    "offload_param.device": ("none", ("none", "cpu")),
    # Further copies of the weights, which swapping would not reach.
    "zero_hpz_partition_size": (1, (1,)),
    "zero_quantized_weights": (False, (False,)),
    "zero_quantized_nontrainable_weights": (False, (False,)),
}
"""Keys of DeepSpeed's ``zero_optimization``: their defaults, and the values that may train."""
ZERO_SETTINGS = {
    # True replaces torch's linear function for everything in the process, and rounds otherwise.
    "memory_efficient_linear": False,
}


def uses_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed's ZeRO holds the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure_zero(accelerator: Accelerator, mixed_precision: str) -> None:
    """Make DeepSpeed compute what the other launchers compute, before anything is prepared.

    ``UserError`` for configurations with which it would not.
    """
    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None
    section = plugin.deepspeed_config["zero_optimization"]
    refuse_unless_allowed(section, mixed_precision)
    section.update(ZERO_SETTINGS)
    plugin.deepspeed_config.update(settings(mixed_precision))
    # Else transformers would split every model that it loads under ZeRO 3, text encoders too.
    plugin.zero3_init_flag, plugin.dschf = False, None


def refuse_unless_allowed(section: dict[str, Any], mixed_precision: str) -> None:
    """``UserError`` naming the first key of ``zero_optimization`` that is not ``ALLOWED``."""
    for key, (default, allowed) in ALLOWED.items():
        outer, _, inner = key.partition(".")
        value = section.get(outer, default)
        if inner:
            value = (section.get(outer) or {}).get(inner) or default
        if value not in allowed:
            raise UserError(
                f"DeepSpeed's zero_optimization.{key} = {value!r} is not supported; allowed: "
                f"{', '.join(map(repr, allowed))}, as in configs/accelerate/zero*.yaml"
            )
    if mixed_precision == "fp16":
        raise UserError("model.dtype: fp16 is not supported with DeepSpeed; allowed: fp32, bf16")


def settings(mixed_precision: str) -> dict[str, Any]:
    """Entries of DeepSpeed's configuration that decide what is computed.

    Its own ``bf16`` mode would cast the trained float32 weights; under autocast they stay as they
    are, and gradients are summed in float32.
    """
    return {
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {
            "enabled": mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # of no module are gradients summed in bfloat16
        },
        "gradient_accumulation_steps": 1,  # the trainer's losses add up to one mean
        "train_micro_batch_size_per_gpu": 1,  # only counts samples; must be some number
        "zero_force_ds_cpu_optimizer": False,  # offloaded states keep to torch's AdamW
    }


def clip_inside_zero(accelerator: Accelerator, max_grad_norm: float) -> None:
    """Before ``prepare``: DeepSpeed clips by itself, as it steps inside the last backward."""
    if uses_zero(accelerator):
        plugin = accelerator.state.deepspeed_plugin
        assert plugin is not None
        plugin.deepspeed_config["gradient_clipping"] = max_grad_norm


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch that accelerate and DeepSpeed wrapped."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def zero_moments(network: nn.Module, optimizer: Any, *, keep: bool = True) -> dict[str, Any]:
    """Gathered state of a ZeRO optimizer, in the form of torch's ``get_optimizer_state_dict``.

    Every process must call it, but may have no use for the result: then ``keep`` nothing.  The
    optimizer must have made a step.
    """
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
        safe_get_full_optimizer_state,
    )

    inner = torch_optimizer(optimizer)
    entries = next(iter(inner.state.values()))  # of one of the flat parts; they all step together
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in _trained(network):
        for key, x in entries.items():
            found = x if key == STEP else safe_get_full_optimizer_state(value, key)
            if keep:
                state.setdefault(name, {})[key] = found.cpu().clone()
    (group,) = inner.param_groups
    return {"state": state, "param_groups": [{**group, "params": list(state)}]} if keep else {}


def load_zero_moments(network: nn.Module, optimizer: Any, moments: dict[str, Any]) -> None:
    """Inverse of ``zero_moments``, for any stage and number of processes."""
    inner = torch_optimizer(optimizer)
    (group,), (saved,) = inner.param_groups, moments["param_groups"]
    group.update({key: x for key, x in saved.items() if key != "params"})
    entries = next(iter(moments["state"].values()))
    for flat in _flat_parts(optimizer):
        inner.state[flat] = {
            key: x.clone() if key == STEP else torch.zeros_like(flat) for key, x in entries.items()
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # The first step would do this; only then parameters know their places in the flat parts.
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, value in _trained(network):
        for key, x in moments["state"].get(name, {}).items():
            if key != STEP:
                _set_state(value, x, key)


def _trained(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in network.named_parameters() if value.requires_grad)


def _flat_parts(optimizer: Any) -> list[Tensor]:
    """What the inner optimizer steps: parts of many parameters, one after another."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return (
            optimizer.fp32_partitioned_groups_flat
        )  # ZeRO 3, which shows them while stepping only
    return [part for group in optimizer.param_groups for part in group["params"]]


def _set_state(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if in_zero3(parameter):
        # The other function needs a number of elements that the processes divide.
        layout = flattened(parameter)
        safe_set_local_optimizer_state(parameter, layout.pad(layout.cut(value)), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
