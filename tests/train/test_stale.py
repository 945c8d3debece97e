"""Groups of earlier steps trained again: by hand, neutral where none is kept, on every backend,
over processes and resumes, and what is refused.

The toy is x_k ~ N(m_k, 1) with three decisions; its log-probability is -(x_k - m_k)^2 / 2.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import run_cli
from test_distributed import assert_same_trajectory, launch, torchrun
from test_ratio_control_runs import diffusion, language
from test_resume import assert_same_run, command, environment, made
from toy.gauss.backend import ToyBackend
from toy.run import column, metrics_of, toy_config, weights_of

from mmrl.checkpoint import found
from mmrl.config import apply_overrides, parse, parse_part
from mmrl.objectives import gbpo
from mmrl.preflight import describe
from mmrl.runner import make_trainer, open_session
from mmrl.sharding import trainable, whole
from mmrl.stale import Kept, Stale, drawn

STALE = "training.stale={steps: 2, groups: 3}"
R2VPO = ("objective={name: r2vpo, rate: 0}", "regularisers=[]")
MANY = ("training.updates_per_epoch=2", "training.num_epochs=2")
KNOWS = pytest.mark.parametrize("knows", ["backend.knows_logp=true", "backend.knows_logp=false"])


def trainer_of(folder, *overrides):
    trainer = make_trainer(open_session(parse(apply_overrides(toy_config(folder), overrides))))
    seen = []
    trainer.observe = lambda rolled, advantages: seen.append((rolled, advantages))
    return trainer, seen


def moment_of(trainer):
    (state,) = trainer.optimizer.state_dict()["state"].values()
    return state["exp_avg"].double().clone()


def samples_of(rolled, advantages):
    """(x, A) of a step, in order."""
    rows = [row for group in rolled.groups for row in group.payload.tolist()]
    return list(zip(rows, advantages.values.tolist(), strict=True))


# By hand


@KNOWS
@pytest.mark.parametrize("size", [1000, 2])
def test_a_stale_sample_is_compared_with_the_policy_that_drew_it(tmp_path, knows, size):
    """All groups of the first step again in the second, which has made one update.  Micro-batches
    of two decisions cut samples.
    """
    trainer, seen = trainer_of(
        tmp_path, *R2VPO, knows, "training.stale={steps: 1, groups: 4}",
        f"training.micro_batch_size={size}", "optimizer.max_grad_norm=1e9",
    )  # fmt: skip
    with trainer.scorer:
        first = trainer.step()
        before, means = moment_of(trainer), trainer.backend.model.mean.tolist()
        second = trainer.step()
    assert any(abs(m) > 0.01 for m in means), "the policy has moved"
    (old, new) = (samples_of(*step) for step in seen)
    squares, gradient, count = [], [0.0] * 3, 3 * (len(old) + len(new))
    for x, a in old:
        for k, m in enumerate(means):
            stored = -0.5 * x[k] ** 2  # under the mean 0 that drew it
            ratio = math.exp(-0.5 * (x[k] - m) ** 2 - stored)
            squares.append((ratio - 1) ** 2)
            gradient[k] += (-a + 2 * (ratio - 1)) * ratio * (x[k] - m) / count
    for x, a in new:
        for k, m in enumerate(means):
            gradient[k] += -a * (x[k] - m) / count
    assert second["stale/ratio_variance"] == pytest.approx(sum(squares) / len(squares), rel=1e-4)
    assert second["stale/ratio_variance_fresh"] == pytest.approx(0, abs=1e-10)
    assert second["ratio/variance"] == pytest.approx(sum(squares) / count, rel=1e-4)
    # Adam: moment = 0.9 before + 0.1 gradient.
    found = ((moment_of(trainer) - 0.9 * before) / 0.1).tolist()
    assert found == pytest.approx(gradient, rel=1e-3, abs=1e-6)
    assert (first["stale/share"], second["stale/share"], second["stale/age"]) == (0, 0.5, 1)
    assert "stale/age" not in first


def test_what_is_stored_is_never_found_again(tmp_path):
    """Two steps later it is what it was, of float32, though the policy has moved."""
    trainer, _ = trainer_of(tmp_path, *R2VPO, "training.stale={steps: 3, groups: 4}")
    with trainer.scorer:
        trainer.step()
        kept = trainer.stale.kept[0]
        stored = kept.own.tensors["logp_old"].clone()
        assert stored.dtype == torch.float32
        assert torch.equal(stored, -0.5 * kept.own.tensors["payload.x"] ** 2)
        trainer.step()
        trainer.step()
    assert trainer.stale.kept[0] is kept
    assert torch.equal(kept.own.tensors["logp_old"], stored)


def test_groups_keep_their_advantages_and_signals(tmp_path, monkeypatch):
    """Those of their own step: a signal of ``gbpo`` is asked of the fresh groups alone."""
    asked, own = [], gbpo.signals

    def noted(scores, advantages, config):
        asked.append(own(scores, advantages, config)["gap"])
        return {"gap": asked[-1]}

    monkeypatch.setattr(gbpo, "signals", noted)
    trainer, seen = trainer_of(
        tmp_path, "objective={name: gbpo, temperature: 1}", "regularisers=[]", STALE
    )
    with trainer.scorer:
        trainer.step()
        trainer.step()
    assert [len(gap) for gap in asked] == [20, 20]
    for kept in trainer.stale.kept:
        places = slice(5 * kept.own.request.index, 5 * kept.own.request.index + 5)
        assert torch.equal(kept.values, seen[kept.step][1].values[places])
        assert torch.equal(kept.signals["objective"]["gap"], asked[kept.step][places])


def test_nothing_is_kept_of_a_group_without_a_trained_sample(tmp_path):
    trainer, seen = trainer_of(
        tmp_path, *R2VPO, STALE, "rewards.0.name=toy.rewards.nan_on_first", "seed=1"
    )
    with trainer.scorer:
        trainer.step()
        trainer.step()
    unscored = [not s.valid.any() for rolled, _ in seen for s in rolled.scores]
    assert 0 < sum(unscored) < len(unscored) == 8
    assert len(trainer.stale.kept) == 8 - sum(unscored)
    assert all(kept.keep.any() for kept in trainer.stale.kept)


# Neutral


def test_without_it_there_is_no_trace(toy):
    run = toy()
    assert not any("stale" in name for line in metrics_of(run) for name in line)
    assert not any("stale" in path.name for path in found(run)[-1].iterdir())
    assert "stale" not in (found(run)[-1] / "progress.json").read_text()


@KNOWS
@pytest.mark.parametrize("updates", [(), MANY])
def test_a_step_with_nothing_kept_is_that_without_it(toy, updates, knows):
    """The first one, to the bit; also where the ratio was 1 by construction."""
    given = (*R2VPO, *updates, knows, "training.num_steps=1")
    off, on = toy(*given, "name=without"), toy(*given, STALE, "name=with")
    left, right = weights_of(off), weights_of(on)
    assert all(torch.equal(left[name], right[name]) for name in left)
    for one, other in zip(metrics_of(off), metrics_of(on), strict=True):
        assert one == {k: v for k, v in other.items() if "stale" not in k}


# The draw


def kept_of(*steps: int) -> list[Kept]:
    one = torch.ones(1).double()
    return [
        Kept(step=s, owner=0, rewards=one, values=one, keep=one > 0, signals={}, own=None)
        for s in steps
    ]


def test_the_draw_follows_from_seed_and_step():
    kept = kept_of(*range(8))
    chosen = [[k.step for k in drawn(kept, 3, seed=1, step=step)] for step in range(200)]
    assert chosen == [[k.step for k in drawn(kept, 3, seed=1, step=step)] for step in range(200)]
    assert chosen != [[k.step for k in drawn(kept, 3, seed=2, step=step)] for step in range(200)]
    assert all(steps == sorted(set(steps)) and len(steps) == 3 for steps in chosen)
    counts = torch.bincount(torch.tensor(chosen).flatten(), minlength=8)
    assert 45 < counts.min() <= counts.max() < 105, "75 of each are expected"
    assert drawn(kept, 9, seed=1, step=0) == kept
    assert drawn([], 3, seed=1, step=0) == []


def test_groups_go_when_their_steps_are_over(toy):
    run = toy(*R2VPO, "training.stale={steps: 2, groups: 8}")
    assert column(run, "stale/age") == [1.0, *[1.5] * 4], "all that there are"
    assert column(run, "stale/share") == pytest.approx([0, 1 / 2, *[2 / 3] * 4])


# No split shows


@pytest.mark.parametrize(
    "objective",
    ["{name: r2vpo}", "{name: gbpo, temperature: 1}", "{name: grpo, importance: sample}"],
)
def test_micro_batch_size_changes_nothing(toy, objective):
    """Also where groups differ in size, and a penalty is weighted by the ratio."""
    given = (
        f"objective={objective}", *MANY, STALE, "training.num_steps=4",
        "prompts.budget.name=toy.budgets", "regularisers.0.ratio_weighted=true",
        "training.aggregation=sample_mean_of_means",
    )  # fmt: skip
    one, other = (
        toy(*given, f"training.micro_batch_size={size}", f"name=with-{size}") for size in (999, 4)
    )
    right = weights_of(other)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-6)
    assert column(one, "stale/ratio_variance") == pytest.approx(
        column(other, "stale/ratio_variance"), rel=1e-3
    )


@pytest.mark.slow
def test_two_processes_equal_one_and_one_goes_on_alone(toy, tmp_path):
    """Their groups are dealt anew where another number of processes goes on."""
    given = ("objective=r2vpo", "regularisers=[]", *MANY, STALE, "evaluation.every=2")
    one, two = made(tmp_path / "one"), tmp_path / "two"
    whole_run = toy(*given, "training.num_steps=6", folder=one)
    part = launch(two, torchrun(2), *given, "training.num_steps=4")
    files = {path.name for path in found(part)[-1].glob("stale*")}
    assert files == {"stale.json", "stale-0.safetensors", "stale-1.safetensors"}
    record = json.loads((found(part)[-1] / "stale.json").read_text())
    assert {group["owner"] for group in record["groups"]} == {0, 1}
    assert_same_trajectory(whole_run, toy(*given, resume=True, folder=two))


# Resumes


def test_sigkill_and_resume_is_bit_identical(tmp_path, toy):
    """Killed in step 6 of 6, which trains groups of steps 4 and 5 again."""
    given = ("rewards.0.name=toy.rewards.kills_itself", "objective=r2vpo", *MANY, STALE)
    given = (*given, "regularisers=[]", "checkpoint.every=1")
    unbroken = toy(*given, folder=made(tmp_path / "unbroken"))
    extra = environment(TOY_KILL_MARKER=str(tmp_path / "killed"), TOY_KILL_CALL="22")
    start = command(tmp_path / "broken", *given)
    killed = subprocess.run(start, env=extra, capture_output=True, timeout=200, check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = subprocess.run(
        [*start, "--resume"], env=extra, capture_output=True, timeout=200, check=False, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(unbroken, tmp_path / "broken" / "toy")
    left, right = (
        found(run)[-1] / "stale-0.safetensors" for run in (unbroken, tmp_path / "broken" / "toy")
    )
    one, other = load_file(left), load_file(right)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_replay_is_checked_on_fresh_samples_alone(toy, tmp_path):
    """After a resume the first batch has stale ones, which lie far from what they were."""
    given = (*R2VPO, "backend.knows_logp=true", STALE, "optimizer.learning_rate=0.3")
    given = (*given, "evaluation.every=1", "checkpoint.every=1")
    whole_run = toy(*given, "training.num_steps=4", folder=made(tmp_path / "whole"))
    part = made(tmp_path / "part")
    toy(*given, "training.num_steps=2", folder=part)
    resumed = toy(*given, "training.num_steps=4", resume=True, folder=part)
    assert column(resumed, "stale/ratio_variance")[-1] > 1e-3
    assert_same_run(whole_run, resumed)


def test_a_prompt_that_is_gone_is_named(toy, tmp_path):
    given = (*R2VPO, STALE, "evaluation.source=null", "training.num_steps=2")
    toy(*given, folder=tmp_path)
    config = parse(apply_overrides(toy_config(tmp_path), [*given, "training.num_steps=3"]))
    trainer = make_trainer(open_session(config))
    trainer.scorer.close()
    trainer.stale.prompts = trainer.stale.prompts[:1]
    with pytest.raises(Exception, match=r"the prompt 'go to \d' of a group that training.stale"):
        trainer.stale.load(found(tmp_path / "toy")[-1])


# Every backend

OBJECTIVE = parse_part("objectives", {"name": "r2vpo", "rate": 0}, "objective")


def stale_config(kind, folder, **changes):
    config = (language if kind in ("text", "vlm") else diffusion)(kind, folder)
    section = {
        "stale": {"steps": 2, "groups": 3},
        "updates_per_epoch": 1,
        "num_steps": 4,
        **changes,
    }
    data = config.dump()
    data["training"] |= section
    data["objective"] = OBJECTIVE.dump()
    return parse(data)


def same(left, right) -> bool:
    """Equal to the bit: tensors, records and lists of them."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if is_dataclass(left) and left is not right:
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("kind", ["text", "vlm", "matching", "transition"])
def test_every_backend_keeps_saves_and_scores_its_samples(kind, tmp_path):
    """A checkpoint gives back what was kept, to the bit.  The ratio of fresh samples is 1."""
    config = stale_config(kind, tmp_path)
    trainer, rolled = make_trainer(open_session(config)), []
    trainer.observe = lambda found, advantages: rolled.append(found.groups)
    with trainer.scorer:
        first, second = trainer.step(), trainer.step()
    assert first["stale/share"] == 0
    assert 0 < second["stale/share"] <= 0.5
    assert second["stale/ratio_variance"] > 0
    assert second["stale/ratio_variance_fresh"] == pytest.approx(0, abs=1e-9)
    other = Stale(
        config=config,
        accelerator=trainer.accelerator,
        backend=trainer.backend,
        prompts=trainer.prompts,
    )
    trainer.stale.save(tmp_path)
    other.load(tmp_path)
    assert len(other.kept) == len(trainer.stale.kept) > 0
    for one, two in zip(trainer.stale.kept, other.kept, strict=True):
        assert torch.equal(one.values, two.values)
        assert torch.equal(one.keep, two.keep)
        assert one.own.request == two.own.request
        assert one.own.tensors.keys() == two.own.tensors.keys()
        assert all(torch.equal(x, two.own.tensors[n]) for n, x in one.own.tensors.items())
        fresh = rolled[one.step][one.own.request.index]
        for stale, k in ((trainer.stale, one), (other, two)):
            group = stale._group(k, 7, 2)
            assert group.request == replace(fresh.request, index=7)
            assert group.age == 2 - k.step
            rows = [(g, i) for g in (fresh, group) for i in range(g.request.group_size)]
            size = len(rows) // 2
            assert same(trainer.backend.collate(rows[:size]), trainer.backend.collate(rows[size:]))


