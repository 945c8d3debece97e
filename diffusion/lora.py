"""Which parameters are trained: low-rank adapters, or all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffusion.config import LoraConfig, ModelConfig
from diffusion.noise import generator
from diffusion.weights import trainable
from mmrl.errors import UserError

ADAPTER = "default"


def prepare_weights(
    transformer: Any, model: ModelConfig, default_targets: Sequence[str], seed: int
) -> None:
    """Trained parameters in float32; with LoRA the others are frozen as they are.

    ``seed`` starts the adapter; the global generator is left alone.
    """
    transformer.eval()
    if model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if model.lora is None:
        transformer.float().requires_grad_(True)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, 0, "lora").initial_seed())
        add_lora(transformer, model.lora, default_targets)
    for parameter in trainable(transformer).values():
        parameter.data = parameter.data.float()


def add_lora(transformer: Any, lora: LoraConfig, default_targets: Sequence[str]) -> None:
    """Freeze the transformer and add a trainable adapter whose output starts at 0.

    ``UserError`` if a target module does not exist.
    """
    from peft import LoraConfig as PeftConfig

    targets = lora.target_modules or list(default_targets)
    transformer.requires_grad_(False)
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - used as a number only
        target_modules=targets,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    try:
        transformer.add_adapter(config, ADAPTER)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules = {targets}: {error}") from error


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it every adapter layer of ``model`` computes its frozen base layer only.

    peft's own switch also clears ``requires_grad`` of the adapter and does not bring it back to
    what it was, so the layers' flag is set directly.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
