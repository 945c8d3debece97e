"""Contracts with diffusers: plain pipelines draw what we draw; sizes, estimates and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_sd3 import PROMPTS, make_config, make_requests

from diffusion.backend import build, describe, estimate_memory
from diffusion.estimate import outline
from diffusion.models import sd3
from diffusion.models.base import locate
from diffusion.noise import normal
from mmrl.errors import UserError
from mmrl.noise import NoiseKey
from mmrl.weights import trainable

CPU = torch.device("cpu")


def plain_pipeline(folder, **parts):
    from diffusers import StableDiffusion3Pipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(folder), **absent, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, output_type="pil", guidance=1.0, num_steps=4):
    """What a user would write, with the noise of our first request."""
    keys = [NoiseKey(seed=7, stream=0, prompt_id=PROMPTS[0].id, sample=i) for i in range(2)]
    return pipeline(
        [PROMPTS[0].text] * 2,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        height=16,
        width=16,
        max_sequence_length=8,
        latents=normal(keys, "initial", (4, 8, 8)),
        output_type=output_type,
    ).images


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def randomise(backend):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(backend.model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_plain_pipeline_draws_our_rollout(make, pipeline_folder, guidance):
    backend = make(rollout={"guidance": guidance})
    group = next(backend.rollout(make_requests(count=1)))
    pipeline = plain_pipeline(pipeline_folder)
    theirs = draw(pipeline, "latent", guidance)
    # The scheduler rounds each float32 sigma its own way: a few units in the last place.
    torch.testing.assert_close(group.payload.x0, theirs, rtol=0, atol=2e-5)
    difference = pixels(group.outputs) - pixels(draw(pipeline, guidance=guidance))
    assert abs(difference).max() <= 1


@pytest.mark.parametrize("alpha", [4, 10.0])
def test_an_exported_adapter_draws_the_same_in_a_plain_pipeline(
    make, pipeline_folder, tmp_path, alpha
):
    backend = make(lora={"rank": 4, "alpha": alpha})
    base = next(backend.rollout(make_requests(count=1)))
    randomise(backend)
    group = next(backend.rollout(make_requests(count=1)))
    assert (group.payload.x0 - base.payload.x0).abs().max() > 0.05
    backend.export(tmp_path / "out", "the card")
    assert (tmp_path / "out" / "README.md").read_text() == "the card"
    pipeline = plain_pipeline(pipeline_folder)
    pipeline.load_lora_weights(str(tmp_path / "out"))
    torch.testing.assert_close(draw(pipeline, "latent"), group.payload.x0, rtol=0, atol=2e-5)
    assert abs(pixels(group.outputs) - pixels(draw(pipeline))).max() <= 1


def test_an_exported_full_model_draws_the_same_in_a_plain_pipeline(make, pipeline_folder, tmp_path):
    from diffusers import SD3Transformer2DModel

    backend = make(lora=None)
    randomise(backend)
    group = next(backend.rollout(make_requests(count=1)))
    backend.export(tmp_path, "the card")
    transformer = SD3Transformer2DModel.from_pretrained(str(tmp_path / "transformer"))
    pipeline = plain_pipeline(pipeline_folder, transformer=transformer)
    torch.testing.assert_close(draw(pipeline, "latent"), group.payload.x0, rtol=0, atol=2e-5)


def test_the_average_can_be_exported(make, pipeline_folder, tmp_path):
    from safetensors.torch import load_file

    backend = make(likelihood={"evaluation_ema_decay": 0.9})
    backend.auxiliary_state()
    randomise(backend)
    with backend.averaged():
        backend.export(tmp_path, "")
    exported = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(not value.any() for name, value in exported.items() if "lora_B" in name)


def test_sizes_are_known_without_weights(make, pipeline_folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    built = {"lora": make(), "full": make(lora=None)}
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("diffusion.models.sd3.SD3.__init__", refuse)
    config = make_config(pipeline_folder)
    sizes = outline(config)
    count = sum(parameter.numel() for parameter in built["full"].model.parameters())
    assert sizes.total == sd3.parameter_count(pipeline_folder) == count
    assert sizes.trained == sum(p.numel() for p in trainable(built["lora"].model).values())
    assert sizes.latents == (4, 8, 8)
    assert any(f"{count:,} parameters" in line for line in describe(config))
    assert "all parameters" in "".join(describe(make_config(pipeline_folder, lora=None)))


def test_memory_estimate(pipeline_folder):
    def estimate(**model):
        return estimate_memory(make_config(pipeline_folder, **model))

    lora, full, half = estimate(), estimate(lora=None), estimate(dtype="bf16")
    sizes = outline(make_config(pipeline_folder))
    assert lora["weights"] == 4 * (sizes.total + sizes.trained)
    assert half["weights"] == 2 * sizes.total + 4 * sizes.trained
    assert full["weights"] == 4 * sizes.total
    assert full["gradients_and_optimizer"] == 12 * sizes.total
    assert half["activations_per_decision"] == lora["activations_per_decision"] / 2
    recomputed = estimate(gradient_checkpointing=True)["activations_per_decision"]
    assert recomputed < lora["activations_per_decision"]


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"height": 18}, r"rollout.height = 18 does not fit.*multiples of 4 up to 64"),
        ({"width": 128}, r"rollout.width = 128 does not fit.*up to 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, pipeline_folder, rollout, message):
    with pytest.raises(UserError, match=message):
        make(rollout=rollout)
    with pytest.raises(UserError, match=message):
        describe(make_config(pipeline_folder, rollout))


def test_default_size_is_the_pipelines(make):
    backend = make(rollout={"height": None, "width": 32})
    group = next(backend.rollout(make_requests(group_size=1, count=1)))
    assert group.outputs[0].size == (32, 16)


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "tests/no-such-model"])
def test_a_missing_model_is_named(pipeline_folder, path):
    config = make_config(pipeline_folder, path=path)
    for ask in (describe, lambda c: build(c, device=CPU, prompts=[], seed=0, needs=frozenset())):
        with pytest.raises(UserError, match=rf"model.path = '{path}' does not exist"):
            ask(config)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model_index\.json"):
        locate(str(tmp_path), weights=True)


def test_a_broken_pipeline_is_named(tmp_path, pipeline_folder):
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"transformer/config\.json"):
        sd3.parameter_count(tmp_path)
    with pytest.raises(UserError, match="cannot load a pipeline from"):
        sd3.load(tmp_path, torch.float32, torch.float32, CPU)


def test_a_hub_that_cannot_be_reached_is_reported(monkeypatch):
    def offline(name, allow_patterns):
        assert ("*/*.safetensors" in allow_patterns) == (name == "some/weights")
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for name in ("some/weights", "some/check"):
        with pytest.raises(UserError, match=rf"'{name}' is no local folder.*no network"):
            locate(name, weights=name == "some/weights")


def test_unknown_adapter_targets_are_named(make):
    with pytest.raises(UserError, match=r"target_modules = \['attn.to_x'\]"):
        make(lora={"rank": 2, "target_modules": ["attn.to_x"]})


def test_unknown_families_are_named(make):
    with pytest.raises(UserError, match=r"'sd4' among models: did you mean 'sd3'"):
        make(family="sd4")
