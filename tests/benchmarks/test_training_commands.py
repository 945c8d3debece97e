"""Runs of a benchmark: kept, continued, ended at a budget, and what is read from them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks import runs
from benchmarks.runs import Job, Point, Reached, Run
from mmrl.errors import UserError

ROWS = [
    {"step": 0, "eval/exact": 0.5},
    {"step": 1, "step_time": 2.0, "time/cpu": 3.0},
    {"step": 2, "step_time": 3.0, "time/cpu": 5.0},
    {"step": 2, "eval/exact": 0.6, "eval/broken": None},
    {"step": 3, "step_time": 4.0, "time/cpu": 12.0},
    {"step": 3, "eval/exact": 0.8},
    {"step": 4, "step_time": 1.0, "time/cpu": 1.0},
]
CURVE = runs.curve(ROWS)

# Stands in for `mmrl train`: a step costs 1 CPU-second on paper; every second one is evaluated, and
# the last one of a run that ends well.  It finishes its step when it is asked to stop.
TRAINING = """
import json, os, shutil, signal, sys, time
folder, settings, last, status, seconds = sys.argv[1:6]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
os.makedirs(folder, exist_ok=True)
shutil.copy(settings, folder + "/config.yaml")
with open(folder + "/metrics.jsonl", "a", buffering=1) as file:
    trained = sum("step_time" in line for line in open(folder + "/metrics.jsonl"))
    for step in range(trained and trained + 1, int(last) + 1):
        if stopped:
            sys.exit(130)
        time.sleep(float(seconds))
        if step:
            print(json.dumps({"step": step, "step_time": 0.5, "time/cpu": 1.0}), file=file)
        if step % 2 == 0 or (int(status) == 0 and step == int(last)):
            print(json.dumps({"step": step, "eval/exact": step / 100}), file=file)
if int(status) < 0:
    signal.raise_signal(-int(status))
