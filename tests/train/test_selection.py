"""Selections inside a step: the update by a loop, the split."""

from __future__ import annotations

import math

import pytest
import torch
from test_bad_input import run_cli
from test_distributed import assert_same_trajectory
from toy.run import column, toy_config

from mmrl.config import apply_overrides, parse
from mmrl.rollouts import Trainable
from mmrl.runner import make_trainer, open_session
from mmrl.types import Advantages

TERMS = "backend.terms=[logp, logp_ref, entropy]"
D3S = (TERMS, "selection=[{name: d3s, samples_start: 0.5, decisions_start: 0.3}]")
PF_PPO = ("selection=[{name: pf_ppo, mode: draw}]",)
BOTH = (
    TERMS,
    "selection=[{name: pf_ppo, mode: draw}, {name: d3s, samples_start: 0.8, decisions_start: 0.5}]",
)
QUANTILE = (TERMS, "selection=[{name: entropy_quantile, share: 0.3}]")
RAGGED = "prompts.budget.name=toy.budgets"
PLAIN = ("training.num_steps=1", "regularisers=[]", "optimizer.max_grad_norm=1e9", RAGGED)
ONE_STEP = ("decision_mean", "sample_mean_of_means", "sample_mean_of_sums")


def made(folder):
    folder.mkdir()
    return folder


def first_step(folder, *overrides):
    """A trainer after its first step, and what it trained on."""
    session = open_session(parse(apply_overrides(toy_config(folder), [*PLAIN, *overrides])))
    trainer = make_trainer(session)
    seen: list[tuple[Trainable, Advantages]] = []
    trainer.observe = lambda rolled, advantages: seen.append((rolled, advantages))
    with trainer.scorer:
        values = trainer.step()
    return trainer, seen[0], values


def gradient_of(trainer):
    """Adam's first moment is a tenth of the first gradient."""
    (state,) = trainer.optimizer.state_dict()["state"].values()
    return (state["exp_avg"].double() * 10).tolist()


def oracle(rolled, advantages, aggregation, share, *, count_empty=False, by_entropy=False):
    """d loss / d mean at mean 0 by loops over the decisions that D3S keeps; ``by_entropy``: those
    that the entropy quantile does."""
    rows, position = [], 0
    for group in rolled.groups:
        for x in group.payload.tolist():
            count = 1.0 if advantages.counts is None else float(advantages.counts[position])
            if advantages.keep[position]:
                rows.append((x, float(advantages.values[position]), count))
            position += 1

    def key(v, a):
        return (abs(v) + 0.1) * (1.0 if by_entropy else abs(a))

    keys = sorted((key(v, a) for x, a, _ in rows for v in x), reverse=True)
    threshold = keys[max(1, math.ceil(share * len(keys))) - 1] * (1 - 1e-6)
    gradient, total = [0.0] * 3, 0.0
    for x, a, count in rows:
        kept = [k for k in range(3) if key(x[k], a) >= threshold]
        if not kept:
            total += count * count_empty
            continue
        total += count * (len(kept) if aggregation == "decision_mean" else 1)
        each = 1 / len(kept) if aggregation == "sample_mean_of_means" else 1
        for k in kept:
            gradient[k] -= count * a * x[k] * each
    return [value / total for value in gradient]


@pytest.mark.parametrize("aggregation", ONE_STEP)
@pytest.mark.parametrize(("options", "share"), [(D3S, 0.3), (PF_PPO, 1.0), (BOTH, 0.5)])
def test_a_step_is_that_of_the_loop(tmp_path, aggregation, options, share):
    """Micro-batches of 4 decisions hold one sample each, of 2 they cut samples."""
    for micro in (4, 2):
        trainer, (rolled, advantages), values = first_step(
            tmp_path,
            *options,
            f"training.aggregation={aggregation}",
            f"training.micro_batch_size={micro}",
        )
        assert 0 < int(advantages.keep.sum()) < 20
        assert values["selection/samples"] < 1
        expected = oracle(rolled, advantages, aggregation, share)
        assert gradient_of(trainer) == pytest.approx(expected, rel=1e-5, abs=1e-7)
        if share < 1:
            total = 3 * int(advantages.keep.sum())
            found = values["selection/decisions"]
            assert found == pytest.approx(math.ceil(share * total) / total)


@pytest.mark.parametrize("aggregation", ONE_STEP)
@pytest.mark.parametrize("micro", [4, 2, 1000])
def test_a_step_by_the_entropy_quantile_is_that_of_the_loop(tmp_path, aggregation, micro):
    options = (f"training.aggregation={aggregation}", f"training.micro_batch_size={micro}")
    trainer, (rolled, advantages), values = first_step(tmp_path, *QUANTILE, *options)
    assert advantages.keep.all()
    assert values["selection/samples"] == 1.0
    assert values["selection/decisions"] == pytest.approx(18 / 60)
    expected = oracle(rolled, advantages, aggregation, 0.3, by_entropy=True)
    assert gradient_of(trainer) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("micro", [4, 2, 1000])
