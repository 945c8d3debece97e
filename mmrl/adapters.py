"""Low-rank adapters of peft inside a model of diffusers or transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field
from torch import nn

from mmrl.errors import UserError
from mmrl.schema import StrictModel

ADAPTER = "default"


class LoraConfig(StrictModel):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(
        default=32,
        ge=1,
        description="Rank of the update.",
    )
    alpha: float = Field(
        default=64.0,
        gt=0,
        description="The update is scaled by alpha / rank.",
    )
    target_modules: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Module name endings; null: the family's attention layers.",
    )
    init: Literal["gaussian", "default"] = Field(
        default="gaussian",
        description="Start of the A matrix: N(0, 1/rank) or Kaiming-uniform; B is 0.",
    )
    path: str | None = Field(
        default=None,
        description="Run or adapter folder to start from instead; the reference stays the base.",
    )


class TrainedModelConfig(StrictModel):
    """What every backend asks about the network that it trains."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="bf16",
        description="Frozen weights and autocast; trained parameters are always fp32.",
    )
    lora: LoraConfig | None = Field(
        default=LoraConfig(),
        description="Null: train every parameter.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute blocks in the backward pass: less memory, more time.",
    )


def add_lora(model: Any, lora: LoraConfig, default_targets: Sequence[str] | str) -> None:
    """Freeze the model and add a trainable adapter whose output starts at 0.

    ``default_targets``: endings of module names, or a pattern.  ``UserError`` if a target module
    does not exist.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = lora.target_modules or default_targets
    targets = targets if isinstance(targets, str) else list(targets)
    model.requires_grad_(False)
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - used as a number only
        target_modules=targets,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    try:
        # Not `model.add_adapter`: transformers may ask for a peft that is not released yet.
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules = {targets}: {error}") from error
    leave_dtypes_to_autocast(model)


def leave_dtypes_to_autocast(model: nn.Module) -> None:
    """Spare each adapter two copies: peft widens its input to float32, autocast narrows it again.

    Results stay the same to the bit, for half precision survives the way there and back.
    """
    for layer in adapter_layers(model):
        layer.cast_input_dtype_enabled = False


@contextmanager
def adapter_active(model: nn.Module, name: str) -> Iterator[None]:
    """Within it the adapter ``name`` of ``model`` computes, alone."""
    # peft's own switch also makes the parameters of that adapter trainable.
    with _layers_set(model, "_active_adapter", [name]):
        yield


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it every adapter layer of ``model`` computes its frozen base layer only."""
    # peft's own switch also clears ``requires_grad`` and does not bring it back to what it was.
    with _layers_set(model, "_disable_adapters", True):
        yield


@contextmanager
def _layers_set(model: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    """Within it ``attribute`` of every adapter layer is ``value``."""
    layers = adapter_layers(model)
    before = [getattr(layer, attribute) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, attribute, value)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            setattr(layer, attribute, old)


def adapter_layers(model: nn.Module) -> list[Any]:
    """Every module of ``model`` that has adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
