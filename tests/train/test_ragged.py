"""Groups of unlike sizes in one step: the update, the split, what is written."""

from __future__ import annotations

import math

import pytest
import torch
from test_bad_input import run_cli
from test_distributed import assert_same_trajectory
from toy.gauss.backend import noise
from toy.run import column, metrics_of, toy_config, weights_of

from mmrl import facts
from mmrl.config import apply_overrides, parse
from mmrl.prompts.dataset import load_prompts
from mmrl.rollouts import make_requests

RAGGED = "prompts.budget.name=toy.budgets"
KNAPSACK = (
    "prompts.budget={name: knapsack, min_count: 2, success_above: -7, max_size: 9}",
    "training.updates_per_epoch=2",
)


def made(folder):
    folder.mkdir()
    return folder


def oracle_gradient(folder, aggregation):
    """Of the first step at mean 0, by loops: d loss / d mean of K = 3 Gaussians of width 1."""
    config = parse(apply_overrides(toy_config(folder), [RAGGED]))
    prompts = load_prompts(config.prompts.source, "prompts.source", {})
    chosen, _ = config.prompts.sampler.module.take(
        prompts, 4, 0, 0, config.prompts.sampler.config, {}
    )
    # Of the budget's sizes 4, 6, 3, 7 in the sampler's order.
    order = [3, 1, 0, 2]
    sizes = [[4, 6, 3, 7][i] for i in order]
    groups = []
    for request in make_requests([chosen[i] for i in order], sizes, 0, 0):
        xs = [noise(request, i, 3).double().tolist() for i in range(request.group_size)]
        goal = request.prompt.columns["target"]
        groups.append([(x, -sum((v - goal) ** 2 for v in x)) for x in xs])
    rewards = [r for group in groups for _, r in group]
    centre = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((r - centre) ** 2 for r in rewards) / len(rewards))
    gradient, count = [0.0] * 3, 0
    for group in groups:
        mean = math.fsum(r for _, r in group) / len(group)
        for x, reward in group:
            advantage = (reward - mean) / (deviation + 1e-4)
            count += 3 if aggregation == "decision_mean" else 1
            share = 1 / 3 if aggregation == "sample_mean_of_means" else 1
            for k in range(3):
                gradient[k] -= advantage * x[k] * share
    return [value / count for value in gradient]


@pytest.mark.parametrize(
    "aggregation", ["decision_mean", "sample_mean_of_means", "sample_mean_of_sums"]
)
@pytest.mark.parametrize("micro", [1, 5, 1000])
def test_a_step_is_that_of_the_loop(toy, tmp_path, aggregation, micro):
    run = toy(
        RAGGED,
        "training.num_steps=1",
        f"training.aggregation={aggregation}",
        f"training.micro_batch_size={micro}",
        "regularisers=[]",
        "optimizer.max_grad_norm=1e9",
    )
    (name,) = [n for n in weights_of(run) if n.endswith("exp_avg")]
    expected = oracle_gradient(tmp_path, aggregation)
    # Adam's first moment is a tenth of the first gradient.
    found = (weights_of(run)[name] * 10).tolist()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert column(run, "budget/min_group_size") == [3.0]
    assert column(run, "budget/max_group_size") == [7.0]
    assert column(run, "num_samples") == [20.0]


