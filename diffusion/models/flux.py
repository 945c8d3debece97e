"""FLUX.1: the guidance-distilled dev and the few-step schnell, on packed latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusion.models._packed import PATCH, PackedFamily, pack, unpack
from diffusion.models.base import ATTENTION_PROJECTIONS, Condition

PAPER = "Black Forest Labs et al. 2025, arXiv:2506.15742"
LICENCE = "FLUX.1 [dev] Non-Commercial License; Apache-2.0 for FLUX.1 [schnell]"

LORA_TARGETS = ATTENTION_PROJECTIONS
DISPATCHED = {"xformers": "xformers", "flash": "_native_flash"}
"""Names of our attention kernels in diffusers' dispatcher."""


class Flux(PackedFamily):
    """The parts of a ``FluxPipeline`` that training uses."""

    PIPELINE = "FluxPipeline"
    TRANSFORMER = "FluxTransformer2DModel"

    @property
    def embeds_guidance(self) -> bool:
        """True for dev: it is distilled to take the guidance as an input."""
        return bool(self.transformer.config.guidance_embeds)

    def use_attention(self, name: str, network: Any) -> None:
        """As for every family, through diffusers' dispatcher."""
        if name != "sdpa":  # diffusers' own choice already
            network.set_attention_backend(DISPATCHED[name])

    def encode_batch(self, prompts: list[str], max_sequence_length: int) -> Condition:
        """Token embeddings of T5 and the pooled one of CLIP.

        T5's padding stays, unmasked: FLUX was trained to read it, so its results do depend on
        ``max_sequence_length``.
        """
        text, pooled, _ = self._pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=max_sequence_length
        )
        return Condition(text=text, pooled=pooled)

    def velocity(
        self,
        network: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        condition: Condition,
        guidance: float,
    ) -> Tensor:
        """See ``Family.velocity``; the network's time is sigma, which it multiplies by 1000.

        In half precision it rounds the time to that precision first, as in the pipeline.
        """
        height, width = latents.shape[-2:]
        out = network(
            hidden_states=pack(latents),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance) if self.embeds_guidance else None,
            encoder_hidden_states=condition.text,
            pooled_projections=condition.pooled,
            txt_ids=torch.zeros(condition.text.shape[1], 3, device=latents.device),
            img_ids=image_positions(height // PATCH, width // PATCH).to(latents.device),
            return_dict=False,
        )
        return unpack(out[0].float(), height, width)


def image_positions(rows: int, columns: int) -> Tensor:
    """[rows columns, 3]: (0, row, column) of each token, for the rotary embedding."""
    return torch.cartesian_prod(*map(torch.arange, (1, rows, columns))).float()


load = Flux
latent_shape, image_tokens = Flux.latent_shape_of, Flux.image_tokens
meta_transformer, parameter_count = Flux.meta_transformer, Flux.parameter_count
save_lora = Flux.save_lora
