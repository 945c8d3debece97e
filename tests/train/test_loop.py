"""The loop learns, and what it does depends on the configuration alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from toy.run import column, metrics_of, toy_config, weights_of

from mmrl.errors import UserError
from mmrl.replay import Replay


def test_learns(toy):
    run = toy("training.num_steps=40")
    rewards, held_out = column(run, "reward"), column(run, "eval/near")
    # A perfect mean gains about 6: three decisions, targets near 1.4.
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 2
    assert held_out[-1] > held_out[0] + 2


def test_a_flipped_reward_unlearns(toy):
    held_out = column(toy("training.num_steps=40", "rewards.0.weight=-1"), "eval/near")
    assert held_out[-1] < held_out[0] - 2


@pytest.mark.parametrize("size", [1, 3, 20, 1000])
def test_micro_batch_size_changes_nothing(toy, tmp_path, size):
    reference = weights_of(toy(folder=made(tmp_path / "reference")))
    other = weights_of(toy(f"training.micro_batch_size={size}", folder=made(tmp_path / "other")))
    # Sums of 60 float32 terms in another order; the parameters are of order 0.1.
    for name, value in reference.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


def test_same_seed_same_run_other_seed_other_run(toy, tmp_path):
    first, again, other = (
        weights_of(toy(f"seed={seed}", folder=made(tmp_path / name)))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mean"], other["mean"])


def test_first_update_is_the_hand_computed_one(toy):
    """One plain step: Adam's first move is learning_rate in the direction of the gradient."""
    run = toy("training.num_steps=1", "regularisers=[]", "optimizer.weight_decay=0")
    moved = weights_of(run)["mean"]
    assert torch.allclose(moved.abs(), torch.full_like(moved, 0.05), rtol=1e-3)


@pytest.mark.parametrize("option", ["updates_per_epoch=3", "num_epochs=2"])
def test_ratio_leaves_one_only_after_the_first_update(toy, option):
    on_policy = toy("training.num_steps=1", "name=single")
    several = toy("training.num_steps=1", "name=several", f"training.{option}")
    assert column(on_policy, "ratio/mean") == [1.0]
    assert column(on_policy, "approx_kl") == [0.0]
    assert column(several, "approx_kl")[0] > 0.0


def test_off_policy_ratio_is_against_the_sampling_policy(toy):
    kl = column(toy("backend.off_policy=true"), "approx_kl")
    assert kl[0] == 0.0
    assert all(value > 0 for value in kl[1:])


def test_known_logp_gives_ratio_one(toy):
    assert column(toy("backend.knows_logp=true"), "ratio/mean") == [1.0] * 6


@pytest.mark.parametrize("known", ["true", "false"])
def test_preflight_refuses_a_drifting_replay(toy, known):
    with pytest.raises(UserError, match=r"log-ratio of 0\.001"):
        toy("backend.drift=0.001", f"backend.knows_logp={known}")


def test_nonfinite_gradients_are_skipped_and_counted(toy):
    assert column(toy("backend.poison_step=2"), "bad_updates") == [0, 0, 1, 1, 1, 1]


def test_too_many_nonfinite_gradients_abort(toy):
    with pytest.raises(UserError, match=r"training\.max_bad_updates: 2"):
        toy(
            "backend.poison_step=1",
            "training.max_bad_updates=2",
            "training.updates_per_epoch=2",
        )


def test_an_adapter_that_never_moved_is_an_error(toy):
    with pytest.raises(UserError, match="identical to the initial"):
        toy("rewards.0.name=toy.rewards.constant", "regularisers=[]", "optimizer.weight_decay=0")


def test_prompts_that_a_reward_has_no_number_for_are_counted(toy):
    everywhere = column(toy("name=everywhere"), "rewards/near/scored")
    assert everywhere == [1.0] * 6
    run = toy("rewards.0.name=toy.rewards.nan_on_first")
    scored, invalid = (column(run, key) for key in ("rewards/near/scored", "invalid_samples"))
    assert set(scored) == {1.0, 0.75}, "a step has four of the six prompts"
    assert scored == [1 - count / 20 for count in invalid]
    assert column(run, "rewards/near/failed") == []


