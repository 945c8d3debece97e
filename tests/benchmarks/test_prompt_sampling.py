"""The comparison of prompt samplers, from the mix of prompts to tables, at the smallest size."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import prompt_sampling
from benchmarks.prompt_sampling import varied
from mmrl.errors import UserError

SMALL = (
    "training.prompts_per_step=4",
    "training.group_size=4",
    "training.micro_batch_size=8",
    "evaluation.max_prompts=8",
    "evaluation.samples_per_prompt=1",
    "optimizer.warmup_updates=0",
)


def test_groups_that_were_dropped_had_no_gradient():
    settings = SimpleNamespace(training=SimpleNamespace(group_size=5))
    job = SimpleNamespace(settings=settings)
    plain = {"num_samples": 20.0, "frac_reward_zero_std": 0.75}
    refilled = plain | {"num_samples": 30.0, "frac_reward_zero_std": 0.0,
                        "sampling/groups": 6.0, "sampling/groups_trained": 4.0}  # fmt: skip
    assert varied(SimpleNamespace(rows=[plain], job=job)) == 0.25
    assert varied(SimpleNamespace(rows=[refilled], job=job)) == pytest.approx(4 / 6)


@pytest.mark.slow
def test_from_the_mix_to_the_tables(tmp_path):
    words = ["--methods", "uniform", "dynamic", "--seeds", "0", "--steps", "1", "--every", "1"]
    words += ["--start-steps", "1", "--size", "20", "--samples", "4"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), *SMALL]
    assert prompt_sampling.main(words) == 0
    (path,) = tmp_path.glob("*-prompt-sampling.json")
    data = json.loads(path.read_text())
    lines = (tmp_path / "runs" / "mix.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert data["mix"]["hopeless"] == 6
    assert data["mix"]["open"] == 8
    assert {row["kind"] for row in rows} <= set(prompt_sampling.SHARES)
    assert all(row["task"] not in prompt_sampling.ARITHMETIC for row in rows
               if row["kind"] == "open")  # fmt: skip
    assert [run["method"] for run in data["runs"]] == ["uniform", "dynamic"]
    assert all(
        run["points"][0]["tokens"] == 0 < run["points"][-1]["tokens"] for run in data["runs"]
    )
    assert "| dynamic |" in path.with_suffix(".md").read_text()


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match="unknown 'all'; allowed: uniform"):
        prompt_sampling.main(["--methods", "all"])