def test_the_anchor_of_half_precision_is_that_of_the_fresh_sample(tmp_path):
    """Asked for once, in the batch that is trained: the ratio of a fresh sample is exactly 1."""
    config = stale_config("text", tmp_path)
    data = config.dump()
    data["backend"]["model"]["dtype"] = "bf16"
    trainer = make_trainer(open_session(parse(data)))
    before = {n: x.clone() for n, x in whole(trainable(trainer.backend.model)).items()}
    with trainer.scorer:
        logged = [trainer.step() for _ in range(3)]
    assert [line["stale/ratio_variance_fresh"] for line in logged] == [0.0, 0.0, 0.0]
    assert all(line["stale/ratio_variance"] > 0 for line in logged[1:])
    after = whole(trainable(trainer.backend.model))
    assert any(not torch.equal(x, after[n]) for n, x in before.items())


# Refusals

REFUSED = [
    (("training.stale={steps: 2, groups: 9}",), "training.stale.groups: 9 is more than the 8"),
    (("training.stale={steps: 2, group: 9}",), "training.stale.group: unknown key"),
    (("training.stale={steps: 0, groups: 1}",), "training.stale.steps"),
    (("backend.keeps=false",), "backend 'toy.gauss' cannot save its samples"),
    (("selection=[{name: pf_ppo}]",), "selection[0]: 'pf_ppo' does not see"),
    (("modulators=[{name: dcpo}]", "backend.terms=[logp, logp_ref, logp_tempered]"), "'dcpo'"),
    (("objective=sft",), "objective 'sft' does not weigh"),
    (("objective=reinforce",), "objective 'reinforce' does not weigh"),
    (("objective=real",), "objective 'real' does not weigh"),
    (("objective={name: p3o_pairwise, form: joint}",), "objective 'p3o_pairwise'"),
    (
        ("objective={name: mdpo_mirror, form: gaussian_kl}",
         "backend.terms=[logp, logp_ref, mean_gap_old, step_std]"),
        "objective: 'mdpo_mirror' compares means",
    ),
    (("regularisers=[{name: kl_reference, estimator: k3}]",), "regularisers[0].ratio_weighted"),
    (("regularisers=[{name: orpo_occupancy}]",), "regularisers[0]: 'orpo_occupancy'"),
    (("regularisers=[{name: kl_target, estimator: k3}]",), "regularisers[0]: 'kl_target'"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_work_is_refused_by_name(tmp_path, overrides, message):
    """Before anything is loaded, with exit code 2."""
    done = run_cli(tmp_path, "objective=r2vpo", "regularisers=[]", STALE, *overrides)
    text = " ".join((done.output + str(getattr(done, "stderr", ""))).split())
    assert done.exit_code == 2, text
    assert message in text
    assert "training.stale" in text


def test_ratio_free_objectives_of_images_are_refused(tmp_path):
    """They read velocities, not ratios."""
    for name in ("nft", "opd", "grpo_guard"):
        config = parse(apply_overrides(toy_config(tmp_path), [f"objective={name}"]))
        assert not hasattr(config.objective.module, "TAKES_STALE")


def test_it_cannot_be_switched_on_in_the_middle(toy):
    toy(*R2VPO)
    with pytest.raises(Exception, match=r"training\.stale"):
        toy(*R2VPO, STALE, resume=True)


def test_check_counts_stale_samples(tmp_path):
    lines = dict(describe(parse(apply_overrides(toy_config(tmp_path), [*R2VPO, STALE]))))
    assert lines["stale samples"] == "15 more, of the last 2 steps"
    assert lines["micro-batches"].startswith("35 per optimizer step")
    assert "stale samples" not in dict(describe(parse(toy_config(tmp_path))))


def test_the_toy_is_asked_once_more_for_its_anchors(toy, monkeypatch):
    """What it costs where the rollout does not know: one pass without gradient a step."""
    calls, own = [], ToyBackend.evaluate

    def counted(self, batch, needs):
        calls.append(torch.is_grad_enabled())
        return own(self, batch, needs)

    monkeypatch.setattr(ToyBackend, "evaluate", counted)
    given = (*R2VPO, "training.num_steps=1", "training.micro_batch_size=1000")
    toy(*given, "name=without")
    off = len(calls)
    toy(*given, STALE, "name=with")
    assert len(calls) == 2 * off + 1