sys.exit(int(status))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A job whose training ends after ``last`` steps with ``status``."""

    def make(*, last=4, status=0, seconds=0.0, **options) -> Job:
        folder = tmp_path / "run"
        job = Job(config=Path("configs/quickstart.yaml"), folder=folder, seed=3, **options)
        settings = tmp_path / "settings.yaml"
        settings.write_text(yaml.safe_dump(job.settings.dump()))
        arguments = [str(folder), str(settings), str(last), str(status), str(seconds)]
        command = [sys.executable, "-c", TRAINING, *arguments]
        monkeypatch.setattr(runs, "train_command", lambda *_, **__: command)
        monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
        return job

    return make


FOUR = ("training.num_steps=4",)


def statuses(job: Job) -> list[int]:
    return [piece["status"] for piece in json.loads((job.folder / runs.PIECES).read_text())]


def test_curve_counts_the_steps_before_each_evaluation_and_nothing_else():
    assert CURVE == [
        Point(step=0, cpu=0.0, wall=0.0, scores={"exact": 0.5}),
        Point(step=2, cpu=8.0, wall=5.0, scores={"exact": 0.6}),
        Point(step=3, cpu=20.0, wall=9.0, scores={"exact": 0.8}),
    ]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.5, Reached(cpu=0.0, wall=0.0)),
        (0.55, Reached(cpu=4.0, wall=2.5)),
        (0.6, Reached(cpu=8.0, wall=5.0)),
        (0.65, Reached(cpu=11.0, wall=6.0)),  # a quarter of the way from 8 to 20 and 5 to 9
        (0.81, None),
    ],
)
def test_crossing_lies_on_the_line_between_two_evaluations(target, expected):
    found = runs.crossing(CURVE, "exact", target)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.cpu, found.wall) == pytest.approx((expected.cpu, expected.wall))


def test_every_token_counts():
    row = {"num_samples": 10.0, "completions/mean_length": 7.0}
    assert runs.generated_tokens(row) == 70
    assert runs.generated_tokens(row | {"sampler/refresh_samples": 5.0}) == 105
    points = runs.curve([{"step": 0, "eval/exact": 0.1}, row, row | {"step": 2, "eval/exact": 0.3}])
    assert [point.tokens for point in points] == [0.0, 140.0]
    assert runs.score_at(points, "exact", 70.0, "tokens") == pytest.approx(0.2)
    reached = runs.crossing(points, "exact", 0.25)
    assert reached is not None
    assert reached.tokens == pytest.approx(105.0)


def test_the_first_crossing_counts_not_a_later_one():
    assert runs.first_crossing([0.0, 1.0, 0.0, 4.0], 0.5) == 0.5
    assert runs.first_crossing([0.0, 1.0, 0.0, 4.0], 2.0) == 2.5


def test_score_at_a_time_between_and_after_the_evaluations():
    assert runs.score_at(CURVE, "exact", 14.0) == pytest.approx(0.7)
    assert runs.score_at(CURVE, "exact", 99.0) == 0.8


def test_a_finished_run_is_kept(start):
    job = start(overrides=FOUR)
    first = runs.ensure(job)
    assert [point.step for point in first.points] == [0, 2, 4]
    assert not first.failed
    assert runs.ensure(job) == first
    assert statuses(job) == [0]


def test_fresh_trains_again(start):
    job = start(overrides=FOUR)
    runs.ensure(job)
    (job.folder / "mark").touch()
    run = runs.ensure(job, fresh=True)
    assert not (job.folder / "mark").exists()
    assert [point.cpu for point in run.points] == [0.0, 2.0, 4.0]


def test_a_budget_ends_the_run_at_its_next_evaluation_and_can_grow(start):
    job = start(last=1000, seconds=0.05, budget=3.5)
    run = runs.ensure(job)
    assert [point.step for point in run.points] == [0, 2, 4]
    assert statuses(job) == [runs.INTERRUPTED]
    assert not run.failed
    assert runs.ensure(replace(job, budget=1.0)).points == run.points[:2]
    assert statuses(job) == [runs.INTERRUPTED]
    longer = runs.ensure(replace(job, budget=run.rows[-1]["step"] + 2.0))
    assert longer.points[:3] == run.points
    assert statuses(job) == [runs.INTERRUPTED] * 2


def test_a_run_that_fails_on_the_way_is_a_result(start):
    job = start(last=3, status=2, overrides=FOUR)
    run = runs.ensure(job)
    assert run.failed
    assert [point.step for point in run.points] == [0, 2]
    assert runs.ensure(job).failed
    assert statuses(job) == [2]


def test_a_run_that_fails_before_its_first_step_is_a_mistake(start):
    with pytest.raises(SystemExit, match="run: training ended with 2"):
        runs.ensure(start(last=0, status=2, overrides=FOUR))


def test_a_killed_run_is_continued(start):
    job = start(last=3, status=-9, overrides=FOUR)
    with pytest.raises(SystemExit, match="ended with -9"):
        runs.ensure(job)
    assert not runs.read(job).failed
    run = runs.ensure(start(overrides=FOUR))
    assert [point.cpu for point in run.points] == [0.0, 2.0, 4.0]
    assert statuses(job) == [-9, 0]


def test_an_interruption_ends_the_training_and_notes_its_cost(start, monkeypatch):
    job = start(last=1000, seconds=0.05, overrides=FOUR)

    def interrupt(process, job, ended):
        while not runs.curve(runs.read_metrics(job.folder / "metrics.jsonl")):
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runs.ensure(job)
    assert statuses(job) == [runs.INTERRUPTED]


@pytest.fixture
def start_endless(start, monkeypatch):
    """A job whose training goes as far as its command says."""

    def make(*, status=0, seconds=0.05, **options) -> Job:
        job = start(seconds=seconds, status=status, **options)
        fixed = runs.train_command(Path(), Path(), [])

        def command(config, folder, changes, *, resume):
            named = dict(change.split("=", 1) for change in changes)
            return [*fixed[:5], named["training.num_steps"], *fixed[6:]]

        monkeypatch.setattr(runs, "train_command", command)
        return job

    return make


def test_an_exported_run_ends_near_its_budget_and_its_last_step_is_evaluated(start_endless):
    job = start_endless(budget=7.0)
    run = runs.ensure_exported(job)
    last = run.points[-1]
    # Five steps leave two; that the fifth is done is seen a moment later.
    assert 7 <= last.step <= 8
    assert (last.step, last.cpu) == (run.rows[-1]["step"], float(last.step))
    assert statuses(job) == [runs.INTERRUPTED, 0]
    assert not run.failed
    assert runs.ensure_exported(job) == run
    assert statuses(job) == [runs.INTERRUPTED, 0]


def test_an_exported_run_that_was_interrupted_at_its_last_step_takes_another(
    start_endless, monkeypatch
):
    job = start_endless(budget=5.0)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_last_step", lambda job: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            runs.ensure_exported(job)
    assert statuses(job) == [runs.INTERRUPTED]
    before = len(runs.read_metrics(job.folder / "metrics.jsonl"))
    run = runs.ensure_exported(job)
    assert statuses(job) == [runs.INTERRUPTED, 0]
    assert len(run.rows) - before == 2, "one step and its evaluation"


def test_a_run_that_fails_before_its_budget_is_not_exported(start):
    job = start(last=3, status=2, budget=1000.0)
    run = runs.ensure_exported(job)
    assert run.failed
    assert [point.step for point in run.points] == [0, 2]
    assert runs.ensure_exported(job).failed
    assert statuses(job) == [2]


def test_other_settings_are_refused_but_not_another_length(start):
    job = start(overrides=FOUR)
    runs.ensure(job)
    shorter = replace(job, overrides=("training.num_steps=2",))
    assert [point.step for point in runs.ensure(shorter).points] == [0, 2]
    other = replace(job, overrides=(*FOUR, "optimizer.eps=1.0e-6"))
    with pytest.raises(UserError, match=r"--fresh redoes it\n  optimizer.eps: 1e-08 -> 1e-06$"):
        runs.ensure(other)


def test_where_the_rate_depends_on_the_length_another_length_is_refused(start):
    linear = "optimizer.schedule=linear"
    job = start(overrides=(*FOUR, linear))
    runs.ensure(job)
    with pytest.raises(UserError, match=r"training.num_steps: 4 -> 2$"):
        runs.ensure(replace(job, overrides=("training.num_steps=2", linear)))


def test_a_budget_needs_a_rate_that_does_not_know_the_end():
    job = Job(
        config=Path("configs/quickstart.yaml"),
        folder=Path("x"),
        seed=0,
        overrides=("optimizer.schedule=cosine",),
        budget=1.0,
    )
    with pytest.raises(UserError, match=r"'cosine' needs to know the last step.*'constant'"):
        job.settings  # noqa: B018


def test_the_command_names_the_run_after_its_folder_and_continues(tmp_path):
    folder = tmp_path / "awm-seed3"
    job = Job(config=Path("a.yaml"), folder=folder, seed=3, overrides=("x=1",), budget=5.0)
    expected = ["train", "a.yaml", "x=1", f"training.num_steps={runs.ENDLESS}", "seed=3",
                "name=awm-seed3", f"output_dir={folder}"]  # fmt: skip
    assert job.command[3:] == expected
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert job.command[3:] == [*expected, "--resume"]


def test_metered_counts_the_cpu_of_commands_and_the_wall():
    code = "import time; e = time.process_time() + 0.2\nwhile time.process_time() < e: pass"
    with runs.metered() as cost:
        runs.subprocess.run([sys.executable, "-c", f"{code}\ntime.sleep(0.3)"], check=True)
    assert 0.2 <= cost.cpu < 0.5 <= cost.wall


def test_overrides_are_written_as_yaml_reads_them():
    for value in (2e-6, 1e-3, True, [], [{"name": "a.b", "label": "c"}], "text"):
        key, _, text = runs.override("a.b", value).partition("=")
        assert (key, yaml.safe_load(text)) == ("a.b", value)


def test_mean_and_std():
    assert runs.mean_and_std([1.0, None, 3.0], ".1f") == "2.0 ± 1.4"
    assert runs.mean_and_std([1.0, 3.0], "+.1f") == "+2.0 ± 1.4"
    assert runs.mean_and_std([1.0], ".1f") == "1.0"
    assert runs.mean_and_std([None], ".1f") == "-"


def test_results_name_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (f"prompts.source={tmp_path / 'mix.jsonl'}", "seed=1")
    job = Job(config=Path("absent.yaml"), folder=tmp_path / "runs", seed=1, overrides=words)
    run = Run(job=job, points=[], rows=[], pieces=[], failed=False)
    assert run.record()["overrides"] == ["prompts.source=mix.jsonl", "seed=1"]
