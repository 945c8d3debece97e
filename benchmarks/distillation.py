"""Three tasks in one model: distillation, mixed rewards and a cascade, at equal training compute.

    python -m benchmarks.distillation [--seeds 0 1 2] [--budget 1600] [--methods opd cascade ...]

Every method gets the same CPU-seconds of training for each seed; what distillation spends on its
teachers counts.  All models, the one before training included, draw the held-out prompts of all
three tasks from the same noise.  Every run is a process of its own; what is finished is kept and
what was interrupted is continued, so the same command may be given again and again; ``--fresh``
begins anew.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import bands, tables
from benchmarks.runs import (
    START_TOLERANCE,
    Job,
    Point,
    Run,
    costs,
    ensure_exported,
    experiment_parser,
    mean_and_std,
    override,
    starts_apart,
    stop_when_terminated,
)
from mmrl import config, stages
from mmrl.charts import SERIES_COLOURS
from mmrl.config import RunConfig
from mmrl.errors import UserError
from mmrl.run_folder import CONFIG
from mmrl.schema import nearest

FOLDER = Path("configs/diffusion/tiny-sd3")
MIXED = FOLDER / "multi-reward.yaml"
OPD, CASCADE = "opd", "cascade"
RECIPES = {
    OPD: FOLDER / "opd.yaml",
    "per-reward": MIXED,
    "weighted-sum": MIXED,
    CASCADE: FOLDER / "cascade.yaml",
}
CHANGES = {"weighted-sum": (override("advantage", {"name": "group", "deviation": "global"}),)}
TASKS = {"ocr": "ocr_exact", "composition": "composition_strict", "preference": "preference"}
"""Task -> its score on held-out prompts, as the recipes label it."""
START_TOLERANCES = dict.fromkeys(TASKS.values(), START_TOLERANCE) | {"preference": 0.002}
LEAST_GAIN = 0.01
"""Of a teacher: less is noise, and a share of it says nothing."""
AVERAGE, BEST = "normalised average", "best on the way"
BUDGET = 1600.0

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a method came to with one seed: its runs in order, up to the first that failed."""

    method: str
    seed: int
    stages: Mapping[str, Run]

    @property
    def failed(self) -> str | None:
        """The stage that failed."""
        return next((name for name, run in self.stages.items() if run.failed), None)

    @property
    def start(self) -> Mapping[str, float]:
        """Scores before any training."""
        return next(iter(self.stages.values())).points[0].scores

    @property
    def end(self) -> Mapping[str, float]:
        """Scores of the final model; none if a stage failed."""
        return {} if self.failed else list(self.stages.values())[-1].points[-1].scores

    def after_own_stage(self, task: str) -> float | None:
        """The task's score at the end of the stage that trained it alone, if there is one."""
        run = self.stages.get(task) or self.stages.get(f"{task}-teacher")
        return None if run is None or run.failed else run.points[-1].scores[TASKS[task]]


