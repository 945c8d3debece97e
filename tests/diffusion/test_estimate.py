"""The memory estimate against the networks that are really loaded."""

from __future__ import annotations

import pytest
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from tiny_sd3 import make_config

from diffusion.estimate import estimate_memory, outline


def parameters(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_frozen_parts_are_counted(pipeline_folder, dtype, width):
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder, **absent)
    found = estimate_memory(make_config(pipeline_folder, dtype=dtype))
    assert found["autoencoder"] == width * parameters(pipeline.vae)
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    assert found["text_encoders"] == width * parameters(*encoders)


@pytest.mark.parametrize(
    ("model", "average", "copies"),
    [({}, None, 2), ({}, 0.9, 3), ({"lora": None}, None, 3), ({"lora": None}, 0.9, 4)],
)
def test_copies_of_trained_weights_are_counted(pipeline_folder, model, average, copies):
    config = make_config(pipeline_folder, likelihood={"evaluation_ema_decay": average}, **model)
    expected = 4 * copies * outline(config).trained
    assert estimate_memory(config)["copies_of_trained_weights"] == expected
