"""The comparison of advantage estimators, from training to tables, at the smallest size."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from benchmarks import advantages
from benchmarks.advantages import ESTIMATORS, TASKS
from mmrl import preflight
from mmrl.errors import UserError
from mmrl.types import Scores

SMALL = (
    "training.prompts_per_step=6",
    "training.group_size=4",
    "training.micro_batch_size=12",
    "evaluation.samples_per_prompt=1",
)


@pytest.mark.parametrize("tails", ["recipe", "heavy"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_can_train_the_mix(name, tails, tmp_path):
    options = argparse.Namespace(runs=tmp_path, every=1, steps=1, overrides=[], tails=tails)
    preflight.refuse_unless_consistent(advantages.run_job(name, 0, options).settings)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("advantages")
    words = ["--estimators", "grpo", "g2rpo", "--seeds", "0", "--steps", "1", "--every", "1"]
    words += ["--probes", "4", "--runs", str(folder / "runs"), "--out", str(folder), *SMALL]
    assert advantages.main(words) == 0
    (data,) = (json.loads(path.read_text()) for path in folder.glob("*-advantages.json"))
    return data, next(folder.glob("*-advantages.md")).read_text()


@pytest.mark.slow
def test_runs_start_alike_and_are_judged_by_task(result):
    data, _ = result
    first = [run["points"][0]["scores"] for run in data["runs"]]
    assert [run["estimator"] for run in data["runs"]] == ["grpo", "g2rpo"]
    assert first[0] == first[1]
    assert set(first[0]) >= set(TASKS)


@pytest.mark.slow
def test_shares_of_the_gradient(result):
    data, _ = result
    for record in data["gradient_shares"]:
        shares = [record[task] for task in TASKS]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0
    grpo, g2rpo = ([r[t] for t in TASKS] for r in data["gradient_shares"])
    assert grpo != g2rpo


@pytest.mark.slow
def test_tables(result):
    _, text = result
    assert "| before |" in text
    assert text.count("| g2rpo |") == 2


def test_each_letter_costs_more_than_the_one_before():
    said = ["<answer>CAT</answer>", "<answer>CAR</answer>", "<answer>TOAST</answer>", "CAT"]
    found = advantages.price_of_letters(["?"] * 4, said, answer=["CAT"] * 4)
    assert found == pytest.approx([0, 1 - math.e, 1 - math.e**3, 1 - math.e**3])


def test_kurtosis_is_that_within_groups():
    """0 and 1 alike often have -2, whatever the level of their group."""
    values = torch.tensor([0.0, 1, 10, 11, 5, 5, 5, 5], dtype=torch.float64)
    scores = Scores(
        combined=values,
        group=torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]),
        valid=torch.ones(8, dtype=torch.bool),
        task=["read"] * 4 + ["box"] * 4,
    )
    assert advantages.excess_kurtosis(scores, "read") == pytest.approx(-2)
    assert math.isnan(advantages.excess_kurtosis(scores, "box")), "no spread at all"


def test_an_unknown_estimator_is_refused():
    with pytest.raises(UserError, match="unknown 'gspo'; allowed: grpo, gdpo"):
        advantages.main(["--estimators", "gspo"])
