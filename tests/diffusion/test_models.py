"""Contracts of the model families: each draws what its plain diffusers pipeline draws."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_flux
import tiny_qwen_image
import tiny_sd3
import torch
from tiny_sd3 import ALL_TERMS, make_batch, make_config

from diffusion.attention import KERNELS
from diffusion.backend import build, describe, estimate_memory
from diffusion.estimate import outline
from diffusion.models._packed import pack, unpack
from diffusion.models.base import (
    Condition,
    Family,
    dynamic_shift,
    read_json,
    scheduler_shift,
    vae_scale_factor,
)
from diffusion.models.flux import Flux, image_positions
from diffusion.models.qwen_image import QwenImage
from diffusion.noise import normal
from diffusion.schedule import sigma_grid
from mmrl.config import load
from mmrl.errors import UserError
from mmrl.noise import NoiseKey
from mmrl.objectives import grpo
from mmrl.resolve import resolve
from mmrl.types import Prompt, RolloutRequest
from mmrl.weights import trainable

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
STEPS = 4
SHAPE = (4, 8, 8)
PROMPTS = [
    Prompt(id="short", text="cat"),
    Prompt(id="long", text='a sign "three"'),
    Prompt(id="middle", text="red sign"),
]


@dataclass(frozen=True)
class Case:
    """``guiding``: arguments of the plain pipeline for a guidance of g; ``text``: its length."""

    family: str
    save: Any
    guiding: Any
    text: int = 16


def _embedded(guidance: float) -> dict[str, Any]:
    return {"guidance_scale": guidance}


def _true(guidance: float, empty: str = "") -> dict[str, Any]:
    return {"true_cfg_scale": guidance, "negative_prompt": empty} if guidance > 1 else {}


CASES = {
    "sd3": Case("sd3", tiny_sd3.save_pipeline, _embedded),
    "flux-dev": Case("flux", tiny_flux.save_pipeline, _embedded),
    "flux-schnell": Case("flux", lambda f: tiny_flux.save_pipeline(f, False), _true),
    "qwen-image": Case("qwen_image", tiny_qwen_image.save_pipeline, lambda g: _true(g, " "), 64),
}
PACKED = ["flux-dev", "flux-schnell", "qwen-image"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder for each case, written on first use."""
    written = {}

    def folder(name):
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            CASES[name].save(written[name])
        return written[name]

    return folder


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture
def make(folders):
    """``make(name, rollout, **model keys)``: a backend on the pipeline's own noise levels."""

    def make(name, rollout=None, likelihood=None, **model):
        return build(
            config_of(name, folders(name), rollout, likelihood, **model),
            device=CPU,
            prompts=PROMPTS,
            seed=0,
            needs=ALL_TERMS,
        )

    return make


def config_of(name, folder, rollout=None, likelihood=None, **model):
    defaults = {"family": CASES[name].family, "max_sequence_length": CASES[name].text}
    settings = {"num_steps": STEPS} | pipeline_grid(name, folder)
    return make_config(folder, settings | (rollout or {}), likelihood, **(defaults | model))


def pipeline_grid(name, folder):
    """Settings for the noise levels that the plain pipeline visits at 16 pixels."""
    if name == "sd3":
        return {"grid": "diffusers_default", "shift": 3.0}
    scheduler = read_json(folder, "scheduler", "scheduler_config.json")
    shift = scheduler_shift(scheduler, 16)
    return {
        "grid": "linspace_shifted",
        "shift": scheduler["shift"] if shift is None else shift,
        "shift_terminal": scheduler["shift_terminal"],
    }


def requests_for(*prompts, group_size=2):
    return [
        RolloutRequest(prompt=prompt, group_size=group_size, seed=7, stream=0, index=i)
        for i, prompt in enumerate(prompts)
    ]


def keys_for(prompt):
    return [NoiseKey(seed=7, stream=0, prompt_id=prompt.id, sample=i) for i in range(2)]