def test_prompts_of_other_tasks_do_not_count_as_unscored(toy, tmp_path):
    toy_config(tmp_path)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    tasks = ["walk"] + ["run"] * (len(lines) - 1)
    both = [json.loads(x) | {"task": task} for x, task in zip(lines, tasks, strict=True)]
    source = tmp_path / "tasks.jsonl"
    source.write_text("\n".join(map(json.dumps, both)))
    walk = "{name: toy.rewards.near_target, label: walk, tasks: [walk]}"
    near = "{name: toy.rewards.near_target, label: near}"
    run = toy(f"prompts.source={source}", f"rewards=[{near}, {walk}]")
    assert column(run, "rewards/near/scored") == [1.0] * 6
    scored = column(run, "rewards/walk/scored")
    assert set(scored) == {1.0}
    assert len(scored) < 6, "absent in a step that did not ask it"


def test_a_judge_counts_the_held_out_prompts_of_its_own_tasks_only(toy, tmp_path):
    toy_config(tmp_path)
    walk = tmp_path / "walk.jsonl"
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    walk.write_text(lines[-1])
    judges = (
        "{name: toy.rewards.near_target, label: walk, tasks: [walk]}",
        "{name: toy.rewards.nan_on_first, label: partly}",
        "{name: toy.rewards.near_target, label: near}",
    )
    run = toy(
        f"evaluation.source={{walk: {walk}, run: {tmp_path / 'prompts.jsonl'}}}",
        f"evaluation.rewards=[{', '.join(judges)}]",
    )
    first = next(line for line in metrics_of(run) if "eval/near" in line)
    assert first["eval/walk"] != first["eval/near"]
    # Seven prompts, two samples of each; the judge has no number for one of them.
    unjudged = {key: value for key, value in first.items() if key.endswith("_unjudged")}
    assert unjudged == {"eval/partly_unjudged": 2.0}
    none = toy(
        "name=none",
        f"evaluation.source={{run: {tmp_path / 'prompts.jsonl'}, walk: {walk}}}",
        "evaluation.max_prompts=1",
        f"evaluation.rewards=[{judges[2]}, {judges[0]}]",
    )
    names = {key for line in metrics_of(none) for key in line if key.startswith("eval/")}
    assert names == {"eval/near"}, "no prompt of the other judge's task is left"


def test_all_schedules_end_where_they_should(toy):
    # Six updates: the last one is made at 5/6 of the way to 0.
    for schedule, last in (("constant", 1.0), ("linear", 1 / 6), ("cosine", 0.0669873)):
        rates = column(toy(f"optimizer.schedule={schedule}", f"name={schedule}"), "learning_rate")
        assert rates[0] == pytest.approx(0.05)
        assert rates[-1] == pytest.approx(0.05 * last)


def test_warm_up(toy):
    rates = column(toy("optimizer.warmup_updates=4"), "learning_rate")
    assert rates == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05])


def made(folder):
    """The folder, created."""
    folder.mkdir()
    return folder


class Asked(Replay):
    """Says which windows it was asked about, in place of asking a model."""

    @property
    def off_policy(self) -> bool:
        return True

    def trusts(self, group) -> bool:
        return group is None

    def anchor(self, windows, tempering):
        return {"of": windows}


@pytest.mark.parametrize(
    ("precision", "updates", "expected"),
    [
        ("bf16", 2, "ab"),  # in later epochs others stand beside a sample, which rounds differently
        ("bf16", 1, "aa"),  # every epoch is cut into the same batches
        ("no", 2, "aa"),
    ],
)
def test_each_epoch_is_compared_in_its_own_batches(precision, updates, expected):
    config = SimpleNamespace(
        backend=SimpleNamespace(config=SimpleNamespace(mixed_precision=precision)),
        training=SimpleNamespace(updates_per_epoch=updates),
    )
    replay = Asked(config=config, accelerator=None, backend=None)  # type: ignore[arg-type]
    found = replay.anchors(["a", "b"], "group", None)  # type: ignore[arg-type]
    assert [each["of"] for each in found] == list(expected)  # type: ignore[call-overload]
    assert replay.anchors(["a", "b"], None, None) == [{}, {}]  # type: ignore[arg-type]
