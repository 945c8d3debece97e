"""Every recipe on the shipped tiny model: it trains, resumes to the bit, and is shared out.

Shortened: few images, few steps, and a reward that needs no reading.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from toy.run import ROOT, column, launch, leave_charts_out, metrics_of, python, weights_of

from mmrl import stages
from mmrl.checkpoint import found
from mmrl.config import load, read_yaml
from mmrl.distributed import one_group_of_processes
from mmrl.runner import evaluate, load_run_config, sample, train

sys.path.insert(0, str(ROOT / "tests" / "diffusion"))

import tiny_flux
import tiny_qwen_image

RECIPES = sorted((ROOT / "configs" / "diffusion" / "tiny-sd3").glob("*.yaml"))
STAGES = [path for path in RECIPES if "stages" in read_yaml(path)]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHORT = (
    "backend.model.dtype=fp32",
    "backend.model.lora.rank=4",
    "evaluation.rewards=[{name: jpeg_compressibility}]",
    "evaluation.max_prompts=1",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=2",
    "checkpoint.every=1",
    "tracking.trackers=[]",
    "training.prompts_per_step=4",
    "training.group_size=2",
    "training.updates_per_epoch=2",
    "training.micro_batch_size=7",
)


NO_READING = "rewards=[{name: jpeg_compressibility}]"
LIKE_QUICKSTART = ("composition", "preference")
"""Recipes that differ from the quickstart in prompts and rewards alone; the others cover both."""


def runs():
    """Recipes of one run; files with stages are made of them."""
    return [
        pytest.param(path, marks=pytest.mark.slow if path.stem in LIKE_QUICKSTART else ())
        for path in RECIPES
        if path not in STAGES
    ]


def short(recipe: Path, folder: Path, teacher: Path, *overrides: str) -> list[str]:
    data = read_yaml(recipe)
    absolute = [f"output_dir={folder}", f"backend.model.path={ROOT / 'assets/tiny-sd3'}"]
    for section in ("prompts", "evaluation"):
        source = data[section]["source"]
        if isinstance(source, dict):
            absolute += [f"{section}.source.{task}={ROOT / file}" for task, file in source.items()]
        else:
            absolute.append(f"{section}.source={ROOT / source}")
    teachers = data["backend"].get("teachers", ())
    absolute += [f"backend.teachers.{i}.path={teacher}" for i in range(len(teachers))]
    several = data["advantage"]["name"] == "per_reward"  # needs rewards that differ by task
    return [*absolute, *SHORT, *([] if several else [NO_READING]), *overrides]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of one step: a policy that is not the base model."""
    recipe, folder = QUICKSTART, tmp_path_factory.mktemp("teacher")
    return train(load(recipe, short(recipe, folder, folder, "training.num_steps=1")))


@pytest.fixture(scope="module", params=runs(), ids=lambda path: path.stem)
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def unbroken(recipe, teacher, tmp_path_factory):
    torch.set_num_threads(1)  # as in the tests: fixtures of a module come before theirs
    folder = tmp_path_factory.mktemp(recipe.stem)
    return train(load(recipe, short(recipe, folder, teacher, "training.num_steps=3")))


def test_it_trains(unbroken):
    losses = column(unbroken, "loss")
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert all(norm > 0 for norm in column(unbroken, "grad_norm"))


