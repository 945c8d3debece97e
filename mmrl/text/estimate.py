"""What a configuration would build and hold in memory, from configuration files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mmrl.adapters import add_lora
from mmrl.attention import describe as describe_attention
from mmrl.errors import UserError
from mmrl.text.config import Config
from mmrl.text.kernels import Heads, choose
from mmrl.text.loading import LORA_TARGETS, known
from mmrl.types import DTYPES
from mmrl.weights import trainable

HIDDEN_TENSORS = 34
"""Hidden-sized tensors that one block keeps of a token for its backward pass, by Korthikanti et
al. 2022, arXiv:2205.05198, doubled for gated feed-forward layers and adapters."""


class Parts(NamedTuple):
    """What kind of network it is.

    ``loader``: a class of transformers.  ``targets``: what gets adapters.  ``freeze``: what else
    stays as it was loaded.
    """

    loader: str = "AutoModelForCausalLM"
    targets: Sequence[str] | str = LORA_TARGETS
    freeze: Callable[[Any], None] | None = None


TEXT = Parts()


def outline(config: Config, parts: Parts) -> tuple[Any, int, int]:
    """The network on the meta device, and how many parameters it has and how many are trained."""
    import transformers
    from transformers import AutoConfig

    folder = known(config.model.path)
    try:
        found = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            network = getattr(transformers, parts.loader).from_config(found)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path = {config.model.path!r}: {error}") from error
    total = sum(parameter.numel() for parameter in network.parameters())
    if config.model.lora is not None:
        with torch.device("meta"):
            add_lora(network, config.model.lora, parts.targets)
    if parts.freeze is not None:
        parts.freeze(network)
    return network, total, sum(p.numel() for p in trainable(network).values())


def describe(config: Config, parts: Parts = TEXT) -> list[str]:
    """Lines for ``mmrl check``."""
    network, total, trained = outline(config, parts)
    model, lora, rollout = config.model, config.model.lora, config.rollout
    how = "all parameters" if trained == total else "the others are frozen"
    drawn = f"at most {rollout.max_tokens} tokens, temperature {rollout.temperature:g}"
    if rollout.demonstrations is not None:
        drawn = f"demonstrations of at most {rollout.max_tokens} tokens, {rollout.demonstrations!r}"
    how = f"LoRA rank {lora.rank}, alpha {lora.alpha:g}" if lora else how
    return [
        f"model: {type(network).__name__} at {model.path}, {total:,} parameters, {model.dtype}",
        f"trained: {trained:,} parameters ({how})",
        f"rollout: {drawn}",
        f"update: {config.update}",
        describe_attention(
            model.attention, lambda device: choose(config, Heads.of(network), device)
        ),
    ]


def estimate_memory(config: Config, parts: Parts = TEXT) -> dict[str, float]:
    """Bytes by use, of one process that shares nothing with others.

    ``weights``, ``gradients_and_optimizer`` (AdamW), the float32 ``copy_of_trained_weights``, the
    ``logits`` of a chunk, and roughly ``activations_per_decision``: of a sample in a micro-batch
    with the longest completion; its prompt is not counted.
    """
    network, total, trained = outline(config, parts)
    width = torch.empty((), dtype=DTYPES[config.model.dtype]).element_size()
    text = network.config.get_text_config()
    frozen = total * width if config.model.lora is not None else (total - trained) * 4
    layers = text.num_hidden_layers
    recomputed = config.model.gradient_checkpointing
    held = layers + HIDDEN_TENSORS if recomputed else HIDDEN_TENSORS * layers
    return {
        "weights": float(frozen + trained * 4),
        "gradients_and_optimizer": float(trained * 4 * 3),
        "copy_of_trained_weights": float(trained * 4 * (config.model.lora is None)),
        "logits": float(3 * 4 * config.chunk(text.vocab_size) * text.vocab_size),
        "activations_per_decision": float(
            held * text.hidden_size * width * config.rollout.max_tokens
        ),
    }