Outcomes = Sequence[Outcome]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then print and write."""
    stop_when_terminated()
    options = _parser().parse_args(arguments)
    _refuse_mistakes(options)
    outcomes = [
        train(method, seed, options) for seed in options.seeds for method in options.methods
    ]
    about = tables.machine() | {"threads": torch.get_num_threads()}
    records = figures(outcomes)
    markdown = report(records, outcomes, about, options)
    data = {
        "machine": about,
        "budget": options.budget,
        "overrides": options.overrides,
        "figures": records,
        "runs": [
            {"method": outcome.method, "stage": stage, **run.record()}
            for outcome in outcomes
            for stage, run in outcome.stages.items()
        ],
    }
    path = tables.write_results(options.out, "distillation", markdown, data)
    plot(outcomes).savefig(path.with_suffix(".png"), dpi=150)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


# Training


def train(method: str, seed: int, options: argparse.Namespace) -> Outcome:
    """The stages of a method, each with an equal part of what the ones before it left."""
    planned = plan(method, seed, options)
    if options.fresh:
        _forget(folder_of(method, seed, options), planned)
    trained: dict[str, Run] = {}
    left = options.budget
    for number, (name, settings) in enumerate(planned.items()):
        job = run_job(name, settings, budget=left / (len(planned) - number))
        trained[name] = ensure_exported(job)
        if trained[name].failed:
            break
        left -= trained[name].points[-1].cpu
    return Outcome(method=method, seed=seed, stages=trained)


def plan(method: str, seed: int, options: argparse.Namespace) -> dict[str, RunConfig]:
    """The runs of a method, by stage; a recipe without stages is one, named like the method."""
    path, folder = tables.ROOT / RECIPES[method], folder_of(method, seed, options)
    changes = [*CHANGES.get(method, ()), *_shared(options), override("seed", seed)]
    if stages.is_stages_file(config.read_yaml(path)):
        found = stages.load(path, [*changes, f"output_dir={folder}"])
        return {stage.name: stage.config for stage in found.stages}
    return {method: config.load(path, [*changes, f"output_dir={folder / method}"])}


def run_job(stage: str, settings: RunConfig, budget: float) -> Job:
    """The training command of a stage, whose configuration is written beside its run folder."""
    folder = settings.run_dir
    path = folder.with_name(f"{stage}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings.dump(), sort_keys=False), encoding="utf-8")
    return Job(config=path, folder=folder, seed=settings.seed, budget=budget)


def folder_of(method: str, seed: int, options: argparse.Namespace) -> Path:
    """Where the stages are trained: apart for each budget, as a stage starts from those before."""
    return options.runs / f"{options.budget:g}s" / f"{method}-seed{seed}"


def _shared(options: argparse.Namespace) -> tuple[str, ...]:
    """What is the same for all runs: above all what is evaluated."""
    judged = config.load(tables.ROOT / MIXED).dump()["evaluation"]
    return (
        override("evaluation.source", judged["source"]),
        override("evaluation.rewards", judged["rewards"]),
        override("evaluation.samples_per_prompt", 3),
        override("evaluation.every", options.every),
        override("checkpoint.every", options.every),
        override("checkpoint.keep_last", 1),
        override("tracking.trackers", []),
        *options.overrides,
    )


def _forget(folder: Path, planned: Mapping[str, RunConfig]) -> None:
    """Remove all stages, since each starts from those before it."""
    if any((settings.run_dir / CONFIG).is_file() for settings in planned.values()):
        shutil.rmtree(folder)


# Figures


def figures(outcomes: Outcomes) -> list[Record]:
    """One record for each method and seed; teachers are those of the same seed."""
    teachers = teacher_scores(outcomes)
    return [_figures(outcome, teachers.get(outcome.seed, {})) for outcome in outcomes]


def _figures(outcome: Outcome, teachers: Mapping[str, float | None]) -> Record:
    spent = [costs(run) for run in outcome.stages.values()]
    return {
        "method": outcome.method,
        "seed": outcome.seed,
        "failed": outcome.failed,
        "base": {name: outcome.start[name] for name in TASKS.values()},
        "final": {name: outcome.end.get(name) for name in TASKS.values()},
        "teachers": dict(teachers),
        "shares": shares(outcome.end, outcome.start, teachers),
        AVERAGE: average(shares(outcome.end, outcome.start, teachers)),
        BEST: best_average(outcome, teachers),
        "lost": {task: lost(outcome, task) for task in TASKS},
        **{key: sum(each[key] for each in spent) for key in ("steps", *COSTS)},
    }


COSTS = {"train_cpu": "training CPU-s", "train_wall": "training wall s", "other_cpu": "other CPU-s"}


def teacher_scores(outcomes: Outcomes) -> dict[int, dict[str, float | None]]:
    """By seed, what each teacher has on its own task."""
    return {
        outcome.seed: {task: outcome.after_own_stage(task) for task in TASKS}
        for outcome in outcomes
        if outcome.method == OPD
    }


def shares(
    scores: Mapping[str, float],
    base: Mapping[str, float],
    teachers: Mapping[str, float | None],
) -> dict[str, float | None]:
    """By task, (score - base) / (teacher - base).

    ``None`` without a score or a teacher, or where the teacher gained less than `LEAST_GAIN`.
    """
    return {
        task: _share(scores.get(name), base[name], teachers.get(task))
        for task, name in TASKS.items()
    }


def _share(score: float | None, base: float, teacher: float | None) -> float | None:
    if score is None or teacher is None or teacher - base < LEAST_GAIN:
        return None
    return (score - base) / (teacher - base)


def average(parts: Mapping[str, float | None]) -> float | None:
    """The mean over tasks; ``None`` unless all have a share."""
    known = [part for part in parts.values() if part is not None]
    return sum(known) / len(known) if len(known) == len(parts) else None


def best_average(outcome: Outcome, teachers: Mapping[str, float | None]) -> float | None:
    """The largest normalised average at any evaluation of the model on its way."""
    found = [point.scores.get(AVERAGE) for point in path_of(outcome, teachers)]
    return max((value for value in found if value is not None), default=None)


def lost(outcome: Outcome, task: str) -> float | None:
    """How much lower the final model is than the one that was trained on this task alone.

    For a cascade that is what later stages made it forget, for distillation what the student did
    not take over from its teacher.  ``None`` for methods that train all tasks at once.
    """
    own, final = outcome.after_own_stage(task), outcome.end.get(TASKS[task])
    return None if own is None or final is None else own - final


def hand_over_gap(outcomes: Outcomes) -> float:
    """Largest difference between the end of a stage of the cascade and the start of the next."""
    gaps = [0.0]
    for runs in (list(each.stages.values()) for each in outcomes if each.method == CASCADE):
        for before, after in pairwise(runs):
            end, start = before.points[-1].scores, after.points[0].scores
            gaps += [abs(end[name] - start[name]) for name in TASKS.values()]
    return max(gaps)


def odd_starts(outcomes: Outcomes) -> list[str]:
    """Runs from the untrained model whose first scores are not those of the first run."""
    runs = {}
    for outcome in outcomes:
        fresh = list(outcome.stages)[:1] if outcome.method == CASCADE else list(outcome.stages)
        for stage in fresh:
            runs[f"{outcome.method} {stage} seed {outcome.seed}"] = outcome.stages[stage]
    return starts_apart(runs, START_TOLERANCES)


# Report


def report(
    records: Sequence[Record],
    outcomes: Outcomes,
    about: Mapping[str, Any],
    options: argparse.Namespace,
) -> str:
    """The whole result in markdown."""
    changes = f" All with {' '.join(options.overrides)}." if options.overrides else ""
    odd, failed = odd_starts(outcomes), [r for r in records if r["failed"]]
    names = [f"{r['method']} seed {r['seed']} ({r['failed']})" for r in failed]
    return "\n\n".join(
        [
            f"# Three tasks in one model: seeds {' '.join(map(str, options.seeds))}",
            f"{options.budget:g} CPU-seconds of training steps (rollout, reward, update) for each "
            f"method and seed, divided equally among the stages of {OPD} (three teachers and the "
            f"student) and of {CASCADE}.{changes} Start-up, evaluations and checkpoints are not in "
            "them. Scores: held-out prompts of each task, the same noise for all models, averaged "
            f"weights. Runs that failed: {', '.join(names) or 'none'}.",
            *([f"**Evaluated in another way, not comparable: {', '.join(odd)}.**"] if odd else []),
            "## Final models",
            final_table(records, options.methods),
            "teachers: each on its own task. Normalised average: mean over tasks of "
            "(score - base) / (teacher - base), with base and teachers of the same seed; 1 is as "
            "good as three models. A dash where a teacher is missing or gained less than "
            f"{LEAST_GAIN:g}. {BEST}: the largest average at any evaluation, to tell a collapse "
            "from what was never learned; chosen on the held-out prompts, so no result to compare.",
            "Share of each teacher's gain, and range of the average over seeds:",
            share_table(records, options.methods),
            seed_table(records, options.methods),
            f"The {AVERAGE}, seed by seed.",
            "## After each stage",
            stage_table(outcomes, options.methods),
            "All stages but the later ones of the cascade start from the model before training. "
            "Largest difference between the end of a stage of the cascade and the start of the "
            f"next: {hand_over_gap(outcomes):.3f}.",
            "## What was lost",
            lost_table(records, options.methods),
            "cascade: score right after the task's own stage minus score at the end, which is what "
            "later stages made it forget. opd: score of the task's teacher minus score of the "
            "student. Below 0: gained. The other methods train all tasks at once.",
            "## Cost",
            cost_table(records, options.methods),
            "other CPU-s: start-up, evaluations, checkpoints and export of the whole commands.",
            f"± is the standard deviation over seeds (n - 1). {about['threads']} threads. "
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def final_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Scores before training, of the teachers and of each method's final model."""
    names = list(TASKS.values())
    rows = [["base", *_means(records, "base", names), "0", ""]]
    if any(record["teachers"] for record in records):
        own = _of(records, OPD)
        rows.append(["teachers", *_means(own, "teachers", list(TASKS)), "1", ""])
    for method in methods:
        mine = _of(records, method)
        whole = [mean_and_std([r[key] for r in mine], ".2f") for key in (AVERAGE, BEST)]
        rows.append([method, *_means(mine, "final", names), *whole])
    return tables.markdown_table(["", *names, AVERAGE, BEST], rows)


