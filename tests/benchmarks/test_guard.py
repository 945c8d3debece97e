"""Ratio statistics and gold at equal proxy, on runs whose answers can be worked out by hand."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gold, guard
from benchmarks.guard import FLOW, GUARD, Moments
from benchmarks.runs import Job, Point, Run
from mmrl.config import load
from mmrl.errors import UserError
from mmrl.run_folder import flatten

RECIPE = Path(guard.RECIPES[GUARD])
MEASURES = ("template", "grain")
PROXY = "ocr_soft"


def ratio_row(step: int, late: list[float], early: list[float]) -> dict:
    """Metrics of a step with two updates of as many samples each; the first has log-ratio 0.

    The corrected log-ratios are a tenth of the plain ones.
    """
    row: dict = {"step": step, "step_time": 1.0, "clip_ratio/low": 0.1, "clip_ratio/high": 0.3}
    for sigma, plain in (("0.250", late), ("1.000", early)):
        values = np.array([0.0] * len(plain) + plain)
        for kind, scale in (("_raw", 1.0), ("", 0.1)):
            row[f"log_ratio/mean{kind}/{sigma}"] = float((scale * values).mean())
            row[f"log_ratio/sq{kind}/{sigma}"] = float(((scale * values) ** 2).mean())
    return row


def make_run(
    seed: int = 0,
    proxy=(0.5, 0.6, 0.8),
    template=(0.7, 0.9, 0.7),
    rows=({"step": 1, "step_time": 1.0},),
) -> Run:
    points = [
        Point(step=10 * i, cpu=i, wall=i,
              scores={"ocr_soft": p, "ocr_exact": p / 2, "template": t, "grain": 1 - t})
        for i, (p, t) in enumerate(zip(proxy, template, strict=True))
    ]  # fmt: skip
    job = Job(config=RECIPE, folder=Path("absent"), seed=seed)
    return Run(job=job, points=points, rows=rows, pieces=[], failed=False)


ROWS = [ratio_row(1, late=[1.0, 3.0], early=[0.0, 0.2]), ratio_row(2, [5.0, 7.0], [0.4, 0.6])]
PAIR = {
    (FLOW, 0): make_run(rows=ROWS),
    (GUARD, 0): make_run(proxy=(0.5, 0.7, 0.9), template=(0.7, 0.8, 1.0), rows=ROWS),
}


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(guard._parser().parse_args([])), **changes})


# Ratios


def test_moments_leave_out_the_update_whose_ratio_is_one():
    found = guard.moments(ROWS[0], "0.250", "_raw", updates=2)
    assert found is not None
    assert (found.mean, found.variance) == (2.0, 1.0)  # of 1 and 3
    assert (found.std, found.bias) == (1.0, 2.0)
    corrected = guard.moments(ROWS[0], "0.250", "", updates=2)
    assert corrected is not None
    assert (corrected.mean, corrected.variance) == pytest.approx((0.2, 0.01))
    assert guard.moments(ROWS[0], "0.500", "_raw", updates=2) is None


def test_pooled_moments_are_those_of_all_values():
    parts = [Moments(mean=2.0, variance=1.0), Moments(mean=6.0, variance=1.0)]
    values = np.array([1.0, 3.0, 5.0, 7.0])
    found = guard.pooled(parts)
    assert (found.mean, found.variance) == pytest.approx((values.mean(), values.var()))


def test_bias_of_constant_ratios_is_no_division_by_zero():
    assert Moments(mean=1.0, variance=0.0).bias == 0.0


def test_denoising_steps_go_from_noise_to_data():
    assert guard.sigmas([{"step": 1}, *ROWS]) == ["1.000", "0.250"]


def test_ratio_records_of_each_view():
    found = {(r["view"], r["sigma"]): r for r in guard.ratio_records(PAIR)}
    late, early = np.array([1.0, 3.0, 5.0, 7.0]), np.array([0.0, 0.2, 0.4, 0.6])
    for title, scale in ((FLOW, 1.0), (f"{GUARD}, before", 1.0), (f"{GUARD}, after", 0.1)):
        assert found[title, 0.25]["mean"] == pytest.approx(scale * late.mean())
        assert found[title, 0.25]["variance"] == pytest.approx(scale**2 * late.var())
        assert found[title, 1.0]["std"] == pytest.approx(scale * early.std())
    view = [found[FLOW, sigma] for sigma in (1.0, 0.25)]
    assert guard.unevenness(view) == pytest.approx(10.0)
    assert guard.unevenness([{"std": 0.0}, {"std": 1.0}]) == math.inf


def test_ratio_table_and_clipped_shares():
    table = guard.ratio_table(guard.ratio_records(PAIR)).splitlines()
    assert table[2].startswith("| 1.000 | 3.0e-01 | 5.0e-02 | +1.342 |")
    assert table[3].startswith("| 0.250 | 4.0e+00 | 5.0e+00 | +1.789 |")
    assert table[4].split(" | ")[2] == "10.0"
    assert guard._clipped(PAIR) == f"{FLOW} 0.100 and 0.300, {GUARD} 0.100 and 0.300"


def test_one_update_for_each_rollout_has_no_ratios():
    job = replace(PAIR[GUARD, 0].job, overrides=("training.updates_per_epoch=1",))
    with pytest.raises(UserError, match="every ratio is 1; allowed: 2 or more"):
        guard.updates_per_step(replace(PAIR[GUARD, 0], job=job))
    twice = replace(job, overrides=("training.updates_per_epoch=3", "training.num_epochs=2"))
    assert guard.updates_per_step(replace(PAIR[GUARD, 0], job=twice)) == 6


# Gold


def test_levels_are_shares_of_the_gain_that_both_made():
    assert guard.levels(list(PAIR.values()), PROXY) == pytest.approx(
        {0.5: 0.65, 0.75: 0.725, 1.0: 0.8}
    )
    assert guard.levels([make_run(), make_run(proxy=(0.5, 0.4, 0.3))], PROXY) == {}


def test_gold_when_the_proxy_is_first_reached():
    points = make_run().points
    assert guard.gold_at(points, "template", PROXY, 0.55) == pytest.approx(0.8)
    assert guard.gold_at(points, "template", PROXY, 0.65) == pytest.approx(0.85)
    assert guard.gold_at(points, "template", PROXY, 0.81) is None


def test_gold_of_both_methods_at_the_same_proxy():
    found = guard.equal_proxy(PAIR, MEASURES, PROXY)
    top = next(r for r in found if (r["share"], r["measure"]) == (1.0, "template"))
    assert (top[FLOW], top[GUARD]) == pytest.approx((0.7, 0.9))  # 0.8 is half way to 0.9
    row = guard.equal_proxy_table(found).splitlines()[2 + found.index(top)]
    assert row == "| 100% | 0.800 | template | 0.700 | 0.900 | +0.200 | 1 of 1 |"


def test_without_a_common_gain_there_is_nothing_to_compare():
    flat = {(FLOW, 0): make_run(proxy=(0.5, 0.4, 0.4)), (GUARD, 0): make_run()}
    assert guard.equal_proxy(flat, MEASURES, PROXY) == []
    assert "nothing to compare" in guard.equal_proxy_table([])


def test_end_table():
    table = guard.end_table(PAIR, ["ocr_soft", "template"]).splitlines()
    assert table[2:] == [
        f"| {FLOW}, start | 0.500 | 0.700 |",
        f"| {FLOW}, end | 0.800 | 0.700 |",
        f"| {GUARD}, start | 0.500 | 0.700 |",
        f"| {GUARD}, end | 0.900 | 1.000 |",
    ]


# Runs and results


def test_flow_grpo_is_its_recipe_without_the_corrections(tmp_path):
    given = options(runs=tmp_path, steps=7, every=3)
    settings = guard.run_job(FLOW, 2, given).settings
    recipe = load(guard.tables.ROOT / guard.RECIPES[FLOW])
    objective, original = settings.objective.dump(), recipe.objective.dump()
    assert {key: objective[key] for key in ("clip_low", "clip_high")} == {
        key: original[key] for key in ("clip_low", "clip_high")
    }
    switches = ("drift_correction", "std_normalisation", "reweight")
    assert [objective[key] for key in ("name", *switches)] == ["grpo_guard", False, False, False]
    now, before = flatten(settings.dump()), flatten(recipe.dump())
    free = ("objective", "evaluation", "checkpoint", "tracking", "seed", "training.num_steps")
    assert [k for k in now if now[k] != before.get(k) and not k.startswith(free)] == []


def test_both_methods_train_alike_but_for_the_objective(tmp_path):
    given = options(runs=tmp_path, steps=7, overrides=["training.updates_per_epoch=4"])
    flow, other = (flatten(guard.run_job(m, 2, given).settings.dump()) for m in (FLOW, GUARD))
    differing = {key for key in flow if flow[key] != other[key]}
    assert {key.partition(".")[0] for key in differing} == {"objective", "name"}
    assert other["objective.reweight"]
    assert (flow["training.num_steps"], flow["training.updates_per_epoch"]) == (7, 4)
    assert flow["objective.log_by_sigma"]
    assert other["objective.log_by_sigma"]


def test_results_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "ensure", lambda job, fresh: PAIR[job.folder.name[:-6], 0])
    monkeypatch.setattr(guard, "stop_when_terminated", lambda: None)
    monkeypatch.setattr(gold, "available", lambda reward: list(MEASURES))
    assert guard.main(["--seeds", "0", "--out", str(tmp_path)]) == 0
    (data,) = tmp_path.glob("*-guard-ocr.json")
    assert len(json.loads(data.read_text())["runs"]) == 2
    text = data.with_suffix(".md").read_text()
    assert "| 100% | 0.800 | template | 0.700 | 0.900 | +0.200 | 1 of 1 |" in text
    for plot in ("ratios", "gold"):
        assert data.with_name(f"{data.stem}-{plot}.png").stat().st_size > 10_000


def test_plot_of_gold_has_a_path_for_each_run():
    panels = guard.plot_gold(PAIR, MEASURES, PROXY).axes
    assert [axes.get_visible() for axes in panels] == [True, True, False]
    flow, other = panels[0].lines
    assert list(np.asarray(flow.get_xdata())) == [0.5, 0.6, 0.8]
    assert list(np.asarray(other.get_ydata())) == [0.7, 0.8, 1.0]


def test_plot_of_ratios_shows_bias_and_evenness():
    left, right = guard.plot_ratios(PAIR).axes
    assert np.asarray(left.lines[0].get_ydata()) == pytest.approx([1.342, 1.789], abs=1e-3)
    # Standard deviations are as 1 to 10, so around their average 2/11 and 20/11.
    assert np.asarray(right.lines[2].get_ydata()) == pytest.approx([2 / 11, 20 / 11])


@pytest.mark.parametrize("method", guard.RECIPES)
def test_the_preference_task_changes_prompts_and_rewards(method, tmp_path):
    mine, ocr = (
        flatten(guard.run_job(method, 0, options(runs=tmp_path, reward=r)).settings.dump())
        for r in ("preference", "ocr")
    )
    differing = {key.partition(".")[0] for key in mine if mine[key] != ocr.get(key)}
    assert differing == {"prompts", "rewards", "evaluation"}


@pytest.mark.slow
@pytest.mark.parametrize("reward", guard.TASKS)
def test_two_real_steps(tmp_path, reward):
    """Both methods begin alike; ratios are those of the second update and go uncorrected."""
    small = ["training.prompts_per_step=2", "evaluation.max_prompts=2"]
    given = options(reward=reward, runs=tmp_path, steps=2, every=2, overrides=small)
    runs = {(m, 0): guard.ensure(guard.run_job(m, 0, given)) for m in guard.RECIPES}
    flow, other = (runs[m, 0] for m in guard.RECIPES)
    assert [point.step for point in flow.points] == [0, 2]
    assert flow.points[0].scores == other.points[0].scores
    assert guard.run_moments(flow, "_raw") == guard.run_moments(flow, "")
    after, before = guard.run_moments(other, ""), guard.run_moments(other, "_raw")
    assert after.keys() == before.keys() == guard.run_moments(flow, "").keys()
    assert len(after) == 9
    assert all(0 < after[s].variance < before[s].variance for s in after)  # S < 1