@pytest.mark.parametrize("aggregation", ["sample_mean_of_means", "sample_mean_of_sums"])
def test_samples_without_a_trained_decision_count_on_request(tmp_path, aggregation, micro):
    options = (*D3S, f"training.aggregation={aggregation}", f"training.micro_batch_size={micro}")
    trainer, (rolled, advantages), _ = first_step(tmp_path, *options, "training.count_empty=true")
    found = gradient_of(trainer)
    expected = oracle(rolled, advantages, aggregation, 0.3, count_empty=True)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    without = oracle(rolled, advantages, aggregation, 0.3)
    assert max(map(abs, without)) > 1.1 * max(map(abs, expected)), "some samples lost all of theirs"


def test_a_sample_drawn_twice_is_a_sample_that_stands_there_twice(tmp_path):
    """Against the oracle of repeated rows, which knows no counts."""
    trainer, (rolled, advantages), _ = first_step(tmp_path, *PF_PPO)
    payload = torch.cat([group.payload for group in rolled.groups])
    repeats = torch.repeat_interleave(
        torch.arange(20), (advantages.counts * advantages.keep).long()
    )
    assert len(repeats) == 20, "as many draws as samples"
    x, a = payload[repeats].double(), advantages.values[repeats]
    expected = -(a[:, None] * x).sum(0) / (3 * len(repeats))
    assert gradient_of(trainer) == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-7)


NEUTRAL = (
    (TERMS, "selection=[{name: d3s, samples_start: 1, decisions_start: 1}]"),
    (TERMS, "selection=[{name: d3s, samples_start: 1, decisions_start: 1, scope: group}]"),
    (TERMS, "selection=[{name: entropy_quantile, share: 1}]"),
)


@pytest.mark.parametrize("options", NEUTRAL)
def test_full_shares_change_no_bit(tmp_path, options):
    _, _, plain = first_step(tmp_path, TERMS)
    trainer, _, values = first_step(tmp_path, *options)
    expected = gradient_of(first_step(tmp_path, TERMS)[0])
    assert gradient_of(trainer) == expected
    assert values["selection/samples"] == 1.0
    clock = ("time/", "step_time", "selection/")
    for name in plain:
        assert name.startswith(clock) or values[name] == plain[name], name


def test_a_ratio_of_a_sample_is_that_of_all_its_decisions(tmp_path):
    """Two updates in which half of the decisions are left out: the ratio's mean is over all."""
    options = (*D3S, "objective.importance=sample", "training.updates_per_epoch=1")
    trainer, _, values = first_step(tmp_path, *options, "training.num_epochs=2")
    whole = first_step(tmp_path, TERMS, *options[1:], "training.num_epochs=2")[2]
    assert values["ratio/mean"] == whole["ratio/mean"]
    assert trainer.progress.updates == 2


@pytest.mark.parametrize("options", [D3S, BOTH, QUANTILE])
def test_no_split_changes_a_run(toy, tmp_path, options):
    moves = options != QUANTILE
    options = (*options, RAGGED, "training.updates_per_epoch=2", "training.num_epochs=2")
    reference = toy(*options, folder=made(tmp_path / "reference"))
    other = toy(*options, "training.micro_batch_size=1", folder=made(tmp_path / "other"))
    assert_same_trajectory(reference, other)
    shares = column(reference, "selection/decisions")
    assert max(shares) < 1
    assert len(set(shares)) > 1 or not moves, "the schedule moves"


def test_a_step_without_a_signal_is_skipped(tmp_path):
    trainer, (_, advantages), values = first_step(
        tmp_path, *D3S, "rewards.0.name=toy.rewards.constant"
    )
    assert not advantages.keep.any()
    assert values["skipped_steps"] == 1.0
    assert trainer.progress.updates == 0


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["selection=[d4s]"], ["selection[0].name", "did you mean 'd3s'"]),
        (["selection=[{name: d3s}]"], ["selection: 'd3s' needs entropy", "does not provide"]),
        (
            ["selection=[entropy_quantile]"],
            ["selection: 'entropy_quantile' needs entropy", "does not provide"],
        ),
        (["selection=[entropy_quantil]"], ["did you mean 'entropy_quantile'"]),
        (["selection=[{name: entropy_quantile, share: 0}]"], ["selection[0].share", "0"]),
        (["selection=[{name: d3s, samples_start: 0}]"], ["selection[0].samples_start", "0"]),
        (["selection=[{name: pf_ppo, strategy: pow}]"], ["selection[0]", "allowed: draw"]),
        (
            ["selection=[pf_ppo]", "objective={name: real}"],
            ["selection[0]: 'pf_ppo' leaves few samples", "objective: 'real' compares the samples"],
        ),
        (
            ["selection=[pf_ppo]", "advantage=none", "training.group_size=1"],
            ["training.group_size", "'pf_ppo'", "2 or more"],
        ),
    ],
)
def test_selections_that_do_not_fit_are_refused(tmp_path, overrides, parts):
    result = run_cli(tmp_path, *overrides)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in " ".join(result.output.split())
