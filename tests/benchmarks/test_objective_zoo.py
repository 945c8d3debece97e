"""The table of all methods: every setting is valid, figures by hand, and one real run of it."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

from benchmarks import objective_zoo as zoo
from benchmarks.objective_zoo import ACCURACY, BASE, METHODS, PASS
from benchmarks.runs import Job, Point, Run
from mmrl import resolve
from mmrl.errors import UserError


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(zoo._parser().parse_args([])), **changes})


def make_run(accuracies, seed=0, entropies=(), failed=False) -> Run:
    points = [
        Point(step=10 * i, cpu=5.0 * i, wall=i, tokens=1000.0 * i,
              scores={ACCURACY: each, PASS: each + 0.1})
        for i, each in enumerate(accuracies)
    ]  # fmt: skip
    rows = [{"step": i, "entropy": each} for i, each in enumerate(entropies)]
    job = Job(config=zoo.RECIPES["text"], folder=Path("absent"), seed=seed)
    return Run(job=job, points=points, rows=rows, pieces=[], failed=failed)


RUNS = {
    (BASE, 0): make_run((0.3, 0.4, 0.5), entropies=(9.0, 0.1, 0.1, 0.1, 0.1, 0.6)),
    ("mhpo", 0): make_run((0.3, 0.5, 0.6)),
    (BASE, 1): make_run((0.3, 0.4, 0.4), seed=1),
    ("mhpo", 1): make_run((0.3, 0.35, 0.39), seed=1),
}


@pytest.mark.parametrize("task", zoo.RECIPES)
@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_valid_and_changes_only_what_it_names(name, task, tmp_path):
    given = options(task=task, runs=tmp_path)
    settings = zoo.run_job(name, 3, given, None).settings
    base = zoo.run_job(BASE, 3, given, None).settings.dump()
    mine = settings.dump()
    named = {key.partition(".")[0] for key in METHODS[name].sections}
    changed = {key for key in mine if mine[key] != base[key]} - {"name", "output_dir"}
    assert changed <= named
    assert changed or name == BASE


def test_every_part_of_the_library_stands_in_the_table():
    """Of the kinds that the table compares; the others need another backend, or are its base."""
    words = json.dumps([dict(method.sections) for method in METHODS.values()])
    elsewhere = {
        "objectives": {"grpo_guard", "nft", "opd", "sft"},
        "advantages": {"none", "per_reward"},
        "modulators": {"clip", "drop_zero", "optimality"},
        "selection": set(),
        "regularisers": {"kl_reference", "kl_ema", "kl_transition", "kl_target", "entropy",
                         "entropy_corridor"},
    }  # fmt: skip
    for kind, left_out in elsewhere.items():
        for name in set(resolve.names(kind)) - left_out:
            assert f'"{name}"' in words, name


def test_the_winning_rate_is_used(tmp_path):
    found = {"winners": {"mhpo": ["optimizer.learning_rate=0.0002"]}}
    job = zoo.run_job("mhpo", 0, options(runs=tmp_path), found)
    assert job.settings.optimizer.learning_rate == 2e-4


def test_figures_by_hand():
    found = {(r["method"], r["seed"]): r for r in zoo.figures(RUNS)}
    mine = found["mhpo", 0]
    assert (mine["before"], mine[ACCURACY], mine[PASS]) == (0.3, 0.6, 0.7)
    assert mine["gain_on_base"] == pytest.approx(0.1)
    assert mine["tokens_to_target"] == 1000.0
    assert mine["cpu_per_step"] == 0.5
    assert found[BASE, 0]["entropy"] == pytest.approx(0.2)  # the first of six is too early
    assert found["mhpo", 1]["tokens_to_target"] is None
    assert found["mhpo", 1]["gain_on_base"] == pytest.approx(-0.01)


def test_differences_inside_the_noise_are_marked():
    assert zoo.interval([1.0]) == math.inf
    assert zoo.interval([1.0, 3.0]) == pytest.approx(12.706)  # 12.706 sqrt(2) / sqrt(2)
    assert zoo.verdict([0.1, 0.11, 0.09]) == "+"
    assert zoo.verdict([-0.1, -0.11, -0.09]) == "-"
    assert zoo.verdict([0.1, -0.1, 0.05]) == "="
    assert zoo.verdict([0.1]) == "="


def test_a_failed_run_has_no_accuracy():
    (record,) = zoo.figures({(BASE, 0): make_run((0.3, 0.9), failed=True)})
    assert record[ACCURACY] is None
    assert record["gain_on_base"] is None


def test_the_table():
    lines = zoo.zoo_table(zoo.figures(RUNS), None).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| grpo | loss | - | 0.450 ± 0.071 | 0.550 ± 0.071 | - | 0.200 |")
    assert "= +0.045 ± 0.699" in lines[3]
    assert lines[3].endswith("| 1 (1 of 2) |")


def test_solved_is_pass_at_k():
    texts = ["<answer>3</answer>", "<answer>4</answer>"]
    assert zoo.solved(["?"] * 2, texts, answer=["4"] * 2) == [1.0, 1.0]
    assert zoo.solved(["?"] * 2, texts, answer=["5"] * 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "mhop"], "unknown 'mhop'; did you mean 'mhpo'"),
        (["--search-seed", "3"], "--search-seed: 3 is among --seeds"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        zoo.main(words)


@pytest.mark.slow
def test_from_the_search_to_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "RATES", (1e-4,))
    words = ["--methods", BASE, "dcpo", "--seeds", "0", "--steps", "1", "--every", "1"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    words += ["training.prompts_per_step=4", "training.group_size=4", "evaluation.max_prompts=8",
              "training.micro_batch_size=8", "optimizer.warmup_updates=0"]  # fmt: skip
    for method in (BASE, "dcpo"):  # the second search keeps what the first one found
        assert zoo.main([*words, "--search", "--methods", method]) == 0
    assert zoo.main(words) == 0
    (path,) = tmp_path.glob("*-objective-zoo-text.json")
    data = json.loads(path.read_text())
    assert [run["method"] for run in data["runs"]] == [BASE, "dcpo"]
    assert data["search"]["winners"]["dcpo"] == ["optimizer.learning_rate=0.0001"]
    assert all(figure["entropy"] > 0 for figure in data["figures"])
    assert "| dcpo | modulator | 0.0001 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(UserError, match="the search did not see mhpo"):
        zoo.main([*words, "--methods", "mhpo"])
