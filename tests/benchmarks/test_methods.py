"""Figures of the comparison of methods, on runs whose answers can be worked out by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import bands, methods, search
from benchmarks.runs import Job, Piece, Point, Run
from mmrl.config import load
from mmrl.errors import UserError
from mmrl.run_folder import flatten

ABOUT = {"processor": "X", "cores": 2, "accelerator": None, "python": "3", "versions": {},
         "commit": None, "threads": 2}  # fmt: skip


def make_run(*evaluations: tuple[float, float], seed: int = 0, failed: bool = False) -> Run:
    """A run with (CPU-seconds, exact score) at every tenth step; wall is half, soft twice that."""
    points = [
        Point(
            step=10 * i,
            cpu=cpu,
            wall=cpu / 2,
            scores={"ocr_exact": exact, "ocr_soft": 2 * exact, "template": 0.7, "diversity": 0.1},
        )
        for i, (cpu, exact) in enumerate(evaluations)
    ]
    return Run(
        job=Job(config=Path("c.yaml"), folder=Path("absent"), seed=seed),
        points=points,
        rows=[{"step": 1, "time/cpu": points[-1].cpu + 2.0}],
        pieces=[
            Piece(wall=1.0, cpu=30.0, status=130),
            Piece(wall=1.0, cpu=points[-1].cpu + 5.0, status=0),
        ],
        failed=failed,
    )


RUNS = {
    ("awm", 0): make_run((0, 0.1), (10, 0.3), (20, 0.5)),
    ("flow-grpo", 0): make_run((0, 0.1), (50, 0.15), (100, 0.2)),
    ("nft", 0): make_run((0, 0.1), (40, 0.1)),
    ("awm", 1): make_run((0, 0.1), (10, 0.3), (20, 0.5), seed=1),
    ("flow-grpo", 1): make_run((0, 0.1), (100, 0.4), (140, 0.4), seed=1),
    ("nft", 1): make_run((0, 0.1), (30, 0.3), (60, 0.5), seed=1),
}


def options(**changes) -> argparse.Namespace:
    given = methods._parser().parse_args([])
    return argparse.Namespace(**{**vars(given), "methods": ["awm", "flow-grpo", "nft"], **changes})


def record(method: str, seed: int) -> dict:
    found = methods.figures(RUNS)
    return next(r for r in found if (r["method"], r["seed"]) == (method, seed))


def row(table: str, first: str) -> list[str]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return next(line for line in lines if line[0].strip() == first)


def test_time_to_what_flow_grpo_reaches_and_the_ratio_of_each_seed():
    # Seed 0: target 0.2 = half way of awm's first 10 seconds; flow-grpo has it at its end.
    assert record("awm", 0)["ocr_exact_cpu"] == pytest.approx(5)
    assert record("awm", 0)["ocr_exact_wall"] == pytest.approx(2.5)
    assert record("flow-grpo", 0)["ocr_exact_ratio"] == pytest.approx(100 / 5)
    # Seed 1: target 0.4 = 15 seconds of awm; flow-grpo has it after 100, not only at its end.
    assert record("awm", 1)["ocr_exact_ratio"] == 1.0
    assert record("flow-grpo", 1)["ocr_exact_ratio"] == pytest.approx(100 / 15)
    assert record("nft", 1)["ocr_exact_ratio"] == pytest.approx(45 / 15)


def test_what_is_never_reached_has_no_time_and_no_ratio():
    found = record("nft", 0)
    assert found["ocr_exact_target"] == 0.2
    assert [found[f"ocr_exact_{key}"] for key in ("cpu", "wall", "ratio")] == [None] * 3


def test_no_gain_of_the_yardstick_gives_no_ratio():
    points = RUNS["awm", 0].points
    found = methods.speed(points, points, "ocr_exact", 0.05)
    assert (found["ocr_exact_cpu"], found["ocr_exact_ratio"]) == (0.0, None)


def test_a_failed_run_has_no_final_score_and_sets_no_target():
    runs = RUNS | {("flow-grpo", 0): make_run((0, 0.1), (50, 0.4), failed=True)}
    found = {(r["method"], r["seed"]): r for r in methods.figures(runs)}
    assert found["flow-grpo", 0]["ocr_exact_final"] is None
    assert found["flow-grpo", 0]["ocr_exact_best"] == 0.4
    assert found["awm", 0]["ocr_exact_target"] is None
    assert found["awm", 1]["ocr_exact_target"] == 0.4


def test_costs_set_apart_what_is_no_training():
    found = methods.costs(RUNS["awm", 0])
    assert (found["steps"], found["train_cpu"], found["train_wall"]) == (20, 20, 10)
    assert found["cpu_per_step"] == 1.0
    assert found["other_cpu"] == 30 + 25 - 22  # all commands without all steps, the late ones too


def test_score_table_has_means_spreads_and_says_what_was_not_reached():
    found = methods.figures(RUNS)
    table = methods.score_table(found, "ocr_exact", ["awm", "flow-grpo", "nft"])
    flow = row(table, "flow-grpo")
    assert flow[1:4] == ["0.100 ± 0.000", "0.300 ± 0.141", "0.300 ± 0.141"]
    assert flow[4:7] == ["2 of 2", "100 ± 0", "50 ± 0"]
    assert flow[7:] == ["13.33 ± 9.43", "6.67", "20.00"]
    assert row(table, "nft")[4:] == ["1 of 2", "45", "22", "3.00", "3.00", "3.00"]
    alone = {key: run for key, run in RUNS.items() if key[1] == 0}
    table = methods.score_table(methods.figures(alone), "ocr_exact", ["nft"])
    assert row(table, "nft")[4:] == ["0 of 1", "not reached", "not reached", "-", "-", "-"]


def test_without_flow_grpo_there_is_no_target():
    runs = {key: run for key, run in RUNS.items() if key[0] == "awm"}
    table = methods.score_table(methods.figures(runs), "ocr_exact", ["awm"])
    assert row(table, "awm")[4:] == ["0 of 0", "-", "-", "-", "-", "-"]


def test_seed_table_shows_how_long_an_unreached_target_was_tried():
    table = methods.seed_table(methods.figures(RUNS), "ocr_soft", ["awm", "flow-grpo", "nft"])
    assert row(table, "0") == ["0", "0.400", "5", "100", "> 40"]
    assert row(table, "1") == ["1", "0.800", "15", "100", "45"]


def test_cost_table_counts_failures():
    runs = RUNS | {("nft", 0): make_run((0, 0.1), (50, 0.4), failed=True)}
    table = methods.cost_table(methods.figures(runs), ["awm", "nft"])
    assert row(table, "awm")[1:3] == ["0 of 2", "20 ± 0"]
    assert row(table, "nft")[1:3] == ["1 of 2", "15 ± 7"]
    assert row(table, "nft")[-2:] == ["0.700", "0.100"]


def test_band_goes_as_far_as_the_shortest_run():
    paths = [RUNS["nft", seed].points for seed in (0, 1)]
    times, scores = bands.band(paths, "ocr_exact")
    assert (times[0], times[-1]) == (0.0, 40.0)
    assert scores.shape == (2, bands.GRID_POINTS)
    assert np.allclose(scores[0], 0.1)
    assert scores[1, -1] == pytest.approx(0.3 + 0.2 / 3)


def test_plot_has_a_line_and_a_band_for_each_method():
    figure = methods.plot(RUNS)
    assert isinstance(figure, Figure)
    exact = figure.axes[0]
    lines = {str(line.get_label()): line for line in exact.lines}
    assert list(lines) == ["awm", "flow-grpo", "nft"]
    assert np.asarray(lines["flow-grpo"].get_ydata())[-1] == pytest.approx((0.2 + 0.4) / 2)
    assert len(exact.collections) == 3


def test_runs_that_are_evaluated_in_another_way_are_named():
    assert methods.odd_starts(RUNS) == []
    odd = make_run((0, 0.2), (40, 0.3))
    names = methods.odd_starts(RUNS | {("dance-grpo", 1): odd})
    assert names == ["dance-grpo seed 1"]
    text = methods.report(methods.figures(RUNS), ABOUT, options(seeds=[0, 1]), None, names)
    assert "not comparable: dance-grpo seed 1." in text


def test_report_says_how_runs_end_and_that_nothing_was_searched():
    found = methods.figures(RUNS)
    text = methods.report(found, ABOUT, options(seeds=[0, 1]), None)
    assert "seeds 0 1" in text
    assert "ends after the number of steps of its recipe" in text
    assert "No search was made" in text
    text = methods.report(found, ABOUT, options(seeds=[0, 1], budget=300.0), None)
    assert "ends after 300 CPU-seconds of training" in text


# Jobs


def test_a_job_has_the_recipe_the_seed_and_equal_evaluations(tmp_path):
    given = options(runs=tmp_path, every=7, overrides=["training.num_steps=2"])
    for method in methods.RECIPES:
        job = methods.run_job(method, 4, given, None)
        settings, recipe = job.settings, load(methods.tables.ROOT / methods.RECIPES[method])
        assert job.folder == tmp_path / f"{method}-seed4"
        assert (settings.seed, settings.training.num_steps) == (4, 2)
        assert (settings.evaluation.every, settings.checkpoint.every) == (7, 7)
        labels = [spec.label for spec in settings.evaluation.rewards]
        assert labels == [*methods.SCORES, *methods.ALSO]
        for part in ("backend", "objective", "advantage", "optimizer"):
            assert getattr(settings, part) == getattr(recipe, part)


def test_tuned_runs_have_the_winners(tmp_path):
    found = {"winners": {"awm": ["optimizer.learning_rate=0.5"]}}
    tuned = options(runs=tmp_path, tuned=True)
    assert methods.run_job("awm", 0, tuned, found).settings.optimizer.learning_rate == 0.5
    plain = load(methods.tables.ROOT / methods.RECIPES["awm"]).optimizer.learning_rate
    shipped = options(runs=tmp_path)
    assert methods.run_job("awm", 0, shipped, found).settings.optimizer.learning_rate == plain
    assert methods.run_job("nft", 0, tuned, found).settings.optimizer.learning_rate == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "flow-gpro"], "--methods: unknown 'flow-gpro'; did you mean 'flow-grpo'"),
        (["--search-seed", "3"], "--search-seed: 3 is among --seeds"),
        (["--budget", "0"], "--budget: 0 is not positive"),
        (["--tuned", "--runs", "nowhere"], "--tuned: no search.json in nowhere"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(UserError, match=message):
        methods._refuse_mistakes(methods._parser().parse_args(arguments))


# Search


@pytest.mark.parametrize("method", list(methods.RECIPES))
def test_the_grid_of_each_method_is_as_large_and_sets_what_it_says(method):
    grid = search.trials(method)
    assert len({trial.name for trial in grid}) == len(grid) == 6
    path = methods.tables.ROOT / methods.RECIPES[method]
    plain = flatten(load(path).dump())
    reached = set()
    for trial in grid:
        settings = flatten(load(path, trial.overrides).dump())
        knob = search.KNOBS[method]
        assert plain.keys() == settings.keys()
        changed = {key for key in plain if plain[key] != settings[key]}
        assert changed <= {search.LEARNING_RATE, *knob.keys}
        assert len({settings[key] for key in knob.keys}) == 1
        reached.add((settings[search.LEARNING_RATE], settings[knob.keys[0]]))
    assert reached == {(rate, value) for rate in search.RATES for value in knob.values}


def test_a_trial_is_scored_when_the_budget_is_spent():
    trial = search.trials("awm")[0]
    run = make_run((0, 0.1), (10, 0.3), (20, 0.5))
    assert search.result(trial, run, "ocr_exact", 15.0)["score"] == pytest.approx(0.4)
    failed = make_run((0, 0.1), (10, 0.3), failed=True)
    assert search.result(trial, failed, "ocr_exact", 15.0)["score"] is None


def test_the_best_trial_wins_and_a_failed_one_never():
    tried = [("awm", "a", 0.3), ("awm", "b", 0.5), ("awm", "c", 0.5), ("nft", "d", None)]
    results = [{"method": m, "tried": [s], "score": score} for m, s, score in tried]
    assert search.winners(results) == {"awm": ["b"]}


def test_report_of_the_search_states_space_budget_and_winner():
    trials = [
        {"method": "awm", "tried": ["optimizer.learning_rate=0.002"], "score": 0.5, "steps": 40},
        {"method": "awm", "tried": ["optimizer.learning_rate=0.001"], "score": None, "steps": 9},
    ]
    found = {"metric": "ocr_exact", "seed": 100, "effort": "Each: 240 CPU-seconds",
             "trials": trials, "winners": search.winners(trials)}  # fmt: skip
    text = search.report(found)
    assert "Each: 240 CPU-seconds, seed 100" in text
    assert "Score: ocr_exact" in text
    assert "| awm | optimizer.learning_rate=0.002 | 40 | 0.500 | won |" in text
    assert "| awm | optimizer.learning_rate=0.001 | 9 | failed |  |" in text
    section = methods._search_section(found, options())
    assert "| awm | optimizer.learning_rate=0.002 | no |" in section
    assert "| yes |" in methods._search_section(found, options(tuned=True))
    json.dumps(found)


def test_a_recipe_that_has_the_winning_values_uses_them():
    rate = load(methods.tables.ROOT / methods.RECIPES["awm"]).optimizer.learning_rate
    assert methods.uses("awm", [f"optimizer.learning_rate={rate}"])
    assert not methods.uses("awm", [f"optimizer.learning_rate={2 * rate}"])


# Results


@pytest.fixture
def stubbed(monkeypatch):
    """Runs that are there; the jobs that were asked for."""
    jobs: list[Job] = []
    by_name = {f"{method}-seed{seed}": run for (method, seed), run in RUNS.items()}

    def ensure(job: Job, *, fresh: bool) -> Run:
        jobs.append(job)
        return by_name.get(job.folder.name, RUNS["awm", 0])

    monkeypatch.setattr(methods, "ensure", ensure)
    monkeypatch.setattr(methods, "stop_when_terminated", lambda: None)
    return jobs


def test_comparison_is_written(tmp_path, stubbed, capsys):
    given = ["--methods", "awm", "flow-grpo", "nft", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert methods.main([*given, "--runs", str(tmp_path)]) == 0
    assert [job.folder.name for job in stubbed[:4]] == [
        "awm-seed0", "flow-grpo-seed0", "nft-seed0", "awm-seed1"
    ]  # fmt: skip
    (data,) = tmp_path.glob("*-methods.json")
    found = json.loads(data.read_text())
    assert found["figures"] == methods.figures(RUNS)
    assert found["runs"][1]["points"][1]["scores"]["ocr_exact"] == 0.15
    assert "13.33 ± 9.43" in data.with_suffix(".md").read_text()
    assert data.with_suffix(".png").stat().st_size > 10_000
    assert "13.33 ± 9.43" in capsys.readouterr().out


def test_search_trains_every_trial_with_the_same_budget_and_keeps_the_winner(
    tmp_path, stubbed, capsys
):
    given = ["--search", "--methods", "awm", "nft", "--runs", str(tmp_path), "--out", str(tmp_path)]
    assert methods.main([*given, "--budget", "15", "--every", "2"]) == 0
    assert {(job.budget, job.seed) for job in stubbed} == {(15.0, 100)}
    scored_on = {str(job.settings.evaluation.source) for job in stubbed}
    assert scored_on == {"assets/prompts/ocr-train.jsonl"}
    assert len({job.folder for job in stubbed}) == len(stubbed) == 12
    found = json.loads((tmp_path / search.RECORD).read_text())
    assert [trial["score"] for trial in found["trials"]] == pytest.approx([0.4] * 12)
    assert found["winners"]["nft"] == list(search.trials("nft")[0].overrides)
    assert "nft" in capsys.readouterr().out
    # From now on the comparison reports it, and may use it.
    seeds = ["--seeds", "0", "--methods", "awm", "--runs", str(tmp_path), "--out", str(tmp_path)]
    methods.main([*seeds, "--tuned"])
    assert set(search.trials("awm")[0].overrides) <= set(stubbed[-1].overrides)
    (text,) = tmp_path.glob("*-methods.md")
    assert "15 CPU-seconds of training for each setting" in text.read_text()
