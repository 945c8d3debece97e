"""Qwen-Image: a large joint transformer on packed video latents, prompted by Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusion.models._packed import PATCH, PackedFamily, pack, unpack
from diffusion.models.base import ATTENTION_PROJECTIONS, Condition
from mmrl.errors import UserError

PAPER = "Wu et al. 2025, arXiv:2508.02324"
LICENCE = "Apache-2.0 (the released weights)"

# The last block's text output is thrown away, and a trained parameter that never gets a gradient
# stops DistributedDataParallel.
LORA_TARGETS = tuple(name for name in ATTENTION_PROJECTIONS if name != "attn.to_add_out")
EMPTY_PROMPT = " "


class QwenImage(PackedFamily):
    """The parts of a ``QwenImagePipeline`` that training uses."""

    PIPELINE = "QwenImagePipeline"
    TRANSFORMER = "QwenImageTransformer2DModel"
    GUIDANCE_ARGUMENT = "true_cfg_scale"

    def use_attention(self, name: str, network: Any) -> None:
        """``UserError`` for all but ``sdpa``.

        Padded prompts need a mask, which flash kernels lack; diffusers hands xformers the mask as
        numbers to be added (1 for a token, 0 for padding), which hides nothing.
        """
        if name != "sdpa":
            raise UserError(
                f"model.attention: {name!r} cannot mask the padding of prompts of different "
                "lengths, which this family needs; allowed: 'sdpa'"
            )

    def encode_batch(self, prompts: list[str], max_sequence_length: int) -> Condition:
        """Hidden states of the vision-language model behind the pipeline's own instruction.

        An empty prompt is a space, as the pipeline's documentation asks for in guidance.
        """
        text, mask = self._pipeline.encode_prompt(
            [prompt or EMPTY_PROMPT for prompt in prompts],
            device=self.device,
            max_sequence_length=max_sequence_length,
        )
        return Condition(text=text, mask=None if mask is None else mask.bool())

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
            encoder_hidden_states=condition.text,
            encoder_hidden_states_mask=condition.mask,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(latents),
            return_dict=False,
        )
        return unpack(out[0].float(), height, width)

    def guide(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance with every token scaled back to its norm with the prompt."""
        guided = pack(super().guide(without, with_prompt, guidance))
        scale = pack(with_prompt).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * scale, *with_prompt.shape[-2:])

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] of clean latents: one frame of a video autoencoder."""
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
            for values in (self._vae.config.latents_mean, self._vae.config.latents_std)
        )
        frame = (latents * std + mean).unsqueeze(2).to(self._vae.dtype)
        return self._vae.decode(frame, return_dict=False)[0][:, :, 0]


load = QwenImage
latent_shape, image_tokens = QwenImage.latent_shape_of, QwenImage.image_tokens
meta_transformer, parameter_count = QwenImage.meta_transformer, QwenImage.parameter_count
save_lora = QwenImage.save_lora