def share_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Share of each teacher's gain, and the range of the average over seeds."""
    rows = []
    for method in methods:
        mine = _of(records, method)
        found = tables.spread([record[AVERAGE] for record in mine])
        ends = [tables.cell(found and getattr(found, end), ".2f") for end in ("low", "high")]
        rows.append([method, *_means(mine, "shares", list(TASKS), ".2f"), *ends])
    return tables.markdown_table(["", *TASKS, "average from", "to"], rows)


def seed_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Normalised average, a row for each seed."""
    rows = []
    for seed in dict.fromkeys(record["seed"] for record in records):
        found = {r["method"]: r[AVERAGE] for r in records if r["seed"] == seed}
        rows.append([str(seed), *(tables.cell(found[method], ".2f") for method in methods)])
    return tables.markdown_table(["seed", *methods], rows)


def stage_table(outcomes: Outcomes, methods: Sequence[str]) -> str:
    """What every stage cost and its model's scores on all tasks."""
    names, rows = list(TASKS.values()), []
    for method in methods:
        mine = [outcome for outcome in outcomes if outcome.method == method]
        for stage in dict.fromkeys(name for outcome in mine for name in outcome.stages):
            runs = [each.stages[stage] for each in mine if stage in each.stages]
            ends = [run.points[-1] for run in runs if not run.failed]
            title = stage if stage == method else f"{method}: {stage}"
            steps, cpu = ([getattr(end, key) for end in ends] for key in ("step", "cpu"))
            scores = [mean_and_std([end.scores[name] for end in ends], ".3f") for name in names]
            rows.append([title, mean_and_std(steps, ".0f"), mean_and_std(cpu, ".0f"), *scores])
    return tables.markdown_table(["stage", "steps", "CPU-s", *names], rows)