def test_a_resumed_run_is_bit_identical(recipe, teacher, unbroken, tmp_path):
    """Without its last checkpoint, as a kill just before it leaves a run."""
    run = shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(found(run)[-1])
    train(load(recipe, short(recipe, run, teacher, "training.num_steps=3")), resume=True)
    assert_same_run(unbroken, run)


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics_of(other) == metrics_of(one)
    left, right = weights_of(one), weights_of(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nft", "flow-grpo-fast", "grpo-guard", "opd-student"])
def test_sigkill_and_resume_is_bit_identical(name, teacher, tmp_path):
    """The slow copy, the drawn window, the old means, the turn of the tasks; killed in step 3."""
    recipe = ROOT / "configs" / "diffusion" / "tiny-sd3" / f"{name}.yaml"
    killer = "rewards=[{name: toy.rewards.ocr_that_kills, label: ocr}]"
    runs = {word: tmp_path / word / "run" for word in ("whole", "broken")}
    configs = {
        word: load(recipe, short(recipe, run, teacher, killer, "training.num_steps=4")).dump()
        for word, run in runs.items()
    }
    whole = launch(configs["whole"], tmp_path / "whole" / "run.yaml")
    assert whole.returncode == 0, whole.stderr
    extra = {"TOY_KILL_MARKER": str(tmp_path / "killed"), "TOY_KILL_CALL": "10"}
    path = tmp_path / "broken" / "run.yaml"
    killed = launch(configs["broken"], path, **extra)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert found(runs["broken"])[-1].name == "checkpoint-2"
    resumed = launch(configs["broken"], path, "--resume", **extra)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(runs["whole"], runs["broken"])


@pytest.mark.parametrize("name", ["flow-grpo", "grpo-guard"])
def test_ratios_of_weights_that_hardly_move_are_1_in_half_precision(name, teacher, tmp_path):
    """Both updates compare with what the same weights said of the same slices."""
    recipe = ROOT / "configs" / "diffusion" / "tiny-sd3" / f"{name}.yaml"
    half = ("backend.model.dtype=bf16", "optimizer.learning_rate=1e-12", "training.num_steps=1")
    run = train(load(recipe, short(recipe, tmp_path, teacher, *half)))
    assert column(run, "ratio/mean") == [1.0]


OTHER_BACKBONES = {"flux": tiny_flux.save_pipeline, "qwen_image": tiny_qwen_image.save_pipeline}
METHODS = ("../../quickstart", "nft", "flow-grpo", "flow-grpo-fast", "grpo-guard", "opd-student")


@pytest.fixture(scope="module", params=[pytest.param("flux", marks=pytest.mark.slow), "qwen_image"])
def backbone(request, tmp_path_factory):
    """Overrides that put a recipe on another family, and a teacher of that family."""
    folder = tmp_path_factory.mktemp(request.param)
    OTHER_BACKBONES[request.param](folder / "model")
    changes = (
        f"backend.model.family={request.param}",
        f"backend.model.path={folder / 'model'}",
        "backend.model.max_sequence_length=64",
        "backend.rollout.height=32",
        "backend.rollout.width=32",
        "training.num_steps=1",
    )
    options = short(QUICKSTART, folder / "teacher", folder, *changes)
    return changes, train(load(QUICKSTART, options))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_every_backbone(name, backbone, tmp_path):
    """Where the model lies and what its pictures measure is all that changes."""
    changes, teacher = backbone
    recipe = ROOT / "configs" / "diffusion" / "tiny-sd3" / f"{name}.yaml"
    run = train(load(recipe, short(recipe, tmp_path, teacher, *changes, NO_READING)))
    assert all(math.isfinite(loss) for loss in column(run, "loss"))
    assert all(norm > 0 for norm in column(run, "grad_norm"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_files_with_stages_train(path, tmp_path, monkeypatch):
    """Every stage starts from what the ones before it exported."""
    monkeypatch.chdir(ROOT)
    sizes = ("training.num_steps=1", f"output_dir={tmp_path}")
    plan = stages.load(path, [*SHORT, NO_READING, *sizes])
    summaries = stages.train(plan, resume=False, main=True, announce=print)
    assert [s.name for s in summaries[: len(plan.stages)]] == [s.name for s in plan.stages]
    for stage in plan.stages:
        losses = column(stage.config.run_dir, "loss")
        assert len(losses) == 1
        assert math.isfinite(losses[0])


@pytest.fixture(scope="module")
def shared_out(request, teacher, tmp_path_factory):
    """Run folders, by recipe: one step of each, all in the same two processes."""
    asked = {
        item.callspec.params["recipe"]
        for item in request.session.items
        if "recipe" in item.fixturenames
    }
    folders = {recipe: tmp_path_factory.mktemp(recipe.stem) for recipe in sorted(asked)}
    jobs = [
        (str(recipe), short(recipe, folder, teacher, "training.num_steps=1"))
        for recipe, folder in folders.items()
    ]
    done = python(Path(__file__).resolve(), json.dumps(jobs), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folders


@pytest.mark.slow
def test_two_processes_equal_one(recipe, unbroken, shared_out):
    first, other = (
        next(line for line in metrics_of(run) if "loss" in line)
        for run in (unbroken, shared_out[recipe])
    )
    assert first.keys() == other.keys()
    for name in first:
        # Sums of float32 in another order, which the second update carries on.
        assert other[name] == pytest.approx(first[name], rel=5e-3, abs=1e-4), name


def test_a_student_draws_and_is_judged_without_its_teachers(teacher, tmp_path):
    recipe = ROOT / "configs" / "diffusion" / "tiny-sd3" / "opd-student.yaml"
    run = train(load(recipe, short(recipe, tmp_path, teacher, "training.num_steps=1")))
    drawn = [image.tobytes() for image in sample(run, ["a cat"], count=2, seed=0)[0]]
    record = run / "config.yaml"
    record.write_text(record.read_text().replace(str(teacher), "gone"))
    assert [image.tobytes() for image in sample(run, ["a cat"], count=2, seed=0)[0]] == drawn
    found = evaluate(load_run_config(run), run=run)
    assert found == {key: value for key, value in metrics_of(run)[-1].items() if "eval/" in key}


if __name__ == "__main__":
    leave_charts_out()
    with one_group_of_processes():
        for path, overrides in json.loads(sys.argv[1]):
            train(load(Path(path), overrides))