UNIT = ("rewards.0.name=toy.rewards.likeness", "prompts.budget.success_above=1.0e-3")
"""A reward between 0 and 1, and where it is a success as often as the other one."""
SAMPLES = ("training.aggregation=sample_mean_of_means", "advantage={name: group, deviation: none}")
RUNS = {
    "group": ("advantage={name: group, deviation: group}",),
    "leave_one_out": ("advantage=leave_one_out",),
    "g2rpo": ("advantage=g2rpo",),
    "per_reward": ("advantage=per_reward",),
    "risk": ("advantage={name: risk, measure: mixed_var}",),
    "riskpo": ("advantage={name: riskpo, bundle_size: 2}",),
    "bnpo": ("advantage=bnpo", *UNIT),
    "gdpo": ("advantage={name: gdpo_decoupled, batch: decision}",),
    "copo": ("advantage={name: copo_consistency, sharpness: 3}",),
    "optimal_baseline": ("advantage=optimal_baseline",),
    "subpo": ("advantage={name: subpo, function: log_det, reward_weight: 0.5}", *UNIT),
    "gp_loo": ("advantage=gp_loo",),
    "adora": ("modulators=[{name: adora, rule: vlm, success: -4}]",),
    "real": ("objective=real", *SAMPLES),
    "p3o": ("objective=p3o_pairwise", *SAMPLES),
    "p3o_joint": ("objective={name: p3o_pairwise, form: joint}", *SAMPLES),
    "occupancy": ("regularisers=[{name: orpo_occupancy, coef: 0.1}]", *SAMPLES),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_split_changes_a_ragged_run(toy, tmp_path, name, monkeypatch):
    # What a sample of numbers answers: on which side of 1 the first one is.
    monkeypatch.setattr(facts, "answerer", lambda specs: lambda output: str(output[0] > 1))
    options = (*KNAPSACK, *RUNS[name], "training.num_epochs=2")
    reference = toy(*options, folder=made(tmp_path / "reference"))
    sizes = column(reference, "budget/max_group_size")
    assert max(sizes) > min(column(reference, "budget/min_group_size")), "groups differ in size"
    assert set(column(reference, "num_samples")) == {20.0}
    whole = 3 if name == "p3o" else 1  # it needs all decisions of a sample
    micro = f"training.micro_batch_size={whole}"
    other = toy(*options, micro, folder=made(tmp_path / "other"))
    assert_same_trajectory(reference, other)


def test_a_budget_without_room_is_none(toy, tmp_path):
    """Every group of 5, as there is no other size: bit for bit, all that is logged too."""
    room = "min_size: 5, min_size_certain: 5, max_size: 5"
    budget = f"prompts.budget={{name: knapsack, min_count: 2, success_above: -7, {room}}}"
    plain = toy(*KNAPSACK[1:], folder=made(tmp_path / "plain"))
    fixed = toy(budget, *KNAPSACK[1:], folder=made(tmp_path / "fixed"))
    assert any(column(fixed, "budget/uncertain")), "some prompts are worth more than others"
    left, right = weights_of(plain), weights_of(fixed)
    assert all(torch.equal(left[name], right[name]) for name in left)
    rows = [
        {name: value for name, value in row.items() if not name.startswith("budget/")}
        for row in metrics_of(fixed)
    ]
    assert rows == metrics_of(plain)


def test_check_counts_the_samples_of_a_budget(tmp_path):
    result = run_cli(tmp_path, "prompts.budget={name: knapsack, max_size: 9}", command="check")
    assert result.exit_code == 0, result.output
    assert "20 = 4 prompts x 5 (2 to 9)" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["prompts.budget=knapsak"], ["prompts.budget.name", "did you mean 'knapsack'"]),
        (["prompts.budget={name: knapsack, max_size: 4}"], ["training.group_size: 5", "to 4"]),
        (
            ["prompts.budget=knapsack", "training.refills=1", "training.prompts_per_step=2"],
            ["prompts.budget", "training.refills: 1"],
        ),
        (
            ["prompts.budget={name: toy.budgets, least: 1}"],
            ["prompts.budget", "groups of 1", "'group'", "2 or more"],
        ),
        (
            ["prompts.budget={name: knapsack, reward: rihgt}"],
            ["prompts.budget.reward", "'rihgt'", "near"],
        ),
    ],
)
def test_budgets_that_do_not_fit_are_refused(tmp_path, overrides, parts):
    result = run_cli(tmp_path, *overrides)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in " ".join(result.output.split())