def plain_pipeline(folder, name):
    import diffusers

    kind = getattr(diffusers, resolve("models", CASES[name].family).load.PIPELINE)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipeline = kind.from_pretrained(str(folder), **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, name, guidance=1.0, output_type="latent"):
    """What a user would write, with the noise of our request for the first prompt."""
    latents = normal(keys_for(PROMPTS[0]), "initial", SHAPE)
    if name != "sd3":
        latents = pipeline._pack_latents(latents, 2, *SHAPE)
    images = pipeline(
        [PROMPTS[0].text] * 2,
        num_inference_steps=STEPS,
        height=16,
        width=16,
        max_sequence_length=CASES[name].text,
        latents=latents,
        output_type=output_type,
        **CASES[name].guiding(guidance),
    ).images
    if output_type == "latent" and name != "sd3":
        return pipeline._unpack_latents(images, 16, 16, 2).view(2, *SHAPE)
    return images


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


# Plain pipelines


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_plain_pipeline_draws_our_rollout(make, folders, name, guidance):
    backend = make(name, {"guidance": guidance})
    group = next(backend.rollout(requests_for(PROMPTS[0])))
    pipeline = plain_pipeline(folders(name), name)
    theirs = draw(pipeline, name, guidance)
    # Pipelines round the time to float32 after multiplying it by 1000; we do not.
    torch.testing.assert_close(group.payload.x0, theirs, rtol=0, atol=2e-5)
    difference = pixels(group.outputs) - pixels(draw(pipeline, name, guidance, "pil"))
    assert abs(difference).max() <= 1
    assert group.payload.x0.shape == (2, *SHAPE)


def test_guidance_makes_a_difference(make, name):
    plain, guided = (make(name, {"guidance": g}).rollout(requests_for(PROMPTS[0])) for g in (1, 4))
    assert (next(plain).payload.x0 - next(guided).payload.x0).abs().max() > 0.01


def test_the_prompt_and_the_time_make_a_difference(make, name):
    """Without which none of the comparisons here would say much."""
    backend = make(name)
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def velocity(prompt, sigma):
        condition = backend._condition([prompt])
        times = torch.tensor([sigma])
        return backend._family.velocity(backend.model, latents, times, condition, 1.0)

    for other in (velocity("long", 0.6), velocity("short", 0.5)):
        assert (other - velocity("short", 0.6)).abs().max() > 0.05


def test_only_distilled_models_embed_their_guidance(make, name):
    backend = make(name)
    family, condition = backend._family, backend._condition(["long"])
    latents, sigma = torch.randn(1, *SHAPE), torch.tensor([0.6])
    with torch.no_grad():
        one, other = (family.velocity(backend.model, latents, sigma, condition, g) for g in (1, 4))
    assert family.embeds_guidance == (name == "flux-dev")
    assert torch.equal(one, other) == (name != "flux-dev")


def test_the_adapter_trains_and_draws_the_same_in_a_plain_pipeline(
    make, folders, name, tmp_path, monkeypatch
):
    backend = make(name, lora={"rank": 4, "alpha": 10})
    before = next(backend.rollout(requests_for(PROMPTS[0])))
    parameters = trainable(backend.model)
    optimizer = torch.optim.SGD(parameters.values(), lr=10.0)
    batch = make_batch(backend, [before], [1.0, -0.5])
    for _ in range(2):  # the first step moves B alone, as A has no gradient where B is 0
        optimizer.zero_grad()
        terms = backend.evaluate(batch, frozenset({"logp"}))
        grpo.loss(terms, batch, grpo.Config(clip_low=1.0, clip_high=1.0)).loss.mean().backward()
        # DistributedDataParallel stops at a parameter that has none.
        assert [key for key, value in parameters.items() if value.grad is None] == []
        optimizer.step()
    group = next(backend.rollout(requests_for(PROMPTS[0])))
    assert (group.payload.x0 - before.payload.x0).abs().max() > 1e-2
    backend.export(tmp_path / "out", "the card")
    pipeline = plain_pipeline(folders(name), name)
    pipeline.load_lora_weights(str(tmp_path / "out"))
    torch.testing.assert_close(draw(pipeline, name), group.payload.x0, rtol=0, atol=2e-5)
    assert abs(pixels(group.outputs) - pixels(draw(pipeline, name, 1.0, "pil"))).max() <= 1


# Rollout and replay


