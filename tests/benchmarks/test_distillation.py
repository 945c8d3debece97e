"""Figures of the comparison of distillation, mixed rewards and a cascade, worked out by hand."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import distillation
from benchmarks.distillation import AVERAGE, CASCADE, OPD, TASKS, Outcome
from benchmarks.runs import Job, Piece, Point, Run
from mmrl.config import RunConfig, load
from mmrl.errors import UserError
from mmrl.run_folder import flatten

ABOUT = {"processor": "X", "cores": 2, "accelerator": None, "python": "3", "versions": {},
         "commit": None, "threads": 2}  # fmt: skip
BASE = (0.5, 0.4, 0.8)
STAGES = {
    OPD: ["ocr-teacher", "composition-teacher", "preference-teacher", "student"],
    "per-reward": ["per-reward"],
    "weighted-sum": ["weighted-sum"],
    CASCADE: ["ocr", "composition", "preference"],
}


def make_run(
    end: tuple[float, float, float], *, start=BASE, cpu: float = 100.0, failed: bool = False
) -> Run:
    """A run of ten steps with scores on the three tasks before and after."""
    points = [
        Point(
            step=step,
            cpu=at,
            wall=at / 2,
            scores=dict(zip(TASKS.values(), scores, strict=True)),
        )
        for step, at, scores in ((0, 0.0, start), (10, cpu, end))
    ]
    return Run(
        job=Job(config=Path("c.yaml"), folder=Path("absent"), seed=0),
        points=points,
        rows=[{"step": 10, "time/cpu": cpu}],
        pieces=[Piece(wall=1.0, cpu=cpu + 30.0, status=0)],
        failed=failed,
    )


def distilled(seed: int, student: tuple[float, float, float], **last) -> Outcome:
    """Teachers that gain 0.4, 0.2 and 0.1 on their own tasks, and a student."""
    ends = [(0.9, 0.3, 0.7), (0.5, 0.6, 0.7), (0.4, 0.2, 0.9)]
    runs = [*map(make_run, ends), make_run(student, **last)]
    return Outcome(method=OPD, seed=seed, stages=dict(zip(STAGES[OPD], runs, strict=True)))


def cascaded(seed: int) -> Outcome:
    """Each stage starts where the one before ended and forgets some of what came before."""
    ends = [(0.9, 0.3, 0.8), (0.8, 0.6, 0.75), (0.7, 0.35, 0.9)]
    starts = [BASE, *ends]
    runs = [make_run(e, start=s) for e, s in zip(ends, starts, strict=False)]
    return Outcome(method=CASCADE, seed=seed, stages=dict(zip(STAGES[CASCADE], runs, strict=True)))


def mixed(method: str, seed: int, end: tuple[float, float, float]) -> Outcome:
    return Outcome(method=method, seed=seed, stages={method: make_run(end, cpu=400.0)})


OUTCOMES = [
    distilled(0, (0.7, 0.6, 0.9)),
    mixed("per-reward", 0, (0.7, 0.5, 0.85)),
    mixed("weighted-sum", 0, (0.9, 0.4, 0.75)),
    cascaded(0),
    distilled(1, (0.9, 0.6, 0.9)),
    mixed("per-reward", 1, (0.5, 0.4, 0.8)),
    mixed("weighted-sum", 1, (0.9, 0.4, 0.75)),
    cascaded(1),
]
RECORDS = distillation.figures(OUTCOMES)


def options(*given: str, **changes) -> argparse.Namespace:
    parsed = distillation._parser().parse_args(list(given))
    return argparse.Namespace(**{**vars(parsed), **changes})


METHODS = options().methods


def record(method: str, seed: int = 0) -> dict:
    return next(r for r in RECORDS if (r["method"], r["seed"]) == (method, seed))


def row(table: str, first: str) -> list[str]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return next([cell.strip() for cell in line] for line in lines if line[0].strip() == first)


# Figures


def test_a_share_is_1_where_the_model_is_as_good_as_the_teacher_of_its_seed():
    assert record(OPD)["teachers"] == {"ocr": 0.9, "composition": 0.6, "preference": 0.9}
    found = record(OPD)["shares"]
    assert list(found.values()) == pytest.approx([0.5, 1.0, 1.0])
    assert record(OPD)[AVERAGE] == pytest.approx(2.5 / 3)
    assert record("per-reward")[AVERAGE] == pytest.approx(0.5)
    assert list(record("weighted-sum")["shares"].values()) == pytest.approx([1.0, 0.0, -0.5])
    assert record("per-reward", 1)[AVERAGE] == pytest.approx(0.0)


def test_a_teacher_that_gained_nothing_gives_no_share_and_no_average():
    scores = dict.fromkeys(TASKS.values(), 0.9)
    base = dict.fromkeys(TASKS.values(), 0.5)
    found = distillation.shares(scores, base, {"ocr": 0.509, "composition": 0.4, "preference": 0.7})
    assert found == {"ocr": None, "composition": None, "preference": pytest.approx(2.0)}
    assert distillation.average(found) is None
    assert distillation.shares(scores, base, {}) == dict.fromkeys(TASKS)


def test_the_best_average_tells_a_collapse_from_what_was_never_learned():
    # After 0.8, 0.6 and 0.75 on the three tasks: 0.75, 1 and -0.5 of what teachers gained.
    assert record(CASCADE)[distillation.BEST] == pytest.approx(1.25 / 3)
    assert record(CASCADE)[AVERAGE] == pytest.approx((0.5 - 0.25 + 1) / 3)
    worse = mixed("per-reward", 0, (0.1, 0.1, 0.1))
    found = distillation.figures([distilled(0, BASE), worse])[1]
    assert found[AVERAGE] < found[distillation.BEST] == 0.0


def test_without_distillation_there_are_no_teachers_to_compare_with():
    records = distillation.figures([cascaded(0)])
    assert records[0][AVERAGE] is None
    assert records[0]["final"]["ocr_exact"] == 0.7
    assert "teachers" not in distillation.final_table(records, [CASCADE])


def test_a_cascade_forgets_and_a_student_lags_behind_its_teachers():
    assert list(record(CASCADE)["lost"].values()) == pytest.approx([0.2, 0.25, 0.0])
    assert list(record(OPD)["lost"].values()) == pytest.approx([0.2, 0.0, 0.0])
    assert list(record("per-reward")["lost"].values()) == [None] * 3


def test_teachers_count_in_what_distillation_costs():
    assert [record(method)["train_cpu"] for method in METHODS] == [400.0, 400.0, 400.0, 300.0]
    assert record(OPD)["other_cpu"] == 4 * 30
    assert record(OPD)["steps"] == 40


def test_a_method_ends_where_a_stage_fails_and_then_has_no_final_scores():
    failing = distilled(0, (0.7, 0.6, 0.9), failed=True)
    (found,) = distillation.figures([failing])
    assert found["failed"] == "student"
    assert found["teachers"]["preference"] == 0.9
    assert set(found["final"].values()) == set(found["lost"].values()) == {None}
    text = distillation.report([found], [failing], ABOUT, options("--methods", OPD))
    assert "Runs that failed: opd seed 0 (student)." in text


def test_a_cascade_goes_on_where_it_was():
    assert distillation.hand_over_gap(OUTCOMES) == 0.0
    stages = dict(cascaded(0).stages)
    stages["preference"] = make_run((0.7, 0.4, 0.9), start=(0.8, 0.57, 0.75))
    apart = Outcome(method=CASCADE, seed=0, stages=stages)
    assert distillation.hand_over_gap([*OUTCOMES, apart]) == pytest.approx(0.03)


def test_later_stages_of_a_cascade_may_start_elsewhere_but_no_teacher_may():
    assert distillation.odd_starts(OUTCOMES) == []
    odd = distilled(2, (0.7, 0.6, 0.9), start=(0.5, 0.45, 0.8))
    assert distillation.odd_starts([*OUTCOMES, odd]) == ["opd student seed 2"]
    judged = distilled(2, (0.7, 0.6, 0.9), start=(0.515, 0.4, 0.805))
    assert distillation.odd_starts([*OUTCOMES, judged]) == ["opd student seed 2"], "another judge"
    text = distillation.report(RECORDS, [*OUTCOMES, odd], ABOUT, options())
    assert "not comparable: opd student seed 2." in text


# Tables


def test_tables_have_means_and_spreads_over_seeds():
    table = distillation.final_table(RECORDS, METHODS)
    assert row(table, "base")[1:5] == [*(f"{x:.3f} ± 0.000" for x in BASE), "0"]
    assert row(table, "teachers")[1:5] == [*(f"{x:.3f} ± 0.000" for x in (0.9, 0.6, 0.9)), "1"]
    assert row(table, OPD)[1:] == [
        "0.800 ± 0.141", "0.600 ± 0.000", "0.900 ± 0.000", "0.92 ± 0.12", "0.92 ± 0.12"
    ]  # fmt: skip
    assert row(table, "per-reward")[-2:] == ["0.25 ± 0.35"] * 2
    table = distillation.share_table(RECORDS, METHODS)
    assert row(table, "weighted-sum")[1:] == [
        "1.00 ± 0.00", "0.00 ± 0.00", "-0.50 ± 0.00", "0.17", "0.17"
    ]  # fmt: skip
    assert row(table, "per-reward")[-2:] == ["0.00", "0.50"]
    table = distillation.seed_table(RECORDS, METHODS)
    assert row(table, "1")[1:3] == ["1.00", "0.00"]


def test_every_stage_is_shown_with_its_cost_and_all_its_scores():
    table = distillation.stage_table(OUTCOMES, METHODS)
    assert row(table, "opd: composition-teacher")[1:] == [
        "10 ± 0", "100 ± 0", "0.500 ± 0.000", "0.600 ± 0.000", "0.700 ± 0.000"
    ]  # fmt: skip
    assert row(table, "cascade: composition")[3] == "0.800 ± 0.000"
    assert row(table, "per-reward")[2] == "400 ± 0"


def test_losses_have_a_sign_and_methods_without_stages_a_dash():
    table = distillation.lost_table(RECORDS, METHODS)
    assert row(table, CASCADE)[1:] == ["+0.200 ± 0.000", "+0.250 ± 0.000", "+0.000 ± 0.000"]
    assert row(table, "weighted-sum")[1:] == ["-", "-", "-"]


def test_costs_and_failures():
    failing = replace(OUTCOMES[0], seed=2, stages={"ocr-teacher": make_run(BASE, failed=True)})
    table = distillation.cost_table(distillation.figures([*OUTCOMES, failing]), METHODS)
    assert row(table, OPD)[1:3] == ["1 of 3", "30 ± 17"]
    assert row(table, CASCADE)[1:] == ["0 of 2", "30 ± 0", "300 ± 0", "150 ± 0", "90 ± 0"]


def test_the_report_says_how_compute_is_shared_and_what_is_normalised():
    text = distillation.report(RECORDS, OUTCOMES, ABOUT, options("--seeds", "0", "1"))
    assert "seeds 0 1" in text
    assert "1600 CPU-seconds of training steps" in text
    assert "(score - base) / (teacher - base)" in text
    assert "Runs that failed: none." in text
    assert "not comparable" not in text


# Plot


def test_before_its_student_distillation_has_the_untrained_model():
    teachers = distillation.teacher_scores(OUTCOMES)[0]
    found = distillation.path_of(OUTCOMES[0], teachers)
    assert [point.cpu for point in found] == [0.0, 100.0, 200.0, 300.0, 400.0]
    assert [point.scores["ocr_exact"] for point in found] == [0.5, 0.5, 0.5, 0.5, 0.7]
    assert [point.scores[AVERAGE] for point in found] == pytest.approx([0, 0, 0, 0, 2.5 / 3])
    found = distillation.path_of(OUTCOMES[3], teachers)
    assert [point.cpu for point in found] == [0.0, 100.0, 100.0, 200.0, 200.0, 300.0]
    assert [point.scores["ocr_exact"] for point in found] == [0.5, 0.9, 0.9, 0.8, 0.8, 0.7]


def test_plot_has_a_line_for_each_method_and_one_for_the_teachers():
    figure = distillation.plot(OUTCOMES)
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == [*TASKS.values(), AVERAGE]
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    assert list(lines) == [*METHODS, "teacher"]
    assert lines[OPD][-1] == pytest.approx(0.8)
    assert set(lines["teacher"]) == {0.9}
    assert len(figure.axes[3].lines) == 4


def test_plot_without_teachers_has_no_average():
    failing = distilled(0, BASE, failed=True)
    figure = distillation.plot([mixed("per-reward", 0, BASE), failing])
    assert [str(line.get_label()) for line in figure.axes[0].lines] == ["per-reward", "teacher"]
    figure = distillation.plot([mixed("per-reward", 0, BASE)])
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1, 0]


# Training


def planned(method: str, tmp_path: Path, *given: str) -> dict[str, RunConfig]:
    return distillation.plan(method, 4, options("--runs", str(tmp_path), *given))


@pytest.mark.parametrize("method", METHODS)
def test_stages_are_those_of_the_recipe_and_are_evaluated_alike(method, tmp_path):
    plans = planned(method, tmp_path, "--every", "7", "training.group_size=4")
    assert list(plans) == STAGES[method]
    reference = planned("per-reward", tmp_path, "--every", "7")["per-reward"].evaluation
    for name, settings in plans.items():
        assert settings.run_dir == tmp_path / "1600s" / f"{method}-seed4" / name
        assert (settings.seed, settings.training.group_size) == (4, 4)
        assert settings.evaluation == reference
        assert settings.checkpoint.every == 7
    assert isinstance(reference.source, dict)
    assert set(reference.source) == set(TASKS)
    labels = {spec.label: spec.tasks for spec in reference.rewards}
    assert [labels[name] for name in TASKS.values()] == [[task] for task in TASKS]


def test_a_student_has_its_teachers_and_a_cascade_goes_on(tmp_path):
    folder = tmp_path / "1600s"
    section = planned(OPD, tmp_path)["student"].dump()["backend"]
    taught = {teacher["task"]: teacher["path"] for teacher in section["teachers"]}
    assert taught == {task: str(folder / "opd-seed4" / f"{task}-teacher") for task in TASKS}
    starts = [each.dump()["backend"]["model"]["lora"]["path"] for each in
              planned(CASCADE, tmp_path).values()]  # fmt: skip
    cascade = folder / "cascade-seed4"
    assert starts == [None, str(cascade / "ocr"), str(cascade / "composition")]


def test_the_weighted_sum_differs_from_the_other_mixture_in_its_advantage_alone(tmp_path):
    first, second = (
        flatten(planned(method, tmp_path)[method].dump())
        for method in ("per-reward", "weighted-sum")
    )
    keys = {key for key in first.keys() | second if first.get(key) != second.get(key)}
    changed = {key.split(".")[0] for key in keys}
    assert changed == {"advantage", "output_dir"}
    assert second["advantage.name"] == "group"


@pytest.fixture
def stubbed(monkeypatch):
    """Runs that cost a little more than they may; the jobs that were asked for."""
    jobs: list[Job] = []

    def ensure_exported(job: Job) -> Run:
        jobs.append(job)
        assert job.budget is not None
        failed = job.folder.name == "composition" and job.seed == 13
        return replace(make_run((0.9, 0.6, 0.9), cpu=job.budget + 6.0, failed=failed), job=job)

    monkeypatch.setattr(distillation, "ensure_exported", ensure_exported)
    monkeypatch.setattr(distillation, "stop_when_terminated", lambda: None)
    return jobs


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_the_same_compute(method, tmp_path, stubbed):
    given = options("--runs", str(tmp_path), "--budget", "800")
    outcome = distillation.train(method, 0, given)
    assert list(outcome.stages) == [job.folder.name for job in stubbed] == STAGES[method]
    assert stubbed[0].budget == 800 / len(STAGES[method])
    # What one stage spends too much, the following ones lack, so only the last one's is too much.
    assert sum(run.points[-1].cpu for run in outcome.stages.values()) == pytest.approx(806)


def test_the_command_trains_the_written_stage_without_an_end(tmp_path, stubbed):
    distillation.train(OPD, 3, options("--runs", str(tmp_path)))
    student = stubbed[-1]
    folder = tmp_path / "1600s" / "opd-seed3"
    assert student.config == folder / "student.yaml"
    written = load(student.config)
    assert written.dump() == planned_student(tmp_path).dump()
    assert student.command[3:] == [
        "train", str(folder / "student.yaml"), "training.num_steps=1000000", "seed=3",
        "name=student", f"output_dir={folder / 'student'}",
    ]  # fmt: skip
    assert student.settings.training.num_steps > written.training.num_steps


def planned_student(tmp_path: Path) -> RunConfig:
    return distillation.plan(OPD, 3, options("--runs", str(tmp_path)))["student"]


def test_no_stage_follows_one_that_failed(tmp_path, stubbed):
    outcome = distillation.train(CASCADE, 13, options("--runs", str(tmp_path)))
    assert list(outcome.stages) == ["ocr", "composition"]
    assert (outcome.failed, outcome.end) == ("composition", {})


def test_fresh_removes_every_stage_before_the_first_trains(tmp_path, stubbed):
    student = tmp_path / "1600s" / "opd-seed0" / "student"
    student.mkdir(parents=True)
    distillation.train(OPD, 0, options("--runs", str(tmp_path), "--fresh"))
    assert student.is_dir(), "it holds no run"
    (student / "config.yaml").touch()
    distillation.train(OPD, 0, options("--runs", str(tmp_path), "--fresh"))
    assert not student.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "cascdae"], "--methods: unknown 'cascdae'; did you mean 'cascade'"),
        (["--methods", "opd", "opd"], "--methods: opd is given twice"),
        (["--seeds", "3", "3"], "--seeds: 3 is given twice"),
        (["--budget", "0"], "--budget: 0 is not positive"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(UserError, match=message):
        distillation.main(arguments)


def test_a_mistake_in_an_override_names_the_stage(tmp_path):
    with pytest.raises(UserError, match=r"stage 'ocr-teacher': training.group_sise"):
        planned(OPD, tmp_path, "training.group_sise=3")


def test_results_are_written(tmp_path, stubbed, capsys):
    given = ["--seeds", "0", "1", "--out", str(tmp_path / "out"), "--runs", str(tmp_path)]
    assert distillation.main([*given, "--budget", "100"]) == 0
    assert len(stubbed) == 2 * 9
    (path,) = (tmp_path / "out").glob("*-distillation.json")
    data = json.loads(path.read_text())
    assert [(r["method"], r["seed"]) for r in data["figures"]] == [
        (method, seed) for seed in (0, 1) for method in METHODS
    ]
    assert {(r["method"], r["stage"]) for r in data["runs"]} == {
        (method, stage) for method in METHODS for stage in STAGES[method]
    }
    assert str(tmp_path) not in path.read_text()
    text = path.with_suffix(".md").read_text()
    assert "| opd: student | 10 ± 0 |" in text
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert text.strip() in capsys.readouterr().out
