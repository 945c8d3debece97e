"""Every recipe on the shipped tiny model: it trains, resumes to the bit, and is shared out.

Shortened: few images, few steps, and a reward that needs no reading.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from toy.run import ROOT, column, metrics_of, python, weights_of

from mmrl.config import load, read_yaml
from mmrl.runner import evaluate, load_run_config, sample, train

RECIPES = sorted((ROOT / "configs" / "diffusion" / "tiny-sd3").glob("*.yaml"))
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHORT = (
    "backend.model.dtype=fp32",
    "backend.model.lora.rank=4",
    "rewards=[{name: jpeg_compressibility}]",
    "evaluation.rewards=[{name: jpeg_compressibility}]",
    "evaluation.max_prompts=1",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=2",
    "checkpoint.every=1",
    "tracking.trackers=[]",
    "training.prompts_per_step=3",
    "training.group_size=2",
    "training.updates_per_epoch=2",
    "training.micro_batch_size=7",
)


LIKE_QUICKSTART = ("composition", "preference")
"""Recipes that differ from the quickstart in prompts and rewards alone; the others cover both."""


def runs():
    """Recipes of one run; files with stages are made of them."""
    return [
        pytest.param(path, marks=pytest.mark.slow if path.stem in LIKE_QUICKSTART else ())
        for path in RECIPES
        if "stages" not in read_yaml(path)
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
    return [*absolute, *SHORT, *overrides]


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
    for steps, resume in ((2, False), (3, True)):
        options = short(recipe, tmp_path, teacher, f"training.num_steps={steps}")
        train(load(recipe, options), resume=resume)
    # The shorter run evaluated after its last step, as the longer one does on its way.
    assert metrics_of(tmp_path) == metrics_of(unbroken)
    left, right = weights_of(unbroken), weights_of(tmp_path)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


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
    PartialState.destroy_process_group = lambda *_, **__: None  # all runs share one group
    for path, overrides in json.loads(sys.argv[1]):
        train(load(Path(path), overrides))