def test_replay_gives_ratio_one(make, name):
    backend = make(name)
    groups = list(backend.rollout(requests_for(*PROMPTS)))
    batch = make_batch(backend, groups, [0.5, -1.0, 0.25, 0.75, -0.5, 1.0])
    with torch.no_grad():
        old = backend.evaluate(batch, ALL_TERMS).logp
    batch = replace(batch, logp_old=old)
    terms = backend.evaluate(batch, ALL_TERMS)
    assert torch.equal(terms.logp.detach(), old)
    loss = grpo.loss(terms, batch, grpo.Config(clip_low=1e-4, clip_high=1e-4)).loss
    assert torch.equal(loss, -batch.advantages[:, None].expand_as(loss))


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_transitions_are_scored_again_as_they_were_drawn(make, name, guidance):
    """Prompts of three lengths; one decision at a time, so that forwards have the same shape."""
    likelihood = {"name": "transition", "kernel": "flow_sde", "noise_level": 0.7}
    backend = make(name, {"guidance": guidance}, likelihood)
    groups = list(backend.rollout(requests_for(*PROMPTS)))
    rows = [(group, index) for group in groups for index in range(2)]
    known = torch.cat([group.logp_old for group in groups])
    for decision in range(known.shape[1]):
        payload, mask = backend.collate(rows, slice(decision, decision + 1))
        batch = replace(make_batch(backend, groups), payload=payload, mask=mask)
        logp = backend.evaluate(batch, frozenset({"logp"})).logp
        assert torch.equal(logp[:, 0], known[:, decision])
    # All at once, sums are taken in another order.
    together = backend.evaluate(make_batch(backend, groups), frozenset({"logp"})).logp
    torch.testing.assert_close(together, known, rtol=0, atol=2e-5)


def test_rows_do_not_depend_on_their_neighbours(make, name):
    """Prompts of three lengths in one batch, in the rollout and in the update."""
    small, large = (make(name, {"batch_size": size}) for size in (2, 6))
    together = list(large.rollout(requests_for(*PROMPTS)))
    for group, alone in zip(together, small.rollout(requests_for(*PROMPTS)), strict=True):
        # Other shapes, other order of float32 sums; the steps add up.
        torch.testing.assert_close(group.payload.x0, alone.payload.x0, rtol=0, atol=1e-5)
    whole = large.evaluate(make_batch(large, together), ALL_TERMS).logp
    for row, group in enumerate(together):
        part = large.evaluate(make_batch(large, [group]), ALL_TERMS).logp
        torch.testing.assert_close(part, whole[2 * row : 2 * row + 2], rtol=1e-5, atol=1e-6)


def test_padding_of_qwen_prompts_would_change_results_without_the_mask(make):
    backend = make("qwen-image")
    both = backend._condition(["short", "long"])
    assert both.mask is not None
    assert both.mask.sum(1).diff().item() == len(PROMPTS[1].text) - len(PROMPTS[0].text)
    latents, sigma = torch.randn(2, *SHAPE), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        masked, unmasked = (
            backend._family.velocity(backend.model, latents, sigma, condition, 1.0)
            for condition in (both, replace(both, mask=None))
        )
    assert (masked[0] - unmasked[0]).abs().max() > 1e-3


