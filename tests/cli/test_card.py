"""The model card, and that the code in it is valid."""

from __future__ import annotations

import ast
import json

import pytest
import yaml
from synthetic_run import CONFIG

from mmrl.card import model_card, usage


def with_backend(**changes):
    return CONFIG | {"backend": CONFIG["backend"] | changes}


def call(source: str, function: str = "pipe", owner: str = "") -> dict[str | None, str]:
    """Keyword arguments of the one call of ``function``, as source text."""
    name = f"{owner}.{function}" if owner else function
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (found,) = [node for node in calls if ast.unparse(node.func) == name]
    return {k.arg: ast.unparse(k.value) for k in found.keywords}


def test_front_matter(run):
    _, front, _ = model_card(run).split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["base_model"] == "assets/tiny-sd3"
    assert data["library_name"] == "diffusers"
    assert data["license"] == "other"
    assert {"lora", "text-to-image", "mmrl"} <= set(data["tags"])


def test_a_hostile_path_stays_a_string(make_run):
    model = CONFIG["backend"]["model"] | {"path": 'a"\n---\nlicense: mit\n{x}'}
    run = make_run("hostile", config=with_backend(model=model))
    text = model_card(run)
    data = yaml.safe_load(text.split("---\n", 1)[1].rsplit("tags:", 1)[0])
    assert data == {
        "base_model": 'a"\n---\nlicense: mit\n{x}',
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "other",
    }
    ast.parse(usage(with_backend(model=model)))


def test_results_methods_and_versions(run):
    text = model_card(run)
    assert "| exact | 0.250 | 0.875 | +0.625 |" in text
    assert "* objective: `grpo` (" in text
    assert "arXiv:2402.03300" in text
    assert "8 samples a step" in text
    assert "Rewards: `reading`" in text
    assert "* torch 9.8.7" in text
    assert "c0ffee" in text


def test_how_prompts_and_samples_were_chosen_is_cited(make_run):
    prompts = {"source": "x", "sampler": {"name": "vas"}, "budget": {"name": "knapsack"}}
    text = model_card(make_run("chosen", config=CONFIG | {"prompts": prompts}))
    assert "* prompts.sampler: `vas` (" in text
    assert "arXiv:2509.21268" in text
    assert "* prompts.budget: `knapsack` (" in text


def test_a_run_without_results(make_run):
    text = model_card(make_run("bare", config={"name": "bare"}, metrics=[]))
    assert "Results" not in text
    assert "How to use" not in text
    assert "not recorded" in text


def test_usage_of_an_adapter():
    source = usage(CONFIG)
    assert "load_lora_weights" in source
    assert "torch.float32" in source
    assert call(source) == {
        "prompt": "'a prompt'",
        "num_inference_steps": "5",
        "guidance_scale": "1.0",
        "height": "32",
        "width": "64",
    }


def test_usage_of_a_whole_model():
    source = usage(with_backend(model={"path": "p", "dtype": "bf16", "lora": None}))
    ast.parse(source)
    assert "load_lora_weights" not in source
    assert 'SD3Transformer2DModel.from_pretrained("transformer"' in source


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_usage_names_the_parts_that_the_base_model_lacks(tmp_path, lora):
    parts = {
        "_class_name": "StableDiffusion3Pipeline",
        "image_encoder": [None, None],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    source = usage(with_backend(model={"path": str(tmp_path), "lora": lora}))
    assert call(source, "from_pretrained", "StableDiffusion3Pipeline").keys() >= {
        "text_encoder_3",
        "tokenizer_3",
    }
    assert "text_encoder=None" not in source
    assert "image_encoder" not in source


@pytest.mark.parametrize(
    ("family", "pipeline", "guidance"),
    [
        ("sd3", "StableDiffusion3Pipeline", {"guidance_scale": "4.0"}),
        ("flux", "FluxPipeline", {"guidance_scale": "4.0"}),
        ("qwen_image", "QwenImagePipeline", {"true_cfg_scale": "4.0", "negative_prompt": "''"}),
    ],
)
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_usage_names_the_pipeline_of_the_family(family, pipeline, guidance, lora):
    import inspect

    import diffusers

    model = {"path": "p", "family": family, "lora": lora}
    source = usage(with_backend(model=model, rollout={"guidance": 4.0}))
    assert call(source) == {"prompt": "'a prompt'"} | guidance
    assert call(source, "from_pretrained", pipeline).keys() >= {"dtype"}
    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    assert call(source).keys() <= parameters.keys()


def test_usage_samples_as_the_evaluation_did():
    evaluation = {"num_steps": 40, "guidance": 2.5, "scheduler": None}
    arguments = call(usage(with_backend(evaluation=evaluation)))
    assert (arguments["num_inference_steps"], arguments["guidance_scale"]) == ("40", "2.5")


@pytest.mark.parametrize(
    ("grid", "sigmas"), [("diffusers_default", None), ("linspace_shifted", [1, 0.75, 0.5, 0.25])]
)
def test_usage_visits_the_same_noise_levels(grid, sigmas):
    found = call(usage(with_backend(rollout={"num_steps": 4, "grid": grid}))).get("sigmas")
    assert (found and eval(found)) == sigmas


def test_the_pipeline_shifts_these_levels_to_those_of_the_run():
    from diffusers import FlowMatchEulerDiscreteScheduler

    from diffusion.schedule import sigma_grid

    source = usage(with_backend(rollout={"num_steps": 10, "grid": "linspace_shifted"}))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=eval(call(source)["sigmas"]))
    expected = sigma_grid("linspace_shifted", 10, 3.0).tolist()
    assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)
