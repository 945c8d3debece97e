"""Signals, surveys and states of losses in runs: no split and no number of processes shows.

The toy has three decisions a sample and groups of five; runs make four optimizer steps a step, so
that ratios leave 1.
"""

from __future__ import annotations

import pytest
import torch
from test_distributed import assert_same_trajectory, launch, torchrun
from test_resume import assert_same_run
from toy.gauss.backend import ToyBackend
from toy.run import column, metrics_of, weights_of

from mmrl.errors import UserError
from mmrl.loss_parts import sample_sums
from mmrl.objectives import real
from mmrl.preflight import micro_batch_shape
from mmrl.types import PolicyTerms, Prompt, RolloutGroup, RolloutRequest, UpdateBatch
from mmrl.windows import MicroBatch, Sample, Window, plan_windows

SEVERAL = ("training.updates_per_epoch=2", "training.num_epochs=2", "training.num_steps=3")
SAMPLES = "training.aggregation=sample_mean_of_means"
CENTRED = "advantage={name: group, deviation: none}"
OBJECTIVES = {
    "gbpo": "{name: gbpo, temperature: 1}",
    "etr": "{name: etr, reward_range: 8}",
    "r2vpo": "{name: r2vpo}",
    "mdpo": "{name: mdpo_mirror, schedule: linear}",
    "p3o_joint": "{name: p3o_pairwise, form: joint, ratio: product}",
    "real": "{name: real}",
}
WHOLE = {
    "p3o": "{name: p3o_pairwise}",
    "mdpo_squared": "{name: mdpo_mirror, form: squared}",
}
PENALISED = (
    "regularisers=[{name: orpo_occupancy, coef: 0.3}, "
    "{name: kl_target, coef: 0.1, estimator: k3, target: 0.001}]"
)


def options(objective: str) -> tuple[str, ...]:
    return (f"objective={objective}", PENALISED, SAMPLES, CENTRED, *SEVERAL)


