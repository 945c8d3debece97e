"""What the seeds benchmark computes from a run, and the table it makes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import quickstart_seeds as seeds

ROWS = [
    {"step": 0, "eval/ocr_exact": 0.5},
    {"step": 1, "step_time": 2.0},
    {"step": 2, "step_time": 3.0},
    {"step": 2, "eval/ocr_exact": 0.7},
    {"step": 3, "step_time": 4.0},
    {"step": 3, "eval/ocr_exact": 0.95},
    {"step": 4, "step_time": 5.0},
    {"step": 4, "eval/ocr_exact": 0.92},
]
CPU = [10.0, 13.0, 17.0, 20.0, 25.0, 30.0, 36.0, 40.0]


def make_run(rows=ROWS):
    return seeds.Run(folder=Path(), rows=rows, cpu_at_line=CPU, wall=60.0, cpu=45.0)


def test_training_seconds_leave_out_evaluations_and_what_comes_later():
    reached = seeds.first_reaching(ROWS, CPU, 0.9)
    assert reached == seeds.Reached(step=3, wall=2 + 3 + 4, cpu=3 + 4 + 5)


def test_a_target_met_before_training_costs_nothing():
    assert seeds.first_reaching(ROWS, CPU, 0.5) == seeds.Reached(step=0, wall=0.0, cpu=0.0)


def test_the_target_itself_counts_as_reached():
    reached = seeds.first_reaching(ROWS, CPU, 0.7)
    assert reached is not None
    assert reached.step == 2


def test_figures_of_a_run():
    found = seeds.figures(make_run())
    assert (found["exact_before"], found["exact_after"], found["exact_best"]) == (0.5, 0.92, 0.95)
    assert (found["step"], found["run_seconds"], found["run_cpu"]) == (3, 60.0, 45.0)


def test_a_run_that_never_arrives_has_no_step():
    found = seeds.figures(make_run(ROWS[:4]))
    assert found["step"] is None
    assert found["train_seconds"] is None
    assert found["exact_after"] == 0.7


def test_compare_pairs_before_and_after():
    paired = seeds.compare({"diversity": 0.4, "ddddocr": 0.5}, {"diversity": 0.3, "ddddocr": 0.9})
    assert paired["diversity_kept"] == pytest.approx(0.75)
    assert (paired["ddddocr_before"], paired["ddddocr_after"]) == (0.5, 0.9)


def test_report_has_every_seed_and_the_spread():
    look = {"diversity": 0.2, "pictures": 276.0, "template": 0.5}
    records = [
        {"seed": s, **seeds.figures(make_run(rows)), **seeds.compare(look, look)}
        for s, rows in ((0, ROWS), (1, ROWS[:4]))
    ]
    about = {"processor": "X", "cores": 2, "accelerator": None, "python": "3", "versions": {},
             "commit": None}  # fmt: skip
    options = argparse.Namespace(config=Path("configs/quickstart.yaml"), images=3, overrides=[])
    text = seeds.report(records, {"template": 0.99}, about, options)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == [
        "0", "1", "**mean**", "**min**", "**max**", "**std**"
    ]  # fmt: skip
    assert rows[4].split(" | ")[2] == "0.810"  # mean of 0.92 and 0.7
    assert rows[3].split(" | ")[4] == "-"  # seed 1 never arrived
    assert "1 of 2 seeds reached" in text
    assert "276 held-out pictures" in text
    assert "template 0.990" in text


def test_watch_notes_cpu_time_at_each_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    code = (
        "import sys, time\n"
        "with open(sys.argv[1], 'w', buffering=1) as file:\n"
        "    for _ in range(2):\n"
        "        end = time.process_time() + 0.3\n"
        "        while time.process_time() < end: pass\n"
        "        print('{}', file=file)\n"
        "        time.sleep(1.0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(metrics)])
    first, second = seeds._watch(process, metrics)
    assert process.returncode == 0
    # 0.3 s of work before each line; start-up and the clock's ticks are below the margin.
    assert first >= 0.25
    assert 0.2 <= second - first <= 0.5
