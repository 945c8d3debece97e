"""Nothing is lost: killed, interrupted and resumed runs equal the unbroken one to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from toy.run import metrics_of, toy_config, weights_of

from mmrl import checkpoint
from mmrl.errors import UserError

HERE = Path(__file__).parent
MANY_UPDATES = ("training.updates_per_epoch=2", "training.num_epochs=2")


def command(folder: Path, *arguments: str) -> list[str]:
    """``mmrl train`` on a toy configuration written to ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / "toy.yaml").write_text(yaml.safe_dump(toy_config(folder)))
    return [sys.executable, "-m", "mmrl", "train", str(folder / "toy.yaml"), *arguments]


def environment(**extra: str) -> dict[str, str]:
    root = HERE.parents[1]
    paths = f"{HERE}{os.pathsep}{root}"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **extra}


def assert_same_run(first: Path, second: Path) -> None:
    """Bit-identical metrics, parameters, averages and moments."""
    assert metrics_of(first) == metrics_of(second)
    left, right = weights_of(first), weights_of(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("call", [7, pytest.param(22, marks=pytest.mark.slow)])
def test_sigkill_and_resume_is_bit_identical(tmp_path, toy, call):
    """Killed within the reward of the ``call``-th group: in step 2, before any
    checkpoint, and in step 6 of 6."""
    name = "rewards.0.name=toy.rewards.kills_itself"
    unbroken = toy(name, *MANY_UPDATES, folder=made(tmp_path / "unbroken"))
    extra = environment(TOY_KILL_MARKER=str(tmp_path / "killed"), TOY_KILL_CALL=str(call))
    start = command(tmp_path / "broken", name, *MANY_UPDATES)
    killed = subprocess.run(start, env=extra, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = subprocess.run(
        [*start, "--resume"], env=extra, capture_output=True, timeout=120, check=False, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(unbroken, tmp_path / "broken" / "toy")


def test_interrupt_saves_and_says_how_to_go_on(tmp_path, toy):
    options = ("training.num_steps=20", "rewards.0.name=toy.rewards.slow", "evaluation.every=20")
    unbroken = toy(*options, folder=made(tmp_path / "unbroken"))
    start = command(tmp_path / "broken", *options)
    process = subprocess.Popen(start, env=environment(), stderr=subprocess.PIPE, text=True)
    run = tmp_path / "broken" / "toy"
    deadline = time.monotonic() + 60
    while not checkpoint.found(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    stopped = checkpoint.found(run)[-1]
    assert 0 < int(stopped.name.removeprefix("checkpoint-")) < 20
    assert metrics_of(run)[-1]["step"] == int(stopped.name.removeprefix("checkpoint-"))
    assert subprocess.run([*start, "--resume"], env=environment(), check=False).returncode == 0
    assert_same_run(unbroken, run)


def test_resume_in_process_and_extend(toy, tmp_path):
    whole = toy("training.num_steps=6", folder=made(tmp_path / "whole"))
    part = made(tmp_path / "part")
    toy("training.num_steps=4", folder=part)
    # The evaluation after the last step of the short run is one more line than in the whole run.
    resumed = toy("training.num_steps=6", resume=True, folder=part)
    left, right = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [m for m in metrics_of(resumed) if "reward" in m] == [
        m for m in metrics_of(whole) if "reward" in m
    ]


def test_resume_of_a_finished_run_changes_nothing(toy):
    before = weights_of(toy())
    after = weights_of(toy(resume=True))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_keep_last(toy):
    run = toy("training.num_steps=6", "checkpoint.every=1", "checkpoint.keep_last=3")
    assert [p.name for p in checkpoint.found(run)] == [f"checkpoint-{i}" for i in (4, 5, 6)]


def test_a_second_run_does_not_overwrite_the_first(toy):
    toy()
    with pytest.raises(UserError, match="holds another run; continue it with --resume"):
        toy()


def test_resume_with_another_configuration_names_the_key(toy):
    toy()
    with pytest.raises(UserError, match=r"training\.group_size: 5 -> 6"):
        toy("training.group_size=6", resume=True)


@pytest.mark.parametrize("victim", ["weights.safetensors", "optimizer.pt", "manifest.json"])
def test_a_corrupt_checkpoint_is_refused_by_name(toy, victim):
    run = toy()
    path = checkpoint.found(run)[-1] / victim
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"corrupt checkpoint .*{victim}"):
        toy(resume=True)


def test_a_missing_file_is_refused_by_name(toy):
    run = toy()
    (checkpoint.found(run)[-1] / "auxiliary.safetensors").unlink()
    with pytest.raises(UserError, match=r"auxiliary.safetensors is missing"):
        toy(resume=True)


def test_random_states_round_trip():
    import random

    import numpy as np

    state = checkpoint.random_state()

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = draw()
    checkpoint.set_random_state(state)
    assert draw() == first


def made(folder: Path) -> Path:
    """The folder, created."""
    folder.mkdir()
    return folder
