"""Stable Diffusion 3 and 3.5: joint text-image transformer on latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.models.base import Condition, read_json
from mmrl.errors import UserError

PAPER = "Esser et al. 2024, arXiv:2403.03206"
LICENCE = "Stability AI Community License (the released weights)"

LORA_TARGETS = tuple(
    "attn." + name
    for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
)
ENCODE_BATCH = 32


class SD3:
    """The parts of a ``StableDiffusion3Pipeline`` that training uses."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, transformer_dtype: torch.dtype, device: torch.device
    ) -> None:
        """Load onto ``device``; ``UserError`` if diffusers cannot read the folder."""
        from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]

        # diffusers wants to be told again about parts that the index itself says are absent.
        index = read_json(folder, "model_index.json")
        absent = {name: None for name, source in index.items() if source == [None, None]}
        try:
            dtypes = {"default": dtype, "transformer": transformer_dtype}
            pipeline = StableDiffusion3Pipeline.from_pretrained(str(folder), dtype=dtypes, **absent)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"model.path: cannot load a pipeline from {folder}: {error}") from error
        for name, part in pipeline.components.items():  # older diffusers ignored the argument
            wanted = dtypes.get(name, dtype)
            if isinstance(part, nn.Module) and part.dtype != wanted:
                part.to(wanted)
        self._pipeline: Any = pipeline.to(device)
        self.transformer: Any = pipeline.transformer
        self._vae = pipeline.vae.requires_grad_(False).eval()
        self.device = device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> list[Condition]:
        """One encoded prompt each, on the CPU."""
        encoded = []
        for start in range(0, len(prompts), ENCODE_BATCH):
            batch = list(prompts[start : start + ENCODE_BATCH])
            text, _, pooled, _ = self._pipeline.encode_prompt(
                batch,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
            rows = zip(text.cpu().split(1), pooled.cpu().split(1), strict=True)
            encoded += [Condition(text=t.clone(), pooled=p.clone()) for t, p in rows]
        return encoded

    def release_encoders(self) -> None:
        """Free the text encoders; ``encode`` does not work afterwards."""
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            setattr(self._pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """[C, h, w] of the latents of an image; ``UserError`` if the size does not fit."""
        return latent_shape(self.transformer.config, self._pipeline.vae_scale_factor, height, width)

    def velocity(
        self, network: nn.Module, latents: Tensor, sigma: Tensor, condition: Condition
    ) -> Tensor:
        """dx/dsigma at ``latents`` [B, C, h, w] and levels ``sigma`` [B], float32.

        ``network`` is the transformer, or accelerate's wrapper of it.
        """
        out = network(
            hidden_states=latents,
            timestep=1000 * sigma,
            encoder_hidden_states=condition.text,
            pooled_projections=condition.pooled,
            return_dict=False,
        )
        return out[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Any]:
        """PIL images of clean latents [B, C, h, w]."""
        vae = self._vae.config
        scaled = latents / vae.scaling_factor + vae.shift_factor
        pixels = self._vae.decode(scaled.to(self._vae.dtype), return_dict=False)[0]
        return self._pipeline.image_processor.postprocess(pixels, output_type="pil")


load = SD3


def save_lora(folder: Path, state: dict[str, Any], lora: dict[str, Any]) -> None:
    """Write ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``.

    ``lora``: the peft configuration; without it in the file the reader would take alpha = rank.
    """
    from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]

    StableDiffusion3Pipeline.save_lora_weights(
        str(folder), transformer_lora_layers=state, transformer_lora_adapter_metadata=lora
    )


def meta_transformer(folder: Path) -> Any:
    """The transformer without weights (meta device), from its configuration alone."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    with torch.device("meta"):
        return SD3Transformer2DModel.from_config(read_json(folder, "transformer", "config.json"))


def parameter_count(folder: Path) -> int:
    """Parameters of the transformer; loads no weights."""
    return sum(parameter.numel() for parameter in meta_transformer(folder).parameters())


def latent_shape(
    config: Any, scale: int, height: int | None, width: int | None
) -> tuple[int, int, int]:
    """[C, h, w] of the latents of an image of ``height`` x ``width`` pixels (null: default)."""
    sizes = {"height": height, "width": width}
    pixels = {name: size or config["sample_size"] * scale for name, size in sizes.items()}
    step = scale * config["patch_size"]
    limit = step * config["pos_embed_max_size"]
    for name, size in pixels.items():
        if size % step or size > limit:
            raise UserError(
                f"rollout.{name} = {size} does not fit this model; "
                f"allowed: multiples of {step} up to {limit}"
            )
    return config["in_channels"], pixels["height"] // scale, pixels["width"] // scale
