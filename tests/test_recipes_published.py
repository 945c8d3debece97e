"""Full-size recipes carry the published hyper-parameters.

The tables were copied from papers and released code, not from the recipes.  They are parts of
resolved configurations: what a table does not say is free.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusion.kernels import step_table
from diffusion.models.base import dynamic_shift, scheduler_shift
from mmrl.config import RunConfig, load, merged
from mmrl.preflight import refuse_unless_consistent

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "diffusion"


def table(text: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A mapping written in YAML, over ``base`` as one file extends another."""
    return merged(base or {}, yaml.safe_load(text))


SD35 = table("""
seed: 42
backend:
  model:
    path: stabilityai/stable-diffusion-3.5-medium
    dtype: fp16
    lora: {rank: 32, alpha: 64, init: gaussian, target_modules: null}
    max_sequence_length: 128
  rollout: {num_steps: 10, grid: diffusers_default, shift: 3.0, height: 512, width: 512}
  evaluation: {num_steps: 40}
optimizer:
  learning_rate: 3.0e-4
  betas: [0.9, 0.999]
  eps: 1.0e-8
  weight_decay: 1.0e-4
  max_grad_norm: 1.0
  schedule: constant
training: {num_epochs: 1, aggregation: decision_mean}
""")

# Flow-GRPO, config/grpo.py: general_ocr_sd3; the weight of the penalty is that of arXiv:2505.05470.
SD35_FLOW_GRPO = table(
    """
backend:
  rollout: {guidance: 4.5, batch_size: 9, scheduler: euler, initial_noise: sample}
  evaluation: {guidance: 4.5}
  likelihood: {name: transition, kernel: flow_sde, noise_level: 0.7, steps: {select: all}}
advantage: {name: group, deviation: global, ddof: 0, eps: 1.0e-4, eps_mode: add}
modulators: [{name: clip, bound: 5.0, normalize: false}, {name: drop_zero}]
objective: {name: grpo, clip_low: 1.0e-4, clip_high: 1.0e-4, importance: decision}
regularisers: [{name: kl_transition, coef: 4.0e-3, denominator: "true"}]
training: {prompts_per_step: 48, group_size: 24, updates_per_epoch: 2}
evaluation: {every: 60}
checkpoint: {every: 60}
""",
    SD35,
)

# Flow-GRPO, config/grpo.py: pickscore_flux; scripts/train_flux.py.
FLUX_FLOW_GRPO = table(
    """
backend:
  model:
    path: black-forest-labs/FLUX.1-dev
    dtype: bf16
    lora:
      rank: 64
      alpha: 128
      target_modules: [attn.to_q, attn.to_k, attn.to_v, attn.to_out.0, attn.add_q_proj,
        attn.add_k_proj, attn.add_v_proj, attn.to_add_out, ff.net.0.proj, ff.net.2,
        ff_context.net.0.proj, ff_context.net.2]
  rollout:
    num_steps: 6
    guidance: 3.5
    batch_size: 3
    grid: linspace_shifted
    shift: 1.8776106
  evaluation: {num_steps: 28, guidance: 3.5}
  likelihood: {noise_level: 0.9}
regularisers: []
evaluation: {every: 30}
checkpoint: {every: 30}
""",
    SD35_FLOW_GRPO,
)

GUARD = """
objective:
  name: grpo_guard
  clip_low: {clip}
  clip_high: {clip}
  drift_correction: true
  std_normalisation: true
  reweight: true
regularisers: []
optimizer: {{learning_rate: 1.0e-4}}
"""