@pytest.mark.parametrize("name", [*OBJECTIVES, *WHOLE])
def test_micro_batch_size_changes_nothing(toy, name):
    """1: a decision at a time, so no forward sees a sample, let alone a group, in one piece."""
    given = options({**OBJECTIVES, **WHOLE}[name])
    runs = [
        toy(*given, f"training.micro_batch_size={size}", f"name=with-{size}")
        for size in (1000, 1 if name in OBJECTIVES else 4)
    ]
    reference = weights_of(runs[0])
    assert reference["mean"].any(), "it learned nothing"
    for run in runs[1:]:
        for key, value in weights_of(run).items():
            torch.testing.assert_close(value, reference[key], rtol=1e-4, atol=1e-6)
        for one, other in zip(column(runs[0], "loss"), column(run, "loss"), strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_two_processes_couple_the_same_samples(toy, tmp_path):
    given = options(OBJECTIVES["real"])
    (tmp_path / "one").mkdir()
    one = toy(*given, folder=tmp_path / "one")
    assert_same_trajectory(one, launch(tmp_path / "two", torchrun(2), *given))


def test_a_state_moves_once_for_each_optimizer_step(toy):
    """Strictly on-policy the variance is 0: the multiplier falls by rate * target in each."""
    objective = "objective={name: r2vpo, target: 0.01, rate: 2, multiplier: 1}"
    run = toy(objective, "training.num_steps=3")
    assert column(run, "r2vpo/multiplier") == pytest.approx([1.0, 0.98, 0.96])
    poisoned = toy(objective, "training.num_steps=3", "backend.poison_step=1", "name=poisoned")
    assert column(poisoned, "r2vpo/multiplier") == pytest.approx([1.0, 0.98, 0.98])


@pytest.mark.parametrize(("size", "extra"), [(1000, 0), (30, 2)], ids=["whole", "halves"])
def test_only_a_ratio_other_than_one_costs_another_forward(toy, monkeypatch, size, extra):
    """And none where a micro-batch holds all samples of the optimizer step."""
    calls, own = [], ToyBackend.evaluate

    def counted(self, batch, needs):
        calls.append(torch.is_grad_enabled())
        return own(self, batch, needs)

    monkeypatch.setattr(ToyBackend, "evaluate", counted)
    one = ("training.num_steps=1", f"training.micro_batch_size={size}", SAMPLES, CENTRED)
    counts = []
    for objective, *more in (
        ("grpo",),
        ("real",),
        ("grpo", "regularisers=[{name: orpo_occupancy}]"),
        ("grpo", "training.num_epochs=2"),
        ("real", "training.num_epochs=2"),
    ):
        calls.clear()
        toy(f"objective={objective}", "regularisers=[]", *one, *more, f"name=run-{len(counts)}")
        counts.append(len(calls))
    plain, on_policy, occupancy, twice, real_twice = counts
    assert on_policy == plain
    assert occupancy == plain + extra
    assert real_twice == twice + 2 * extra


def test_progress_lowers_the_step_size(toy, monkeypatch):
    from mmrl.objectives import mdpo_mirror

    seen, own = [], mdpo_mirror.step_size

    def watched(progress, config):
        seen.append(progress)
        return own(progress, config)

    monkeypatch.setattr(mdpo_mirror, "step_size", watched)
    toy(*options(OBJECTIVES["mdpo"]), "training.micro_batch_size=1000")
    assert seen == [0.0] * 4 + [1 / 3] * 4 + [2 / 3] * 4


@pytest.mark.parametrize(
    ("objective", "more", "message"),
    [
        ("{name: p3o_pairwise}", "training.micro_batch_size=2", "splits the 3 decisions"),
        ("{name: mdpo_mirror, form: squared}", "training.micro_batch_size=1", "'mdpo_mirror'"),
        ("{name: real}", "training.group_size=1", "too small for objective 'real'"),
        ("{name: real}", "training.updates_per_epoch=5", "more than the 4 groups of a step"),
        ("{name: mdpo_mirror, form: gaussian_kl}", "seed=0", "needs mean_gap_old, step_std"),
    ],
)
def test_what_cannot_work_is_refused_before_training(toy, objective, more, message):
    with pytest.raises(UserError, match=message):
        toy(f"objective={objective}", "advantage=none", more)


@pytest.mark.parametrize(
    ("name", "message"),
    [("short", r"signal 'x' is \(1,\), not \(20,\)"), ("nan", "signal 'x' is not finite")],
)
def test_a_wrong_signal_is_an_error(toy, name, message):
    with pytest.raises(ValueError, match=message):
        toy(f"objective=toy.signals_{name}")


def test_a_part_of_weight_zero_is_never_asked(toy):
    off = toy("regularisers=[{name: orpo_occupancy, coef: 0}, {name: kl_target, coef: 0}]")
    none = toy("regularisers=[]", "name=none")
    assert_same_run(off, none)
    assert not any("kl_target/multiplier" in line for line in metrics_of(off))


@pytest.mark.parametrize("whole", [False, True])
def test_windows_of_whole_groups(whole):
    """Three ragged groups in any order: each in one window, or samples dealt evenly."""
    group_of = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    order = [8, 0, 3, 5, 1, 4, 2, 6, 7]
    asked = [
        RolloutRequest(
            prompt=Prompt(id=str(i), text=""), group_size=size, seed=0, stream=0, index=i
        )
        for i, size in enumerate((3, 2, 4))
    ]
    groups = [
        RolloutGroup(
            request=request,
            outputs=[""] * request.group_size,
            payload=None,
            mask=torch.ones(request.group_size, 2, dtype=torch.bool),
        )
        for request in asked
    ]
    windows = plan_windows(
        groups,
        [0, 0, 0],
        group_of,
        order,
        num_windows=2,
        shape=micro_batch_shape(None, 2),
        rank=0,
        world=1,
        whole_groups=whole,
    )
    found = [[s.position for rows in w.micro_batches for s in rows.samples] for w in windows]
    assert found == ([[8, 5, 6, 7, 0, 1, 2], [3, 4]] if whole else [order[:5], order[5:]])


def test_a_survey_counts_all_decisions_of_a_sample():
    """As its log-ratios do: those that a selection leaves out of the sum are looked at too."""
    request = RolloutRequest(
        prompt=Prompt(id="0", text=""), group_size=2, seed=0, stream=0, index=0
    )
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    group = RolloutGroup(request=request, outputs=["", ""], payload=None, mask=mask)
    kept = torch.tensor([False, True, False, False])
    rows = MicroBatch([Sample(group, 0, 0, kept=kept), Sample(group, 1, 1, 3.0)], slice(0, None))

    def evaluate(rows):
        batch = UpdateBatch(
            payload=None,
            mask=mask,
            advantages=torch.zeros(2).double(),
            weights=rows.weights,
            logp_old=torch.full((2, 4), -1.1),
        )
        return PolicyTerms(logp=torch.full((2, 4), -1.0)), batch

    sums = sample_sums(Window([rows]), ["old"], evaluate, 2)
    assert sums[0].tolist() == [4, 2]
    assert (sums[1] / sums[0]).tolist() == pytest.approx([0.1, 0.1], rel=1e-5)


def test_a_verdict_is_that_of_the_reward_as_it_was_earned(toy, monkeypatch):
    """What a divergence takes off the reward must not turn wrong samples into right ones."""
    seen, signals = [], real.signals

    def noted(scores, advantages, config):
        seen.append((scores, advantages))
        return signals(scores, advantages, config)

    monkeypatch.setattr(real, "signals", noted)
    toy("objective={name: real}", "kl_in_reward={coef: 0.5}", CENTRED, "training.num_steps=2")
    scores, advantages = seen[-1]
    (reward,) = scores.by_name.values()
    assert torch.equal(scores.combined, reward)
    centred = reward - reward.view(-1, 5).mean(1).repeat_interleave(5)
    assert not torch.allclose(advantages.values, centred), "the divergence is in the advantages"