def lost_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """What the final model lacks of the models that were trained on one task."""
    rows = [
        [method, *_means(_of(records, method), "lost", list(TASKS), "+.3f")] for method in methods
    ]
    return tables.markdown_table(["", *TASKS.values()], rows)


def cost_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """What all stages of each method cost together."""
    rows = []
    for method in methods:
        mine = _of(records, method)
        failed = sum(record["failed"] is not None for record in mine)
        cells = [mean_and_std([r[key] for r in mine], ".0f") for key in ("steps", *COSTS)]
        rows.append([method, f"{failed} of {len(mine)}", *cells])
    return tables.markdown_table(["method", "failed", "steps", *COSTS.values()], rows)


def _means(
    records: Sequence[Record], section: str, names: Sequence[str], form: str = ".3f"
) -> list[str]:
    return [mean_and_std([r[section].get(name) for r in records], form) for name in names]


def _of(records: Sequence[Record], method: str) -> list[Record]:
    return [record for record in records if record["method"] == method]


# Plot


def path_of(outcome: Outcome, teachers: Mapping[str, float | None]) -> list[Point]:
    """The scores of the model there is, against all CPU-seconds spent so far.

    While teachers are trained there is only the model before training.
    """
    points, spent = [], 0.0
    for stage, run in outcome.stages.items():
        shown = run.points[:1] if outcome.method == OPD and stage != "student" else run.points
        points += [replace(point, cpu=spent + point.cpu) for point in shown]
        spent += run.points[-1].cpu
    return [_with_average(point, outcome.start, teachers) for point in points]