def test_recomputed_blocks_give_the_same_gradient(make, name):
    found = []
    for recompute in (False, True):
        backend = make(name, gradient_checkpointing=recompute, lora=None)
        groups = list(backend.rollout(requests_for(*PROMPTS[:2])))
        backend.evaluate(make_batch(backend, groups), ALL_TERMS).logp.mean().backward()
        grads = [p.grad for p in trainable(backend.model).values() if p.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_half_precision_is_close(make, name):
    whole, half = make(name), make(name, dtype="bf16")
    assert half._family.transformer.dtype == half._family._vae.dtype == torch.bfloat16
    group = next(whole.rollout(requests_for(PROMPTS[1])))
    found, expected = (
        backend.evaluate(make_batch(backend, [group]), ALL_TERMS).logp for backend in (half, whole)
    )
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    image = next(half.rollout(requests_for(PROMPTS[1]))).outputs[0]
    assert image.size == (16, 16)


# Text


def test_conditions_of_different_lengths_are_stacked_with_a_mask():
    rows = [Condition(text=torch.full((1, n, 2), float(n))) for n in (1, 3)]
    both = Condition.stack(rows, CPU)
    assert both.text[:, :, 0].tolist() == [[1, 0, 0], [3, 3, 3]]
    assert both.mask is not None
    assert both.mask.tolist() == [[True, False, False], [True] * 3]
    assert both.pooled is None
    nested = Condition.stack([rows[1], both], CPU).repeat(2)
    assert nested.mask is not None
    assert nested.mask.sum(1).tolist() == [3, 1, 3] * 2
    assert [row.text.shape[1] for row in nested.rows()] == [3, 1, 3] * 2
    assert Condition.stack(rows[:1] * 2, CPU).mask is None


def test_pooled_embeddings_travel_with_their_rows():
    rows = [Condition(text=torch.ones(1, 2, 2), pooled=torch.full((1, 3), n)) for n in (1.0, 2.0)]
    both = Condition.stack(rows, CPU).repeat(2)
    assert both.mask is None
    assert both.pooled is not None
    assert both.pooled[:, 0].tolist() == [1, 2, 1, 2]
    assert [float(row.pooled[0, 0]) for row in both.rows() if row.pooled is not None] == [1, 2] * 2


def test_a_prompt_is_encoded_as_alone(folders, name):
    family = family_of(name, folders)
    texts = [prompt.text for prompt in PROMPTS] + [""]
    together = family.encode(texts, CASES[name].text)
    for text, row in zip(texts, together, strict=True):
        (alone,) = family.encode([text], CASES[name].text)
        torch.testing.assert_close(row.text, alone.text, rtol=1e-5, atol=1e-5)
        assert (row.pooled is None) == (name == "qwen-image")
        assert row.mask is None
        assert row.text.device == CPU
        assert row.text.untyped_storage().nbytes() == row.text.nbytes  # no view of the whole batch


def test_encoders_are_released(make, name):
    parts = make(name)._family._pipeline.components
    encoders = [part for part in parts if part.startswith("text_encoder")]
    assert len(encoders) == {"sd3": 3, "qwen-image": 1}.get(name, 2)
    assert all(parts[encoder] is None for encoder in encoders)


def test_the_instruction_of_qwen_is_cut_off(folders):
    pipeline = plain_pipeline(folders("qwen-image"), "qwen-image")
    before, after = pipeline.prompt_template_encode.split("{}")
    assert len(pipeline.tokenizer(before).input_ids) == tiny_qwen_image.TEMPLATE_TOKENS
    (row,) = family_of("qwen-image", folders).encode(["cat"], 64)
    assert row.text.shape[1] == 3 + len(pipeline.tokenizer(after).input_ids)


def family_of(name, folders):
    module = resolve("models", CASES[name].family)
    return module.load(folders(name), torch.float32, torch.float32, CPU)


# Sizes and shifts


def test_sizes_are_known_without_weights(make, folders, name, monkeypatch):
    backend = make(name)
    config = config_of(name, folders(name))
    monkeypatch.setattr(Family, "__init__", lambda *_: pytest.fail("weights were loaded"))
    module, sizes = resolve("models", config.model.family), outline(config)
    count = sum(parameter.numel() for parameter in backend.model.parameters())
    assert module.parameter_count(folders(name)) + sizes.trained == count
    assert sizes.total == module.parameter_count(folders(name))
    assert sizes.trained == sum(p.numel() for p in trainable(backend.model).values())
    assert sizes.latents == SHAPE
    assert module.image_tokens(sizes.network.config, SHAPE) == 16
    assert vae_scale_factor(folders(name)) == 2
    assert any(f"{sizes.total:,} parameters" in line for line in describe(config))
    assert all(value > 0 for value in estimate_memory(config).values())


@pytest.mark.parametrize("size", ["height", "width"])
def test_sizes_that_do_not_fit_are_refused(make, folders, name, size):
    message = rf"rollout.{size} = 18 does not fit this model; allowed: multiples of 4"
    with pytest.raises(UserError, match=message):
        make(name, {size: 18})
    with pytest.raises(UserError, match=message):
        describe(config_of(name, folders(name), {size: 18}))


def test_sizes_need_not_be_square(make, name):
    group = next(make(name, {"height": 12, "width": 20}).rollout(requests_for(PROMPTS[0])))
    assert group.payload.x0.shape == (2, 4, 6, 10)
    assert group.outputs[0].size == (20, 12)


def test_default_size_is_the_pipelines(folders, name):
    family = family_of(name, folders)
    side = 8 if name == "sd3" else family._pipeline.default_sample_size
    assert family.latent_shape(None, 12) == (4, side, 6)


@pytest.mark.parametrize(
    ("family", "settings", "parameters"),
    [
        ("flux", {"guidance_embeds": True}, 11_901_408_320),  # dev
        ("flux", {}, 11_891_178_560),  # schnell
        ("qwen_image", {}, 20_430_401_088),
    ],
)
def test_published_sizes(tmp_path, family, settings, parameters):
    """diffusers' defaults are the released transformers; 512 pixels are 1024 tokens."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(settings))
    module = resolve("models", family)
    network = module.meta_transformer(tmp_path)
    assert sum(p.numel() for p in network.parameters()) == parameters
    shape = module.latent_shape(network.config, 8, 512, 512)
    assert shape == (16, 64, 64)
    assert module.image_tokens(network.config, shape) == 1024


def test_flux_recipe_is_on_the_pipelines_grid():
    config = load(ROOT / "configs" / "diffusion" / "flux" / "awm-ocr.yaml")
    rollout = config.dump()["backend"]["rollout"]
    assert (rollout["height"], rollout["width"], rollout["grid"]) == (512, 512, "linspace_shifted")
    assert rollout["shift"] == pytest.approx(dynamic_shift(1024), rel=1e-6)


def test_schnell_recipe_runs_on_its_kind_of_model(folders):
    """No input for guidance, four steps of which three are trained, and a replay that agrees."""
    recipe = ROOT / "configs" / "diffusion" / "flux" / "flow-grpo-schnell-ocr.yaml"
    small = ["model.dtype=fp32", "model.max_sequence_length=16", "rollout.height=16"]
    small += [f"model.path={folders('flux-schnell')}", "rollout.width=16"]
    config: Any = load(recipe, [f"backend.{override}" for override in small]).backend.config
    needs = frozenset({"logp"})
    backend = build(config, device=CPU, prompts=PROMPTS, seed=0, needs=needs)
    assert [line for line in backend.notes if line.startswith("rollout.")] == []
    group = next(backend.rollout(requests_for(PROMPTS[0])))
    assert group.logp_old is not None
    assert group.logp_old.shape == (2, 3)
    logp = backend.evaluate(make_batch(backend, [group]), needs).logp
    torch.testing.assert_close(logp, group.logp_old, rtol=0, atol=1e-6)
    logp.mean().backward()
    assert all(p.grad is not None for p in trainable(backend.model).values())


def test_published_flux_grid():
    """512 pixels, 1024 tokens, 6 steps."""
    shift = dynamic_shift(1024)
    assert np.log(shift) == pytest.approx(0.63)
    published = [1, 0.90374, 0.78970, 0.65249, 0.48422, 0.27300, 0]
    assert sigma_grid("linspace_shifted", 6, shift).tolist() == pytest.approx(published, abs=6e-6)
    assert dynamic_shift(256) == pytest.approx(np.exp(0.5))
    assert dynamic_shift(4096) == pytest.approx(np.exp(1.15))


@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("num_steps", [2, 6, 28])
def test_dynamic_grids_are_diffusers(num_steps, kind, terminal):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal, max_shift=0.9
    )
    mu = calculate_shift(1024, max_shift=0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
    shift = scheduler_shift(scheduler.config, 1024)
    assert shift is not None
    found = sigma_grid("linspace_shifted", num_steps, shift, scheduler.config.shift_terminal)
    torch.testing.assert_close(found, scheduler.sigmas, rtol=0, atol=3e-7)


def test_notes_name_what_the_pipeline_would_do_otherwise(make, name):
    is_dynamic = name in ("flux-dev", "qwen-image")
    terminal = 0.02 if name == "qwen-image" else None

    def notes(**rollout):
        return [line for line in make(name, rollout).notes if line.startswith("rollout.")]

    assert notes() == []
    assert [line.partition(":")[0] for line in notes(shift=5.0)] == ["rollout.shift"] * is_dynamic
    other = notes(shift_terminal=None if terminal else 0.1)
    ours, own = ("null", "0.02") if terminal else ("0.1", "null")
    assert other == [f"rollout.shift_terminal: {ours}; the pipeline's own is {own}"]


def test_the_shift_follows_the_scheduler(folders, name):
    family = family_of(name, folders)
    small, large = family.shift(16, 16), family.shift(32, 64)
    assert family.shift_terminal == (0.02 if name == "qwen-image" else None)
    family._pipeline.scheduler.register_to_config(shift_terminal=False)
    assert family.shift_terminal is None
    if name in ("sd3", "flux-schnell"):
        assert small is large is None
        return
    shifts = {"flux-dev": (4096, 1.15), "qwen-image": (8192, 0.9)}[name]
    assert small == pytest.approx(dynamic_shift(16, 256, shifts[0], 0.5, shifts[1]))
    assert large == pytest.approx(dynamic_shift(128, 256, shifts[0], 0.5, shifts[1]))


# Packing, guidance, attention


@pytest.mark.parametrize("kind", ["FluxPipeline", "QwenImagePipeline"])
def test_packing_is_the_pipelines(kind):
    import diffusers

    pipeline = getattr(diffusers, kind)
    latents = torch.randn(2, 3, 4, 6)
    packed = pack(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(packed, 4, 6), latents)
    assert torch.equal(pipeline._unpack_latents(packed, 32, 48, 8).view(2, 3, 4, 6), latents)


def test_positions_of_tokens_are_the_pipelines():
    from diffusers import FluxPipeline

    theirs = FluxPipeline._prepare_latent_image_ids(1, 2, 3, CPU, torch.float32)
    assert torch.equal(image_positions(2, 3), theirs)


def test_guidance_extrapolates():
    without, prompted = torch.randn(2, 1, *SHAPE).double()
    plain = Family.guide(object.__new__(Flux), without, prompted, 3.0)
    torch.testing.assert_close(plain, 3 * prompted - 2 * without)


def test_qwen_guidance_keeps_the_norm_of_each_token():
    without, prompted = torch.randn(2, 2, *SHAPE).double()
    family = object.__new__(QwenImage)
    guided, plain = family.guide(without, prompted, 3.0), 3 * prompted - 2 * without
    for b in range(2):
        for i in range(0, 8, 2):
            for j in range(0, 8, 2):
                square = (b, slice(None), slice(i, i + 2), slice(j, j + 2))
                expected = plain[square] * prompted[square].norm() / plain[square].norm()
                torch.testing.assert_close(guided[square], expected)


def test_flux_attention_kernels_are_diffusers():
    from diffusers.models.attention_dispatch import AttentionBackendName

    chosen = []
    family = object.__new__(Flux)
    network = SimpleNamespace(set_attention_backend=chosen.append)
    for kernel in KERNELS:
        family.use_attention(kernel, network)
    assert chosen == ["xformers", "_native_flash"]
    assert all(AttentionBackendName(kernel) for kernel in chosen)


def test_flux_kernels_are_given_one_dtype(make, monkeypatch):
    """Unlike PyTorch's own, the other kernels refuse a mixture, which autocast could make."""
    from diffusers.models.transformers import transformer_flux

    backend = make("flux-dev", dtype="bf16")
    seen, dispatch = set(), transformer_flux.dispatch_attention_fn

    def record(query, key, value, **rest):
        seen.add((query.dtype, key.dtype, value.dtype))
        return dispatch(query, key, value, **rest)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", record)
    next(backend.rollout(requests_for(PROMPTS[0])))
    assert seen == {(torch.bfloat16,) * 3}


def test_qwen_refuses_kernels_that_cannot_mask():
    family = object.__new__(QwenImage)
    family.use_attention("sdpa", None)
    for kernel in ("xformers", "flash"):
        with pytest.raises(UserError, match=rf"'{kernel}' cannot mask.*allowed: 'sdpa'"):
            family.use_attention(kernel, None)
