"""Stable Diffusion 3 and 3.5: joint text-image transformer on latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffusion.models.base import ATTENTION_PROJECTIONS, Condition, Family, pixel_sizes

PAPER = "Esser et al. 2024, arXiv:2403.03206"
LICENCE = "Stability AI Community License (the released weights)"

LORA_TARGETS = ATTENTION_PROJECTIONS


class SD3(Family):
    """The parts of a ``StableDiffusion3Pipeline`` that training uses."""

    PIPELINE = "StableDiffusion3Pipeline"
    TRANSFORMER = "SD3Transformer2DModel"

    def encode_batch(self, prompts: list[str], max_sequence_length: int) -> Condition:
        """Token embeddings of two CLIPs and T5, and the CLIPs' pooled ones."""
        text, _, pooled, _ = self._pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
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
        """See ``Family.velocity``; the network's time is 1000 sigma."""
        out = network(
            hidden_states=latents,
            timestep=1000 * sigma,
            encoder_hidden_states=condition.text,
            pooled_projections=condition.pooled,
            return_dict=False,
        )
        return out[0].float()

    @classmethod
    def latent_shape_of(
        cls, config: Any, scale: int, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """See ``Family.latent_shape_of``; the table of positions limits the size."""
        step = scale * config["patch_size"]
        default, limit = config["sample_size"] * scale, config["pos_embed_max_size"] * step
        height, width = pixel_sizes(height, width, default, step, limit)
        return config["in_channels"], height // scale, width // scale

    @classmethod
    def image_tokens(cls, config: Any, shape: tuple[int, int, int]) -> int:
        """See ``Family.image_tokens``."""
        return shape[1] * shape[2] // config["patch_size"] ** 2


load = SD3
latent_shape, image_tokens = SD3.latent_shape_of, SD3.image_tokens
meta_transformer, parameter_count = SD3.meta_transformer, SD3.parameter_count
save_lora = SD3.save_lora
