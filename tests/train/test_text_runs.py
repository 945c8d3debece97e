"""A text model through the whole loop: it learns, and no split of the work shows."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from toy.run import ROOT, column, launch, metrics_of, weights_of

from mmrl.advantages import optimal_baseline
from mmrl.cli import save_samples
from mmrl.config import apply_overrides, parse
from mmrl.errors import UserError
from mmrl.modulators import adora
from mmrl.report import write_report
from mmrl.runner import evaluate, load_run_config, sample, train

sys.path.insert(0, str(ROOT / "tests" / "text"))

from tiny_text import save_model

UPDATES = pytest.mark.parametrize("update", ["shared_prompt", "packed", "padded"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return save_model(tmp_path_factory.mktemp("model"), "qwen3")


def config(model: Path, folder: Path, *overrides: str) -> dict:
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": f"go to {word}"}) for word in ("red", "one two", "up", "cat sea")
    ]
    prompts.write_text("\n".join(lines) + "\n")
    data = {
        "name": "text",
        "output_dir": str(folder / "run"),
        "backend": {
            "name": "text",
            "model": {"path": str(model), "dtype": "fp32", "lora": {"rank": 4, "alpha": 8}},
            "rollout": {"max_tokens": 6, "batch_size": 8},
        },
        "prompts": {"source": str(prompts)},
        "rewards": [{"name": "toy.rewards.says_red", "label": "red"}],
        "advantage": {"name": "group"},
        "objective": {"name": "grpo"},
        "regularisers": [
            {"name": "kl_reference", "estimator": "k3", "coef": 0.01},
            {"name": "entropy", "coef": 0.001},
        ],
        "optimizer": {"learning_rate": 0.02},
        "training": {
            "num_steps": 4,
            "prompts_per_step": 3,
            "group_size": 4,
            "micro_batch_size": 5,
            "updates_per_epoch": 2,
        },
        "evaluation": {"source": str(prompts), "every": 2, "samples_per_prompt": 2},
        "checkpoint": {"every": 1},
        "tracking": {"trackers": []},
    }
    return apply_overrides(data, list(overrides))


def run(model: Path, folder: Path, *overrides: str, resume: bool = False) -> Path:
    return train(parse(config(model, folder, *overrides)), resume=resume)


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory):
    return run(model, tmp_path_factory.mktemp("unbroken"))


def test_it_learns_and_leaves_texts_to_read(model, tmp_path):
    path = run(
        model, tmp_path, "training.num_steps=10", "training.group_size=8",
        "training.updates_per_epoch=1", "evaluation.every=10",
    )  # fmt: skip
    before, after = column(path, "eval/red")
    assert before < 0.1
    assert after > before + 0.3
    lines = (path / "samples" / "step-000010.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    assert shown[0]["prompt"] == "go to red"
    assert all(len(row["completions"]) == 2 for row in shown)
    page = write_report(path).read_text()
    assert shown[0]["completions"][0] in page
    assert "completions/mean_length" in page


def test_texts_of_a_run_are_drawn_and_judged_again(unbroken, tmp_path):
    drawn = sample(unbroken, ["go to red", "up"], count=3, seed=0)
    assert drawn == sample(unbroken, ["go to red", "up"], count=3, seed=0)
    written = save_samples(drawn, ["go to red", "up"], tmp_path)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["completions"] for row in rows] == drawn
    found = evaluate(load_run_config(unbroken), run=unbroken)
    assert found == {
        key: value for key, value in metrics_of(unbroken)[-1].items() if "eval/" in key
    }


def close(left: Path, right: Path) -> None:
    """Equal but for sums in another order."""
    for a, b in zip(metrics_of(left), metrics_of(right), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    one, two = weights_of(left), weights_of(right)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_the_micro_batch_changes_nothing(model, unbroken, tmp_path, size):
    close(unbroken, run(model, tmp_path, f"training.micro_batch_size={size}"))


@UPDATES
def test_the_way_of_scoring_changes_nothing(model, unbroken, tmp_path, update):
    close(unbroken, run(model, tmp_path, f"backend.update={update}"))


LOG_KEYS = {
    "reward", "reward_std", "frac_reward_zero_std", "rewards/red/mean", "rewards/red/std",
    "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "kl", "entropy", "clip_ratio/low", "clip_ratio/high",
    "clip_ratio/region", "num_tokens", "grad_norm", "loss",
}  # fmt: skip
"""Of TRL, which dashboards know; ``step_time`` besides."""


def test_the_log_has_trls_keys_with_and_without_an_entropy_bonus(model, unbroken, tmp_path):
    """That any split of the work gives the same numbers is what ``close`` asks above."""
    steps = [row for row in metrics_of(unbroken) if "reward" in row]
    plain = run(model, tmp_path, "training.num_steps=1", "regularisers=[]")
    for row in steps:
        assert row.keys() >= LOG_KEYS
        assert row["completions/min_length"] <= row["completions/mean_length"]
        assert row["completions/mean_length"] <= row["completions/max_length"] <= 6
    assert metrics_of(plain)[1].keys() >= LOG_KEYS - {"kl"}
    assert column(plain, "entropy")[0] > 0
    seen = column(unbroken, "num_tokens")
    assert all(later > earlier for earlier, later in itertools.pairwise([0.0, *seen]))
    progress = json.loads((unbroken / "checkpoint-4" / "progress.json").read_text())
    assert progress["num_tokens"] == seen[-1]


def completions(path: Path) -> dict[str, list[dict]]:
    """Rows of every file of completions."""
    files = sorted((path / "completions").iterdir())
    return {file.name: pd.read_parquet(file).to_dict("records") for file in files}


def test_completions_are_kept_with_what_they_earned(unbroken):
    found = completions(unbroken)
    assert [*found] == [
        *(f"eval-00000{step}.parquet" for step in (0, 2, 4)),
        *(f"step-00000{step}.parquet" for step in (1, 4)),
    ], "the first and the last step; the tenth was none"
    trained = [row for row in metrics_of(unbroken) if "reward" in row]
    for step in (1, 4):
        rows = found[f"step-00000{step}.parquet"]
        assert len(rows) == 12
        assert {row["step"] for row in rows} == {step}
        for row in rows:
            words = row["completion"].split()
            assert row["rewards/red"] == words.count("red") / max(1, len(words))
            assert row["reward"] == row["rewards/red"]
        mean = sum(row["reward"] for row in rows) / 12
        assert mean == pytest.approx(trained[step - 1]["reward"])
        assert all(rows[i]["prompt"] == rows[i - i % 4]["prompt"] for i in range(12))
        for i in range(0, 12, 4):
            assert sum(row["advantage"] for row in rows[i : i + 4]) == pytest.approx(0, abs=1e-6)
    held_out = found["eval-000004.parquet"]
    assert len(held_out) == 8
    assert "advantage" not in held_out[0]
    shown = (unbroken / "samples" / "step-000004.jsonl").read_text().splitlines()
    texts = [text for line in shown for text in json.loads(line)["completions"]]
    assert [row["completion"] for row in held_out] == texts


KEEP = ("tracking.completions_every=1", "tracking.max_completions=9")


def test_completions_of_a_resumed_run_and_of_two_processes(model, tmp_path):
    whole = run(model, tmp_path / "whole", *KEEP)
    found = completions(whole)
    assert [len(rows) for name, rows in found.items() if "step" in name] == [8] * 4
    cut = run(model, tmp_path / "cut", "training.num_steps=3", *KEEP)
    stale = cut / "completions" / "step-000004.parquet"
    stale.write_bytes(b"of a step that a kill undid")
    (cut / "completions" / "eval-000003.parquet").unlink()  # of the shorter run's last step
    assert completions(run(model, tmp_path / "cut", *KEEP, resume=True)) == found
    done = launch(config(model, tmp_path / "two", *KEEP), tmp_path / "two.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    two = completions(tmp_path / "two" / "run")
    assert [*two] == [*found]
    for name, rows in two.items():
        frames = pd.DataFrame(rows), pd.DataFrame(found[name])
        pd.testing.assert_frame_equal(*frames, rtol=1e-3, atol=1e-5)


def test_the_replay_of_a_rollout_has_no_gap(model, tmp_path, capsys):
    run(model, tmp_path, "training.num_steps=1")
    assert "largest |log-ratio| 0.0e+00" in capsys.readouterr().out


def test_half_precision_trains(model, tmp_path):
    path = run(model, tmp_path, "backend.model.dtype=bf16", "training.num_steps=2")
    assert all(norm > 0 for norm in column(path, "grad_norm"))


VAS = (
    "prompts.sampler={name: vas, refresh_every: 2, refresh_samples: 2, momentum: 0.5}",
    "training.prompts_per_step=4",
)


def test_sampling_by_variance_counts_what_it_draws(model, tmp_path):
    whole = run(model, tmp_path, *VAS)
    # Two samples of each of four prompts, before steps 0 and 2.
    assert column(whole, "sampler/refresh_samples") == [8.0, 8.0]
    # Steps 0 and 2 count the tokens of these passes too, at least a prompt and a token each.
    steps = [row for row in metrics_of(whole) if "num_tokens" in row]
    ends = [row["num_tokens"] for row in steps]
    besides = [
        end - start - row["num_samples"] * row["completions/mean_length"]
        for row, start, end in zip(steps, [0, *ends], ends, strict=False)
    ]
    assert min(besides[0], besides[2]) > max(besides[1], besides[3]) + 8
    assert len(column(whole, "sampler/mean_score")) == 4
    progress = json.loads((whole / "checkpoint-4" / "progress.json").read_text())
    assert len(progress["sampler"]["scores"]) == 4
    assert progress["sampler"]["taken"] == 8


REFILLS = (
    "backend.rollout.max_tokens=2",
    "training.refills=1",
    "training.prompts_per_step=2",
    "training.num_steps=3",
    "training.group_size=2",
)


def test_groups_without_a_signal_are_replaced(model, tmp_path):
    path = run(model, tmp_path / "one", *REFILLS)
    rolled, trained = column(path, "sampling/groups"), column(path, "sampling/groups_trained")
    assert any(count > 2 for count in rolled), "else this test tests nothing"
    for asked, kept, samples in zip(rolled, trained, column(path, "num_samples"), strict=True):
        assert samples == 2 * asked, "all are reported"
        assert kept <= 2
    done = launch(config(model, tmp_path / "two", *REFILLS), tmp_path / "two.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    close(path, tmp_path / "two" / "run")


def test_more_refills_than_there_are_prompts(model, tmp_path):
    with pytest.raises(UserError, match=r"3 x \(1 \+ 1 training.refills\) is more than the 4"):
        run(model, tmp_path, "training.refills=1")


def test_completions_without_an_end_are_not_trained(model, tmp_path):
    """Most completions here end at the limit, so little is left to learn from."""
    options = ("backend.rollout.drop_overlong=true", "backend.rollout.max_tokens=1")
    path = run(model, tmp_path, *options, "training.num_steps=1", "regularisers=[]")
    assert column(path, "completions/clipped_ratio")[0] > 0.5
    kept = run(model, tmp_path / "kept", *options[1:], "training.num_steps=1", "regularisers=[]")
    assert column(path, "grad_norm")[0] < column(kept, "grad_norm")[0]


def test_estimators_read_the_norm_of_the_score(model, tmp_path, monkeypatch):
    """It is asked of the policy that sampled, however the samples are dealt into micro-batches."""
    seen, estimate = [], optimal_baseline.estimate

    def noted(scores, *rest):
        seen.append(scores)
        return estimate(scores, *rest)

    monkeypatch.setattr(optimal_baseline, "estimate", noted)
    options = ("advantage={name: optimal_baseline, weight: logits}", "training.num_steps=1")
    for size in (1, 12):
        run(model, tmp_path / str(size), f"training.micro_batch_size={size}", *options)
    one, two = (scores.score_norm for scores in seen)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert (0 < one).all()
    assert (one <= 2 * 6).all()  # of a token it is at most 2


def test_estimators_read_lengths_ends_and_answers(model, tmp_path, monkeypatch):
    """Also of completions that are not trained on."""
    seen = []
    monkeypatch.setattr(
        adora, "modulate", lambda advantages, scores, config: seen.append(scores) or advantages
    )
    prompts = tmp_path / "answers.jsonl"
    rows = [json.dumps({"prompt": f"go to {word}", "answer": "red"}) for word in ("a", "b", "c")]
    prompts.write_text("\n".join(rows))
    path = run(
        model,
        tmp_path,
        "training.num_steps=1",
        "backend.rollout.drop_overlong=true",
        "backend.rollout.max_tokens=3",
        f"prompts.source={prompts}",
        "evaluation.source=null",
        "advantage=copo_consistency",
        "modulators=[adora]",
        "rewards=[{name: toy.rewards.says_red}, {name: exact_match, weight: 0}]",
    )
    (scores,) = seen
    assert column(path, "completions/clipped_ratio") == [scores.truncated.double().mean().item()]
    assert column(path, "completions/mean_length") == [scores.length.double().mean().item()]
    assert 0 < scores.truncated.double().mean() < 1
    assert len(set(scores.answer)) > 1
    assert column(path, "copo/entropy")[0] > 0


OVERLONG = "rewards=[{name: soft_overlong, max_tokens: 6, buffer: 4}]"


@pytest.mark.parametrize("drop", ["true", "false"])
def test_long_completions_cost_by_their_tokens(model, tmp_path, drop):
    """The mean of a linear penalty is that of the mean length, if all are within the buffer.

    So is that of the rising side of a trapezoid.
    """
    path = run(
        model, tmp_path, "training.num_steps=1", f"backend.rollout.drop_overlong={drop}",
        "rewards=[{name: soft_overlong, max_tokens: 6, buffer: 6}, "
        "{name: length, unit: tokens, b: 6, c: 6, d: 7}]",
    )  # fmt: skip
    (length,) = column(path, "completions/mean_length")
    assert column(path, "rewards/soft_overlong/mean") == [pytest.approx(-length / 6)]
    assert column(path, "rewards/length/mean") == [pytest.approx(length / 6)]


def test_a_length_that_no_completion_reaches(model, tmp_path):
    with pytest.raises(UserError, match=r"max_tokens - buffer = 6 tokens.* more than 6"):
        run(model, tmp_path, "rewards=[{name: soft_overlong, max_tokens: 8, buffer: 2}]")
    with pytest.raises(UserError, match="difference below 2"):
        run(model, tmp_path, OVERLONG, "backend.rollout.max_tokens=2")


def test_a_reward_in_trls_way_reads_token_ids_and_logs(model, tmp_path):
    reward = {"name": "toy.rewards.trl_tokens", "label": "ids", "signature": "trl"}
    data = config(model, tmp_path, "training.num_steps=2", "evaluation.every=1")
    folder = train(parse(data | {"rewards": [reward | {"kwargs": {"path": str(model)}}]}))
    assert not column(folder, "rewards/ids/failed")
    assert not column(folder, "eval/ids_unjudged")
    lengths = column(folder, "completions/mean_length")
    assert column(folder, "rewards/ids/mean") == pytest.approx(lengths)
    assert column(folder, "rewards/ids/own_mean") == pytest.approx(lengths)
    assert column(folder, "rewards/ids/step") == [0, 1]
    assert column(folder, "rewards/ids/steps") == [2, 2]


def test_divergence_in_the_reward_depends_on_no_split(model, tmp_path):
    """Its reference is kept though no loss asks for it, and completions without an end have one."""
    options = (
        "kl_in_reward={}", "regularisers=[]", "backend.model.lora=null",
        "backend.rollout.drop_overlong=true", "training.num_steps=2",
    )  # fmt: skip
    whole = run(model, tmp_path / "whole", *options)
    first, second = column(whole, "kl_in_reward")
    assert first == pytest.approx(0, abs=1e-6)
    assert abs(second) > 1e-3
    close(whole, run(model, tmp_path / "small", *options, "training.micro_batch_size=2"))


RATIO, GAP = "sampling/importance_sampling_ratio", "sampling/sampling_logp_difference"
NUCLEUS = ("backend.rollout.top_p=0.7",)
CORRECTED = ("correction={name: importance_sampling}", "training.num_steps=2")


def test_without_truncation_nothing_is_to_be_corrected(model, tmp_path):
    """The weights are 1 but for rounding, also where anchors are asked for a second update."""
    path = run(model, tmp_path, *CORRECTED)
    for kind in ("mean", "min", "max"):
        # Scored in float32 with and without a cache.
        assert column(path, f"{RATIO}/{kind}") == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(0 <= gap < 1e-5 for gap in column(path, f"{GAP}/max"))


def test_what_top_p_leaves_out_is_corrected(model, tmp_path):
    """By less than 1: what is left has less of the policy than of the sampler."""
    path = run(model, tmp_path, *CORRECTED, *NUCLEUS)
    bounds = [column(path, f"{RATIO}/{kind}") for kind in ("min", "mean", "max")]
    for low, mean, high in zip(*bounds, strict=True):
        assert 0.7 - 1e-4 < low < mean < high < 1 + 1e-4
    assert all(gap > 0.01 for gap in column(path, f"{GAP}/mean"))


def test_the_correction_reaches_the_update(model, tmp_path):
    """No weight is below 0.7, so this mask leaves nothing."""
    options = (*CORRECTED, *NUCLEUS, "correction.mode=mask", "correction.cap=0.6")
    path = tmp_path / "run"
    with pytest.raises(UserError, match="nothing was learned"):
        run(model, tmp_path, *options, "regularisers=[]", "backend.model.lora=null",
            "optimizer.weight_decay=0")  # fmt: skip
    assert column(path, "grad_norm") == [0.0, 0.0]
    assert column(path, f"{RATIO}/max") == [0.0, 0.0]


@pytest.mark.slow
def test_corrected_updates_depend_on_no_split(model, tmp_path):
    options = (*CORRECTED, *NUCLEUS, "correction.level=sample", "correction.cap=0.5")
    whole = run(model, tmp_path / "whole", *options)
    assert all(low < 0.5 for low in column(whole, f"{RATIO}/min")), "else this test tests nothing"
    assert max(column(whole, f"{RATIO}/max")) == 0.5, "the cap is met"
    close(whole, run(model, tmp_path / "small", *options, "training.micro_batch_size=2"))
    done = launch(config(model, tmp_path / "two", *options), tmp_path / "two.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    close(whole, tmp_path / "two" / "run")
