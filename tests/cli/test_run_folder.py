"""Reading a run folder, whole or damaged."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from mmrl.errors import UserError
from mmrl.run_folder import (
    Change,
    before_after,
    evaluations,
    flatten,
    read_metrics,
    read_run,
    training_curves,
)


def test_a_whole_run_is_read(run):
    folder = read_run(run)
    assert folder.name == "signs"
    assert folder.config["seed"] == 3
    assert folder.environment["commit"] == "c0ffee"
    assert [row["step"] for row in folder.metrics] == [0, 1, 2, 3, 3]
    assert {step: path.name for step, path in folder.samples.items()} == {
        0: "step-000000.png",
        3: "step-000003.png",
    }


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither config\.yaml nor metrics\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"run folder not found: .*absent"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize("lost", ["config.yaml", "environment.json", "metrics.jsonl", "samples"])
def test_any_piece_may_be_missing(run, lost):
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = read_run(run)
    missing = {"config.yaml": "config", "environment.json": "environment"}.get(lost)
    assert not getattr(folder, missing or lost.removesuffix(".jsonl"))


def test_damaged_environment_reads_as_empty(run, caplog):
    (run / "environment.json").write_text('{"versions": {')
    assert read_run(run).environment == {}
    assert "environment.json cannot be read" in caplog.text


def test_half_a_last_line_is_skipped_in_silence(run, caplog):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "rew')
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 3]
    assert not caplog.text


def test_a_broken_line_elsewhere_is_reported(run, caplog):
    path = run / "metrics.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f'{first}\n[1, 2]\n{{"step": "x"}}\n{rest}')
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 3]
    assert "metrics.jsonl:2 is not" in caplog.text
    assert "metrics.jsonl:3 is not" in caplog.text


def test_before_after_takes_first_last_and_largest():
    rows = [
        {"step": 40, "eval/a": 0.5},
        {"step": 0, "eval/a": 0.25, "eval/b": -1.0},
        {"step": 20, "eval/a": 0.75, "reward": 9.0},
    ]
    change, single = before_after(rows)
    assert change == Change(name="a", before=0.25, after=0.5, best=0.75, best_step=20)
    assert change.change == 0.25
    assert (single.after, single.change, single.best) == (None, None, -1.0)


def test_values_that_are_not_finite_are_no_evaluation():
    rows = [
        {"step": 0, "eval/a": None, "eval/b": 1.0},
        {"step": 1, "eval/a": math.nan, "eval/b": True},
        {"step": 2, "eval/a": 2.0, "eval/b": 3},
    ]
    assert evaluations(rows) == {0: {"b": 1.0}, 2: {"a": 2.0, "b": 3.0}}


def test_a_step_evaluated_again_counts_once():
    rows = [{"step": 5, "eval/a": 1.0}, {"step": 5, "eval/a": 2.0}]
    assert evaluations(rows) == {5: {"a": 2.0}}


def test_training_curves_keep_gaps(run):
    curves = training_curves(read_run(run).metrics)
    steps, rewards = curves["reward"]
    assert steps == [1, 2, 3]
    assert rewards[::2] == [0.3, 0.6]
    # `null` is how the log writes a value that is not finite: there is no point at step 2.
    assert len(rewards) == 3
    assert math.isnan(rewards[1])
    assert not any(key.startswith("eval/") for key in curves)


def test_flatten_names_every_leaf():
    nested = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, 3], "f": None}
    assert flatten(nested) == {"a.b": 1, "a.c": {}, "d.0.e": 2, "d.1": 3, "f": None}


def test_metrics_of_a_run_without_any(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
