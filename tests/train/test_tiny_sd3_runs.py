"""The shipped pipeline through the command line: killed, doubled, exported, drawn again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toy.run import metrics_of, weights_of

from mmrl.checkpoint import found
from mmrl.config import apply_overrides, parse, read_yaml
from mmrl.runner import sample, train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = (
    "backend.model.dtype=fp32",
    "backend.model.lora.rank=4",
    "backend.rollout.num_steps=3",
    "backend.rollout.batch_size=3",
    "backend.likelihood.num_times=2",
    "training.num_steps=3",
    "training.prompts_per_step=3",
    "training.group_size=3",
    "training.micro_batch_size=4",
    "training.updates_per_epoch=2",
    "evaluation.max_prompts=2",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=2",
    "checkpoint.every=1",
    "tracking.trackers=[]",
)


def small_config(folder: Path, *overrides: str) -> dict:
    """The quickstart at the smallest size that still does everything."""
    data = read_yaml(ROOT / "configs" / "quickstart.yaml")
    absolute = (
        f"output_dir={folder / 'run'}",
        f"backend.model.path={ROOT / 'assets/tiny-sd3'}",
        f"prompts.source={ROOT / 'assets/prompts/ocr-train.jsonl'}",
        f"evaluation.source={ROOT / 'assets/prompts/ocr-eval.jsonl'}",
    )
    return apply_overrides(data, [*absolute, *SMALL, *overrides])


def launch(folder: Path, *words: str, processes: int = 1, **extra: str):
    """``mmrl train`` on a written configuration, in processes of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(small_config(folder, *extra.pop("set", ()))))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else [])]
    command += ["-m", "mmrl", "train", str(folder / "small.yaml"), *words]
    paths = f"{HERE}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **extra}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = launch(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_sigkill_and_resume_is_bit_identical(unbroken, tmp_path):
    killer = ["rewards.0.name=toy.rewards.ocr_that_kills", "rewards.0.label=ocr"]
    extra = {"TOY_KILL_MARKER": str(tmp_path / "killed"), "TOY_KILL_CALL": "5"}
    killed = launch(tmp_path / "broken", *killer, **extra)
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "broken" / "run"
    assert [p.name for p in found(run)] == ["checkpoint-1"]
    resumed = launch(tmp_path / "broken", *killer, "--resume", **extra)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(run) == metrics_of(unbroken)
    left, right = weights_of(unbroken), weights_of(run)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_two_processes_equal_one(unbroken, tmp_path):
    done = launch(tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "two" / "run"
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