PUBLISHED = {
    "sd35/flow-grpo-ocr": SD35_FLOW_GRPO,
    # config/grpo.py: geneval_sd3_fast_nocfg.
    "sd35/flow-grpo-fast-ocr": table(
        """
backend:
  rollout: {guidance: 1.0}
  evaluation: {guidance: 1.0}
  likelihood:
    kernel: cps
    noise_level: 0.8
    steps: {select: window, size: 3, before: 5, start: null, noise: trained, shared_by: step}
objective: {clip_low: 1.0e-5, clip_high: 1.0e-5}
regularisers: []
""",
        SD35_FLOW_GRPO,
    ),
    # config/grpo.py: pickscore_sd3_fast.
    "sd35/flow-grpo-fast-v1-ocr": table(
        """
backend:
  rollout: {guidance: 4.5, initial_noise: group}
  likelihood:
    kernel: flow_sde
    noise_level: 0.8
    steps: {select: window, size: 2, before: 7, start: null, noise: trained, shared_by: step}
objective: {clip_low: 1.0e-5, clip_high: 1.0e-5}
regularisers: []
""",
        SD35_FLOW_GRPO,
    ),
    # arXiv:2510.22319, scripts/train_sd3_GRPO_Guard.py.
    "sd35/grpo-guard-ocr": table(GUARD.format(clip="2.0e-6"), SD35_FLOW_GRPO),
    # DiffusionNFT, arXiv:2509.16117, config/nft.py: sd3_ocr.
    "sd35/nft-ocr": table(
        """
backend:
  rollout: {guidance: 1.0, scheduler: dpmpp_2m}
  evaluation: {guidance: 1.0}
  likelihood:
    name: flow_matching
    num_times: 9
    time_sampler: discrete
    timestep_fraction: 0.99
    implicit_beta: 0.1
    behaviour: ema
    ema: {max_decay: 0.999, rate: 0.0075, start: 75}
    evaluation_ema_decay: 0.9
modulators: [{name: optimality, bound: 5.0, mode: all}]
objective: {name: nft, adv_scale: 5.0}
regularisers: [{name: kl_reference, coef: 1.0e-4, estimator: velocity}]
""",
        SD35_FLOW_GRPO,
    ),
    # arXiv:2605.15055 and its official trainer.
    "sd35/opd": table(
        """
backend:
  rollout: {guidance: 4.5, batch_size: 3}
  evaluation: {guidance: 4.5}
  likelihood: {name: transition, kernel: ode, noise_level: 0.0}
prompts: {sampler: {name: round_robin, column: task}}
advantage: {name: none}
modulators: []
objective: {name: opd}
regularisers: []
training: {group_size: 1, updates_per_epoch: 1}
evaluation: {every: 30}
checkpoint: {every: 30}
""",
        SD35,
    ),
    "flux/flow-grpo-ocr": FLUX_FLOW_GRPO,
    "flux/grpo-guard-ocr": table(GUARD.format(clip="4.0e-6"), FLUX_FLOW_GRPO),
    # Flow-GRPO, config/grpo.py: geneval_flux_fast; sampling as the card of FLUX.1 [schnell] says.
    "flux/flow-grpo-schnell-ocr": table(
        """
backend:
  model: {path: black-forest-labs/FLUX.1-schnell, max_sequence_length: 256}
  rollout: {num_steps: 4, guidance: 1.0, shift: 1.0}
  evaluation: {num_steps: 4, guidance: 1.0}
  likelihood: {kernel: cps, noise_level: 0.8, steps: {select: all, noise: trained}}
objective: {clip_low: 1.0e-5, clip_high: 1.0e-5}
""",
        FLUX_FLOW_GRPO,
    ),
    # DanceGRPO, arXiv:2505.07818, finetune_flux_grpo.sh and train_grpo_flux.py.
    "flux/dance-grpo": table(
        """
seed: 42
backend:
  model:
    path: black-forest-labs/FLUX.1-dev
    dtype: bf16
    lora: null
    gradient_checkpointing: true
  rollout:
    num_steps: 16
    guidance: 3.5
    grid: linspace_shifted
    shift: 3.0
    height: 720
    width: 720
    batch_size: 1
    initial_noise: group
  likelihood:
    name: transition
    kernel: dance_sde
    noise_level: 0.3
    steps: {select: subset, noise: scorable, shared_by: sample}
    state_dtype: fp32
    evaluation_ema_decay: null
advantage: {name: group, deviation: group, ddof: 1, eps: 1.0e-8, eps_mode: add}
modulators: [{name: clip, bound: 5.0, normalize: false}]
objective: {name: grpo, clip_low: 1.0e-4, clip_high: 1.0e-4, importance: decision}
regularisers: []
optimizer:
  learning_rate: 1.0e-5
  betas: [0.9, 0.999]
  eps: 1.0e-8
  weight_decay: 1.0e-4
  max_grad_norm: 1.0
  schedule: constant
  warmup_updates: 0
training:
  num_steps: 300
  prompts_per_step: 16
  group_size: 12
  num_epochs: 1
  updates_per_epoch: 3
  aggregation: decision_mean
checkpoint: {every: 40}
"""
    ),
    # Flow-GRPO, config/grpo.py: pickscore_qwenimage.
    "qwen_image/flow-grpo-ocr": table(
        """
backend:
  model:
    path: Qwen/Qwen-Image
    dtype: bf16
    lora:
      rank: 64
      alpha: 128
      target_modules: [attn.to_q, attn.to_k, attn.to_v, attn.to_out.0, attn.add_q_proj,
        attn.add_k_proj, attn.add_v_proj, img_mlp.net.0.proj, img_mlp.net.2]
    gradient_checkpointing: true
    max_sequence_length: 256
  rollout:
    guidance: 4.0
    batch_size: 4
    grid: linspace_shifted
    shift: 1.7137941
    shift_terminal: 0.02
  evaluation: {num_steps: 50, guidance: 4.0}
  likelihood:
    noise_level: 1.2
    steps: {select: window, size: 2, before: 5, start: null, noise: trained, shared_by: step}
    evaluation_ema_decay: null
regularisers: []
training: {prompts_per_step: 32, group_size: 16}
evaluation: {every: 30}
checkpoint: {every: 30}
""",
        SD35_FLOW_GRPO,
    ),
}

