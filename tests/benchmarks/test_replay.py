"""The replay benchmark compares equal work, refuses unequal work and counts bytes."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import replay
from mmrl.prompts.dataset import load_prompts

SMALL = ("backend.rollout.num_steps=5",)


@pytest.fixture(scope="module")
def opened():
    options = Namespace(
        config=Path("configs/diffusion/tiny-sd3/flow-grpo.yaml"),
        overrides=[*SMALL, "backend.model.dtype=fp32"],
    )
    run = replay.load(options, ())
    prompts = load_prompts(run.prompts.source, "prompts.source")[:2]
    return run, replay.open_backend(run, prompts), prompts


def test_the_whole_benchmark(tmp_path, capsys):
    small = ["--samples", "2", "--rounds", "1", "--group-size", "2", "--out", str(tmp_path)]
    assert replay.main([*small, *SMALL]) == 0
    (written,) = tmp_path.glob("*replay*.json")
    data = json.loads(written.read_text())
    assert [(c["dtype"], c["guidance"]) for c in data["update"]] == [
        ("fp32", 1.0), ("fp32", 4.5), ("bf16", 1.0), ("bf16", 4.5)
    ]  # fmt: skip
    assert [c["rows"] for c in data["update"]] == [8, 16, 8, 16]
    assert all(c["ratio"] > 0 and c["gradient_gap"] < 0.1 for c in data["update"])
    assert "Folded replay" in capsys.readouterr().out


def test_unequal_work_is_noticed(opened):
    run, backend, prompts = opened
    work = replay.make_work(backend, prompts, 2, 2)
    logp_gap, gradient_gap = replay.differences(backend, run, work)
    assert logp_gap <= replay.LOGP_TOLERANCE
    assert gradient_gap <= replay.GRADIENT_TOLERANCE
    flipped = replace(work.steps[0], advantages=-work.steps[0].advantages)
    wrong = replace(work, steps=[flipped, *work.steps[1:]])
    assert replay.differences(backend, run, wrong)[1] > 0.01
    shuffled = replace(work, steps=work.steps[::-1])
    assert replay.differences(backend, run, shuffled)[0] > 0.01


def test_storages_count_once_and_whole():
    whole = torch.zeros(10, dtype=torch.float32)
    assert replay.storage_bytes([whole, whole[2:4], None]) == 40
    assert replay.storage_bytes([whole[2:4], whole[2:4].clone()]) == 48


def test_bytes_of_a_sample():
    sizes = replay.Sizes(name="x", num_steps=10, state=1000, text=800, negative=500)
    held = replay.held_bytes(sizes, 8)
    # 9 trained steps touch 10 states; 3 touch 4; T + 1 = 11.
    assert held["all steps"] == 10 * 1000 + 72 + 100
    assert held["window of 3"] == 4 * 1000 + 24 + 100
    assert held["AWM"] == 1000 + 100
    assert held["T+1 states, own embeddings"] == 11 * 1000 + 80 + 800
    assert held["T+1 states, own embeddings and negative ones"] == 11 * 1000 + 80 + 800 + 500
    assert held["2T states, own embeddings"] == 20 * 1000 + 80 + 800


def test_sizes_of_sd35():
    sizes = replay.sd35_sizes(333)
    assert sizes.state == 16 * 64 * 64 * 4
    assert sizes.text == (333 * 4096 + 2048) * 2


def test_bytes_of_real_samples(opened):
    """Measured storages are what the formula says, but for indices and masks of a few bytes."""
    _, backend, prompts = opened
    measured = replay._measured(backend, prompts)
    text = replay.storage_bytes(replay._embeddings(backend, prompts[0]))
    state = torch.zeros(backend._shape).nbytes
    formula = 5 * state + 8 * 4 + text / 8
    assert formula <= measured <= formula + 100
