"""Tables of a recipe over seeds, on runs whose answers can be worked out by hand."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import recipe_seeds
from benchmarks.runs import Job, Piece, Point, Run

RECIPE = Path("configs/text/tiny-qwen/grpo-arithmetic.yaml")


def make_run(seed: int, after: float) -> Run:
    points = [
        Point(step=0, cpu=0.0, wall=0.0, scores={"exact_match": 0.4}),
        Point(step=10, cpu=30.0, wall=20.0, scores={"exact_match": after}),
    ]
    job = Job(config=RECIPE, folder=Path("absent"), seed=seed)
    rows = [{"step": 1, "time/cpu": 30.0}]
    return Run(
        job=job, points=points, rows=rows, pieces=[Piece(wall=25, cpu=35, status=0)], failed=False
    )


def test_the_table_has_each_seed_and_the_mean():
    table = recipe_seeds.seed_table([make_run(0, 0.6), make_run(1, 0.7)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0][:4] == ["seed", "exact_match before", "exact_match after", "exact_match gain"]
    assert lines[2] == ["0", "0.400", "0.600", "0.200", "3.000", "20", "25"]
    assert lines[3][2:4] == ["0.700", "0.300"]
    assert lines[4][3] == "0.250 ± 0.071"


def test_a_run_that_diverged_has_no_gain():
    run = make_run(0, 0.6)
    run = replace(run, points=[run.points[0], replace(run.points[1], scores={})])
    row = recipe_seeds.seed_table([run]).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["0.400", "-", "-"]


def test_the_job_is_the_recipe(tmp_path):
    options = argparse.Namespace(recipe=RECIPE, runs=tmp_path, overrides=["optimizer.eps=1e-9"])
    job = recipe_seeds.run_job(3, options)
    assert job.folder == tmp_path / "tiny-qwen-grpo-arithmetic-seed3"
    assert job.settings.seed == 3
    assert job.settings.optimizer.eps == pytest.approx(1e-9)
