"""A random FLUX pipeline of a few thousand parameters; ``guidance_embeds``: dev, else schnell."""

from __future__ import annotations

import torch
from tiny_sd3 import _tokenizer as clip_tokenizer

WORD_START = "\u2581"  # what T5 tokenizers put for a space


def save_pipeline(folder, guidance_embeds=True):
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.3,
            shift_factor=0.06,
        )
        clip, t5 = _clip(), _t5()
    with torch.no_grad():  # freshly initialised networks hardly look at their conditions
        transformer.context_embedder.weight.mul_(20)
        for part in transformer.time_text_embed.children():
            for parameter in part.parameters():
                parameter.mul_(3)
    FluxPipeline(
        transformer=transformer,
        scheduler=_scheduler(FlowMatchEulerDiscreteScheduler, guidance_embeds),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=_t5_tokenizer(),
    ).save_pretrained(folder)


def _scheduler(kind, dev):
    """As published: dev shifts by the size of the image, schnell not at all."""
    return kind(shift=3.0, use_dynamic_shifting=True) if dev else kind(shift=1.0)


def _clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=190,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
        )
    ).eval()


def _t5():
    from transformers import T5Config, T5EncoderModel

    size = len(_t5_tokenizer())
    return T5EncoderModel(
        T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def _t5_tokenizer():
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(symbol, -2.0) for symbol in [WORD_START, *map(chr, range(33, 127))]]
    return T5Tokenizer(vocab=special + letters, extra_ids=0)