def _with_average(
    point: Point, base: Mapping[str, float], teachers: Mapping[str, float | None]
) -> Point:
    found = average(shares(point.scores, base, teachers))
    return point if found is None else replace(point, scores={**point.scores, AVERAGE: found})


def plot(outcomes: Outcomes) -> Figure:
    """Scores on all tasks and their normalised average against all CPU-seconds of training."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    teachers = teacher_scores(outcomes)
    panels = figure.subplots(2, 2).ravel()
    for axes, name in zip(panels, [*TASKS.values(), AVERAGE], strict=True):
        _panel(axes, outcomes, name, teachers)
    for axes, task in zip(panels, TASKS, strict=False):
        known = [score for found in teachers.values() if (score := found[task]) is not None]
        if known:
            axes.axhline(sum(known) / len(known), color="grey", linestyle=":", label="teacher")
    panels[0].legend(loc="best")
    figure.suptitle("held-out prompts, mean over seeds, band from the lowest to the highest")
    return figure


def _panel(
    axes: Axes, outcomes: Outcomes, name: str, teachers: Mapping[int, Mapping[str, float | None]]
) -> None:
    """A line for each method; seeds that failed or lack the score are left out."""
    methods = dict.fromkeys(outcome.method for outcome in outcomes)
    for method, colour in zip(methods, SERIES_COLOURS, strict=False):
        mine = [each for each in outcomes if each.method == method and not each.failed]
        paths = [path_of(each, teachers.get(each.seed, {})) for each in mine]
        paths = [path for path in paths if all(name in point.scores for point in path)]
        if paths:
            bands.draw(axes, paths, name, colour, method)
    axes.set(xlabel="CPU-seconds of training, teachers included", title=name)
    axes.grid(alpha=0.3)


# Command line


def _refuse_mistakes(options: argparse.Namespace) -> None:
    for method in options.methods:
        if method not in RECIPES:
            raise UserError(f"--methods: unknown {method!r}; {nearest(method, list(RECIPES))}")
    for name in ("methods", "seeds"):
        given = getattr(options, name)
        twice = sorted({str(each) for each in given if given.count(each) > 1})
        if twice:
            raise UserError(f"--{name}: {twice[0]} is given twice")
    if options.budget <= 0:
        raise UserError(f"--budget: {options.budget:g} is not positive")


def _parser() -> argparse.ArgumentParser:
    parser = experiment_parser("distillation", seeds=(0, 1, 2), every=20)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(RECIPES), help=f"any of {' '.join(RECIPES)}")
    add("--budget", type=float, default=BUDGET, help="CPU-seconds of each method and seed")
    return parser


if __name__ == "__main__":
    tables.script(main)
