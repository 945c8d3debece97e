"""The shipped pipeline through the command line: killed, doubled, exported, drawn again."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from toy.run import ROOT, SMALLER, column, launch, metrics_of, small_config, weights_of

from mmrl.checkpoint import found
from mmrl.config import parse
from mmrl.runner import sample, train


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = launch(small_config(folder), folder / "small.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_sigkill_and_resume_is_bit_identical(unbroken, tmp_path):
    killer = ["rewards.0.name=toy.rewards.ocr_that_kills", "rewards.0.label=ocr"]
    extra = {"TOY_KILL_MARKER": str(tmp_path / "killed"), "TOY_KILL_CALL": "5"}
    config, path = small_config(tmp_path, *killer), tmp_path / "small.yaml"
    killed = launch(config, path, **extra)
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert [p.name for p in found(run)] == ["checkpoint-1"]
    resumed = launch(config, path, "--resume", **extra)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(run) == metrics_of(unbroken)
    left, right = weights_of(unbroken), weights_of(run)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_two_processes_equal_one(unbroken, tmp_path):
    done = launch(small_config(tmp_path), tmp_path / "small.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    for a, b in zip(metrics_of(unbroken), metrics_of(run), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # The first update differs by the order of float32 sums; Adam's normalisation carries
            # that into every later one.  Rewards are the same: no image changes that much.
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-5), name
    left, right = weights_of(unbroken), weights_of(run)
    moved = [name for name in left if "lora_B" in name and "moment" not in name]
    assert moved
    for name in moved:
        # Six updates of 1e-3; where a gradient is about 0, Adam makes its sign matter.
        assert (left[name] - right[name]).abs().max() < 2e-3
        assert (left[name] - right[name]).abs().mean() < 5e-5


def test_images_are_sampled_by_variance_and_nothing_of_it_is_lost(tmp_path):
    """The kill is within step 2, which begins with a pass over all four prompts."""
    prompts = (ROOT / "assets/prompts/ocr-train.jsonl").read_text().splitlines()
    (tmp_path / "four.jsonl").write_text("\n".join(prompts[::70]) + "\n")
    vas = "{name: vas, beta: 0, refresh_every: 2, refresh_samples: 3, momentum: 0.5}"
    few = (*SMALLER, "training.num_steps=3", "evaluation.source=null")
    own = (f"prompts.source={tmp_path / 'four.jsonl'}", f"prompts.sampler={vas}")
    config = small_config(tmp_path, *few, *own)
    run = train(parse(config))
    passes = [row.get("sampler/refresh_samples") for row in metrics_of(run) if "loss" in row]
    assert passes == [12.0, None, 12.0]
    assert column(run, "num_samples") == [4.0] * 3, "those of the passes are not trained on"
    known = json.loads((found(run)[-1] / "progress.json").read_text())["sampler"]
    assert known["taken"] == 3, "half of two prompts a step are drawn by score"
    assert len(set(known["scores"].values())) == 4
    logged = column(run, "sampler/mean_score")
    assert len(set(logged)) == 3
    assert logged[-1] == pytest.approx(sum(known["scores"].values()) / 4)
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(found(again)[-1])
    train(parse({**config, "output_dir": str(again)}), resume=True)
    assert json.loads((found(again)[-1] / "progress.json").read_text())["sampler"] == known
    assert metrics_of(again) == metrics_of(run)
    left, right = weights_of(run), weights_of(again)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_exported_lora_draws_the_same_images_in_plain_diffusers(unbroken):
    from diffusers import StableDiffusion3Pipeline

    prompt = 'a red sign "42"'
    ours = sample(unbroken, [prompt], count=2, seed=7)[0]
    pipe = StableDiffusion3Pipeline.from_pretrained(ROOT / "assets/tiny-sd3")
    pipe.set_progress_bar_config(disable=True)
    latents = initial_noise(unbroken, prompt, count=2, seed=7)

    def draw():
        call = {"sigmas": [1.0, 2 / 3, 1 / 3], "guidance_scale": 1.0, "max_sequence_length": 10}
        return pipe([prompt] * 2, height=32, width=64, latents=latents.clone(), **call).images

    before = draw()
    pipe.load_lora_weights(unbroken / "final")
    after = draw()
    difference = pixels(after) - pixels(ours)
    assert np.abs(difference).max() <= 1, "one level of rounding"
    assert np.abs(pixels(before) - pixels(ours)).max() > 1, "the adapter must matter"


def initial_noise(run: Path, prompt: str, *, count: int, seed: int) -> torch.Tensor:
    """The noise that ``mmrl sample`` starts from."""
    from diffusion import noise
    from mmrl.evaluation import EVALUATION_STREAM
    from mmrl.prompts.dataset import content_id

    name = content_id(prompt, {})
    keys = [
        noise.NoiseKey(seed=seed, stream=EVALUATION_STREAM, prompt_id=name, sample=i)
        for i in range(count)
    ]
    return noise.normal(keys, "initial", (8, 8, 16))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int64) for image in images])


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [
        "backend.model.lora=null",
        "backend.model.dtype=bf16",
        "backend.model.gradient_checkpointing=true",
        "backend.likelihood.behaviour=ema",
        "objective.importance=sample",
        "objective={name: reinforce}",
        "advantage={name: leave_one_out}",
        "backend.rollout.guidance=3.0",
        "regularisers=[]",
        "training.num_epochs=2",
    ],
)
def test_every_option_trains(tmp_path, option):
    """About 5 s each."""
    config = parse(small_config(tmp_path, "training.num_steps=1", option))
    run = train(config)
    assert (run / "report.html").is_file()
    assert np.isfinite(metrics_of(run)[1]["loss"])