# Samples of a step, and decisions trained for each.
SIZES = {
    "sd35/flow-grpo-ocr": (1152, 9),
    "sd35/flow-grpo-fast-ocr": (1152, 3),
    "sd35/flow-grpo-fast-v1-ocr": (1152, 2),
    "sd35/grpo-guard-ocr": (1152, 9),
    "sd35/nft-ocr": (1152, 9),
    "sd35/opd": (72, 9),
    "flux/flow-grpo-ocr": (1152, 5),
    "flux/grpo-guard-ocr": (1152, 5),
    "flux/flow-grpo-schnell-ocr": (1152, 3),
    "flux/dance-grpo": (192, 9),
    "qwen_image/flow-grpo-ocr": (512, 2),
}


@cache
def recipe(name: str) -> RunConfig:
    """The validated recipe; shared by the tests, as configurations are frozen."""
    return load(RECIPES / f"{name}.yaml")


def section(name: str) -> Any:
    """Its ``backend`` section."""
    return recipe(name).backend.config


def grid_of(name: str) -> Tensor:
    """Noise levels of its rollouts."""
    return section(name).rollout.sigmas


def trainable_steps(name: str) -> list[int]:
    """Steps that its likelihood may draw."""
    config = section(name)
    return config.likelihood.steps.candidates(config.step_tables(config.likelihood))


def found(expected: Any, resolved: Any) -> Any:
    """What ``resolved`` has in the place of ``expected``."""
    if isinstance(expected, dict) and isinstance(resolved, dict):
        return {key: found(value, resolved.get(key)) for key, value in expected.items()}
    if isinstance(expected, list) and isinstance(resolved, list):
        same_length = len(expected) == len(resolved)
        pairs = zip(expected, resolved, strict=False)
        return [found(a, b) for a, b in pairs] if same_length else resolved
    return resolved


