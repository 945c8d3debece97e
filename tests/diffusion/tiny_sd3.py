"""A random SD3 pipeline of a few thousand parameters, and requests and batches for it."""

from __future__ import annotations

import torch

from diffusion.config import Config
from mmrl.types import Prompt, RolloutRequest, UpdateBatch

ALL_TERMS = frozenset({"logp", "velocity_gap_reference", "velocity_gap_ema", "sigma"})
PROMPTS = [Prompt(id=f"id-{word}", text=f'a sign "{word}"') for word in ("one", "two", "three")]


def save_pipeline(folder):
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
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
        encoders = [_text_encoder() for _ in range(2)]
    with torch.no_grad():  # freshly initialised networks hardly look at the prompt
        transformer.context_embedder.weight.mul_(20)
        for encoder in encoders:
            encoder.text_projection.weight.mul_(3)
    tokenizer = _tokenizer()
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def _text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=190,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=77,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
        )
    ).eval()


def _tokenizer():
    from transformers import CLIPTokenizer

    symbols = [chr(code) for code in range(33, 127)]
    words = symbols + [symbol + "</w>" for symbol in symbols]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def make_config(folder, rollout=None, likelihood=None, evaluation=None, **model):
    defaults = {"path": str(folder), "dtype": "fp32", "max_sequence_length": 8}
    return Config.model_validate(
        {
            "model": defaults | {"lora": {"rank": 4, "alpha": 8}} | model,
            "rollout": {"num_steps": 4, "height": 16, "width": 16} | (rollout or {}),
            "evaluation": evaluation or {},
            "likelihood": _likelihood(likelihood or {}),
        }
    )


def _likelihood(changes):
    matching = {} if changes.get("name") == "transition" else {"num_times": 2}
    return {"evaluation_ema_decay": None} | matching | changes


def make_requests(group_size=2, count=2, stream=0):
    return [
        RolloutRequest(prompt=PROMPTS[i], group_size=group_size, seed=7, stream=stream, index=i)
        for i in range(count)
    ]


def make_batch(backend, groups, advantages=None, rows=None):
    rows = rows or [(group, i) for group in groups for i in range(len(group.outputs))]
    payload, mask = backend.collate(rows)
    values = torch.zeros(len(rows)) if advantages is None else torch.as_tensor(advantages)
    return UpdateBatch(
        payload=payload,
        mask=mask,
        advantages=values.double(),
        weights=torch.ones(len(rows), dtype=torch.float64),
    )
