"""Runs whose decisions have advantages of their own: the split, what is kept."""

from __future__ import annotations

import json

import pytest
import torch
from test_bad_input import run_cli
from test_distributed import assert_same_trajectory
from test_language_recipes import run
from toy.run import column, weights_of

from mmrl.checkpoint import found

TERMS = "backend.terms=[logp, logp_ref, entropy, logp_tempered]"
DCPO = (
    TERMS,
    "modulators=[clip, {name: dcpo, success_above: -6, target_entropy: 1.4}]",
    "prompts.budget.name=toy.budgets",
)
SEVERAL = ("training.updates_per_epoch=2", "training.num_epochs=2")


def made(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize("updates", [(), SEVERAL], ids=["on_policy", "several"])
def test_no_split_changes_a_run(toy, tmp_path, updates):
    options = (*DCPO, *updates)
    reference = toy(*options, folder=made(tmp_path / "reference"))
    alphas, surprises = column(reference, "dcpo/alpha"), column(reference, "surprise")
    assert all(0 < alpha < 1 for alpha in alphas)
    assert len(set(surprises)) == 6
    other = toy(*options, "training.micro_batch_size=2", folder=made(tmp_path / "other"))
    assert_same_trajectory(reference, other)
    plain = toy(TERMS, "modulators=[clip]", DCPO[2], *updates, folder=made(tmp_path / "plain"))
    assert not torch.equal(weights_of(plain)["mean"], weights_of(reference)["mean"])
    progress = json.loads((found(reference)[-1] / "progress.json").read_text())
    assert progress["modulators"] == {"1": {"surprise": surprises[-1]}}


@pytest.mark.parametrize("updates", [(), SEVERAL], ids=["on_policy", "several"])
def test_without_a_push_no_bit_changes(toy, tmp_path, updates):
    neutral = "modulators=[clip, {name: dcpo, max_gap: 0}]"
    knows = "backend.knows_logp=true"
    runs = [
        toy(TERMS, option, *updates, knows, "training.num_steps=3", folder=made(tmp_path / name))
        for name, option in (("plain", "modulators=[clip]"), ("neutral", neutral))
    ]
    left, right = map(weights_of, runs)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", ["text", "vlm"])
def test_language_models_are_steered(name, tmp_path):
    """Entropy, both temperatures and the loss come from one pass; its split changes nothing."""
    selection = "[{name: d3s, samples_start: 0.5, decisions_start: 0.5}]"
    options = (
        "modulators=[{name: dcpo, target_entropy: 0.05, success_above: -0.5}]",
        f"selection={selection}",
        "training.updates_per_epoch=2",
        "prompts.budget={name: knapsack, min_count: 1, max_size: 9}",
    )
    folders = [made(tmp_path / str(size)) for size in (6, 1)]
    runs = [
        run(name, folder, 2, *options, f"training.micro_batch_size={size}")
        for folder, size in zip(folders, (6, 1), strict=True)
    ]
    assert all(column(runs[0], "dcpo/alpha"))
    assert max(column(runs[0], "selection/decisions")) < 1
    first, second = map(weights_of, runs)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["modulators=[dcpo]"], ["modulators: 'dcpo' needs logp_tempered", "does not provide"]),
        ([TERMS, "modulators=[dcpo, clip]"], ["modulators[1]: 'clip'", "put 'dcpo' last"]),
        (
            [TERMS, "modulators=[dcpo]", "objective.importance=sample"],
            ["modulators[0]: 'dcpo'", "objective 'grpo'", "objective.importance: decision"],
        ),
        (
            [TERMS, "modulators=[dcpo]", "objective={name: gbpo}"],
            ["modulators[0]: 'dcpo' may change the sign", "objective 'gbpo' does not read"],
        ),
        (
            [TERMS, "modulators=[{name: dcpo, temperature_up: 0.5}]"],
            ["modulators[0].temperature_up", "0.5"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, overrides, parts):
    result = run_cli(tmp_path, *overrides, command="check")
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in " ".join(result.output.split())