def test_comparison_sees_a_difference():
    resolved = {"a": [{"b": 1, "free": 0}], "c": {"d": None}, "free": 0}
    for expected in (
        {"a": [{"b": 2}]},
        {"a": []},
        {"a": [{"b": 1}, {"b": 1}]},
        {"c": {"d": 0}},
        {"c": 0},
        {"e": 1},
    ):
        assert found(expected, resolved) != expected
    assert found({"a": [{"b": 1}], "c": {"d": None}}, resolved) == {
        "a": [{"b": 1}],
        "c": {"d": None},
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_those_published(name):
    refuse_unless_consistent(recipe(name))
    assert found(PUBLISHED[name], recipe(name).dump()) == PUBLISHED[name]


@pytest.mark.parametrize("name", SIZES)
def test_samples_and_decisions_of_a_step(name):
    size = recipe(name).training
    assert (size.prompts_per_step * size.group_size, section(name).num_decisions) == SIZES[name]


def test_every_recipe_is_in_the_tables():
    shipped = {
        f"{folder}/{path.stem}"
        for folder in ("sd35", "flux", "qwen_image")
        for path in (RECIPES / folder).glob("*.yaml")
        if not path.stem.startswith("awm")  # tested with the other configurations and the models
    }
    assert shipped == set(PUBLISHED) == set(SIZES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_head_says_where_the_numbers_come_from(name):
    head, _, _ = (RECIPES / f"{name}.yaml").read_text().partition("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    words = " ".join(head.replace("#", "").split())
    assert "(arXiv:" in words
    assert "released code" in words or "official trainer" in words


@pytest.mark.parametrize("name", ["sd35/flow-grpo-ocr", "flux/flow-grpo-ocr", "sd35/opd"])
def test_evaluation_average_forgets_as_fast_as_published(name):
    """There a factor 0.9 at every eighth update, here one for every step."""
    steps = 8 / recipe(name).training.updates_per_epoch
    # A decay with three digits is at most 0.0005 off, so its eighth power is at most 0.004 off.
    assert section(name).likelihood.evaluation_ema_decay ** steps == pytest.approx(0.9, abs=0.004)


@pytest.mark.parametrize(
    ("name", "last_start"), [("sd35/flow-grpo-fast-ocr", 2), ("qwen_image/flow-grpo-ocr", 3)]
)
def test_windows_lie_in_the_first_half(name, last_start):
    """There the start is drawn from 0 to num_steps // 2 - size, both included."""
    candidates, size = trainable_steps(name), section(name).likelihood.steps.size
    assert candidates == list(range(section(name).rollout.num_steps // 2))
    assert candidates[-size] == last_start


def test_branches_leave_the_shared_path_at_any_of_the_first_six_steps():
    name = "sd35/flow-grpo-fast-v1-ocr"
    assert trainable_steps(name)[: -section(name).likelihood.steps.size + 1] == list(range(6))


def test_dance_grpo_trains_three_fifths_of_all_steps_but_the_last():
    candidates = trainable_steps("flux/dance-grpo")
    assert candidates == list(range(15))
    assert section("flux/dance-grpo").num_decisions == int(len(candidates) * 0.6)


@pytest.mark.parametrize("name", ["flux/flow-grpo-ocr", "flux/grpo-guard-ocr"])
def test_flux_is_sampled_on_the_pipelines_grid(name):
    published = [1.0, 0.90374, 0.78970, 0.65249, 0.48422, 0.27300, 0.0]
    assert grid_of(name).tolist() == pytest.approx(published, abs=5.1e-6)
    assert section(name).rollout.shift == pytest.approx(dynamic_shift(1024), rel=1e-6)


def test_schnell_is_sampled_on_the_pipelines_grid():
    """With the scheduler configuration that the model was released with."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4).tolist())
    assert scheduler_shift(scheduler.config, 1024) is None
    assert grid_of("flux/flow-grpo-schnell-ocr").tolist() == scheduler.sigmas.tolist()


def test_schnell_adds_no_more_noise_than_a_level_has():
    """Which the kernel and noise level of [dev] would do at its first step."""
    name = "flux/flow-grpo-schnell-ocr"
    after = grid_of(name)[1:]
    config = section(name)
    assert (config.step_tables(config.likelihood).noisy.std <= after).all()
    dev = section("flux/flow-grpo-ocr").likelihood
    other = step_table(dev.kernel, grid_of(name), dev.noise_level)
    assert other.std[0] == pytest.approx(0.9)
    assert other.std[0] > after[0]
    assert trainable_steps(name) == [0, 1, 2]


def test_qwen_image_is_sampled_on_the_pipelines_grid():
    """With the scheduler configuration that the model was released with."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
    )
    shift = scheduler_shift(scheduler.config, 1024)
    assert shift is not None
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10).tolist(), mu=math.log(shift))
    found = grid_of("qwen_image/flow-grpo-ocr")
    assert found.tolist() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_teachers_keep_their_guidance():
    teachers = {teacher.task: teacher for teacher in section("sd35/opd").teachers}
    guidance = {task: teacher.guidance for task, teacher in teachers.items()}
    assert guidance == {"geneval": 1.0, "ocr": 4.5, "pickscore": 4.5}
    assert teachers["ocr"].path == str(recipe("sd35/grpo-guard-ocr").run_dir)
    assert section("sd35/grpo-guard-ocr").rollout.guidance == guidance["ocr"]
    assert section("sd35/nft-ocr").rollout.guidance == guidance["geneval"]


def test_student_and_teachers_share_a_grid_and_the_tasks_a_step():
    for teacher in ("sd35/grpo-guard-ocr", "sd35/nft-ocr"):
        assert (grid_of(teacher) == grid_of("sd35/opd")).all()
    assert trainable_steps("sd35/opd") == list(range(9))
    assert recipe("sd35/opd").training.prompts_per_step % len(section("sd35/opd").teachers) == 0
