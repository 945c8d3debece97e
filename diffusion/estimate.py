"""What a configuration would build and hold in memory, from configuration files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.attention import pick_attention
from diffusion.config import Config, FlowMatchingConfig
from diffusion.lora import LORA_FILE, adapter_size, teacher_folder, weights_folder
from diffusion.models.base import locate, read_json, vae_scale_factor
from diffusion.steps import why_not
from diffusion.teachers import compare_with_runs
from mmrl.adapters import add_lora
from mmrl.attention import describe as describe_attention
from mmrl.resolve import resolve
from mmrl.types import DTYPES
from mmrl.weights import trainable

CLIP_TOKENS = 77
HIDDEN_TENSORS = 34
"""Hidden-sized tensors that one block keeps for its backward pass, counted generously: 17 by
Korthikanti et al. 2022, arXiv:2205.05198, doubled for adaptive norms and adapters."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """``total`` parameters without adapters, ``trained`` ones, ``latents`` [C, h, w], and the
    ``network`` on the meta device.
    """

    total: int
    trained: int
    latents: tuple[int, int, int]
    network: Any


def outline(config: Config) -> Outline:
    """Sizes of the model; ``UserError`` for a missing model or an image size that does not fit."""
    folder = locate(config.model.path, weights=False)
    family = resolve("models", config.model.family)
    network = family.meta_transformer(folder)
    total = sum(parameter.numel() for parameter in network.parameters())
    scale = vae_scale_factor(folder)
    rollout = config.rollout
    latents = family.latent_shape(network.config, scale, rollout.height, rollout.width)
    if config.model.lora is not None:
        with torch.device("meta"):
            add_lora(network, config.model.lora, family.LORA_TARGETS)
    trained = sum(parameter.numel() for parameter in trainable(network).values())
    return Outline(total=total, trained=trained, latents=latents, network=network)


def describe(config: Config) -> list[str]:
    """Lines for ``mmrl check``; ``UserError`` for adapters and teachers that cannot be used."""
    refuse_missing_weights(config)
    model, lora, rollout = config.model, config.model.lora, config.rollout
    sizes = outline(config)
    how = f"LoRA rank {lora.rank}, alpha {lora.alpha:g}" if lora else "all parameters"
    return [
        f"model: {model.family} at {model.path}, {sizes.total:,} parameters, {model.dtype}",
        f"trained: {sizes.trained:,} parameters ({how})",
        "latents: {} x {} x {}".format(*sizes.latents),
        f"rollout: {rollout.scheduler}, {rollout.num_steps} steps, guidance {rollout.guidance:g}",
        describe_attention(
            model.attention,
            lambda device: pick_attention(model.attention, device, DTYPES[model.dtype]),
        ),
        *describe_likelihood(config),
        *compare_with_runs(config),
    ]


def refuse_missing_weights(config: Config) -> None:
    """``UserError`` naming the first folder that should hold weights and does not."""
    lora = config.model.lora
    if lora is not None and lora.path is not None:
        weights_folder(Path(lora.path), LORA_FILE, f"model.lora.path = {lora.path!r}")
    for teacher in config.teachers:
        teacher_folder(teacher)


def describe_likelihood(config: Config) -> list[str]:
    """What is scored, and which steps are not, with the reasons."""
    likelihood, count = config.likelihood, config.num_decisions
    if isinstance(likelihood, FlowMatchingConfig):
        lines = [f"likelihood: {likelihood.weighting}, {count} noise levels a sample"]
        if config.rollout.guidance != 1:
            lines.append(
                f"guidance: images are drawn under {config.rollout.guidance:g}; noise levels are "
                "scored with it only where it is an input of the network"
            )
        return lines
    tables = config.step_tables(likelihood)
    noise = f"noise level {likelihood.noise_level:g} on {likelihood.steps.noise} steps"
    return [
        f"likelihood: {likelihood.kernel}, {noise}, {count} of {tables.num_steps} steps trained",
        f"never trained: {why_not(tables) or 'none'}",
    ]


def estimate_memory(config: Config) -> dict[str, float]:
    """Bytes of ``weights`` (the transformer), ``gradients_and_optimizer`` (AdamW), the float32
    ``copies_of_trained_weights``, the ``teachers`` where there are any, the ``autoencoder``, the
    ``text_encoders`` (freed before training starts), and roughly ``activations_per_decision``: of
    one row of a micro-batch.  Of one process that shares nothing with others.
    """
    sizes = outline(config)
    width = torch.empty((), dtype=DTYPES[config.model.dtype]).element_size()
    frozen = sizes.total * width if config.model.lora is not None else 0
    folder = locate(config.model.path, weights=False)
    encoders = [f"text_encoder{suffix}" for suffix in ("", "_2", "_3")]
    return {
        "weights": float(frozen + sizes.trained * 4),
        "gradients_and_optimizer": float(sizes.trained * 4 * 3),
        "copies_of_trained_weights": float(sizes.trained * 4 * _copies(config)),
        **({"teachers": float(_teachers(config, width))} if config.teachers else {}),
        "autoencoder": float(_parameters(folder, "vae") * width),
        "text_encoders": float(sum(_parameters(folder, name) for name in encoders) * width),
        "activations_per_decision": _activations(config, sizes, width),
    }


def _copies(config: Config) -> int:
    """Copies of the trained weights, at most: which terms a run needs is not known here.

    phi, the average, the reference of full fine-tuning, and the live weights while one of them
    stands in.
    """
    average = config.likelihood.evaluation_ema_decay is not None
    return 2 + average + (config.model.lora is None)


def _teachers(config: Config, width: int) -> int:
    """Bytes of frozen adapters, which are float32, and of networks, held like the student's own."""
    family, total = resolve("models", config.model.family), 0
    for folder in map(teacher_folder, config.teachers):
        if (folder / LORA_FILE).is_file():
            total += adapter_size(folder) * 4
        else:
            total += family.parameter_count(folder) * (width if config.model.lora else 4)
    return total


def _parameters(folder: Path, part: str) -> int:
    """Parameters of a frozen part, from its configuration; 0 where the pipeline has none."""
    library, name = read_json(folder, "model_index.json").get(part) or (None, None)
    if name is None:
        return 0
    source = read_json(folder, part, "config.json")
    with torch.device("meta"):
        if library == "transformers":
            import transformers

            kind = getattr(transformers, name)
            network = kind(kind.config_class.from_dict(source))
        else:
            import diffusers

            network = getattr(diffusers, name).from_config(source)
    return sum(parameter.numel() for parameter in network.parameters())


def _activations(config: Config, sizes: Outline, width: int) -> float:
    network = sizes.network
    family = resolve("models", config.model.family)
    image_tokens = family.image_tokens(network.config, sizes.latents)
    tokens = image_tokens + CLIP_TOKENS + config.model.max_sequence_length
    layers = network.config.num_layers + network.config.get("num_single_layers", 0)
    # Recomputation keeps one tensor for each block, and one whole block at a time.
    recomputed = config.model.gradient_checkpointing
    held = layers + HIDDEN_TENSORS if recomputed else HIDDEN_TENSORS * layers
    # True guidance asks for every row twice.
    guided = config.likelihood.name == "transition" and config.rollout.guidance > 1
    doubled = 1 + (guided and not network.config.get("guidance_embeds", False))
    return float(doubled * tokens * network.inner_dim * held * width)
