"""How fast does each method learn to write? Reward against CPU-seconds of training.

    python -m benchmarks.methods --search
    python -m benchmarks.methods [--seeds 0 1 2 3 4] [--methods awm flow-grpo ...] [--tuned]

Trains the recipe of each method for each seed, one run after another, each in a process of its own.
What is finished is kept and what was interrupted is continued, so the same command may be given
again and again; ``--fresh`` begins anew.  ``--search`` tries a small grid for each method instead,
and ``--tuned`` uses its winners.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import bands, gold, search, tables
from benchmarks.runs import (
    START_TOLERANCE,
    Job,
    Point,
    Run,
    costs,
    crossing,
    ensure,
    experiment_parser,
    mean_and_std,
    override,
    starts_apart,
    stop_when_terminated,
)
from mmrl.charts import SERIES_COLOURS
from mmrl.config import load
from mmrl.errors import UserError
from mmrl.schema import nearest

RECIPES = {
    "awm": "configs/quickstart.yaml",
    "flow-grpo": "configs/diffusion/tiny-sd3/flow-grpo.yaml",
    "flow-grpo-fast": "configs/diffusion/tiny-sd3/flow-grpo-fast.yaml",
    "nft": "configs/diffusion/tiny-sd3/nft.yaml",
    "grpo-guard": "configs/diffusion/tiny-sd3/grpo-guard.yaml",
    "dance-grpo": "configs/diffusion/tiny-sd3/dance-grpo.yaml",
}
YARDSTICK, REFERENCE = "flow-grpo", "awm"
SCORES = ("ocr_exact", "ocr_soft")
ALSO = ("template", "diversity")
SEARCH_BUDGET = 240.0
SEARCH_PROMPTS = (
    override("evaluation.source", "assets/prompts/ocr-train.jsonl"),
    override("evaluation.samples_per_prompt", 1),
)
"""The search must not see the prompts of the report, so it is scored on those of training."""

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then print and write."""
    stop_when_terminated()
    options = _parser().parse_args(arguments)
    _refuse_mistakes(options)
    markdown, path = _search(options) if options.search else _compare(options)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def _compare(options: argparse.Namespace) -> tuple[str, Path]:
    found = _search_record(options.runs)
    runs = {
        (method, seed): ensure(run_job(method, seed, options, found), fresh=options.fresh)
        for seed in options.seeds
        for method in options.methods
    }
    records = figures(runs)
    about = tables.machine() | {"threads": torch.get_num_threads()}
    markdown = report(records, about, options, found, odd_starts(runs))
    data = {
        "machine": about,
        "overrides": options.overrides,
        "tuned": options.tuned,
        "search": found,
        "figures": records,
        "runs": [{"method": method, **run.record()} for (method, _), run in runs.items()],
    }
    path = tables.write_results(options.out, "methods", markdown, data)
    plot(runs).savefig(path.with_suffix(".png"), dpi=150)
    return markdown, path


def _search(options: argparse.Namespace) -> tuple[str, Path]:
    budget = options.budget or SEARCH_BUDGET
    results = []
    for trial in (trial for method in options.methods for trial in search.trials(method)):
        job = Job(
            config=Path(RECIPES[trial.method]),
            folder=search.folder(options.runs, trial),
            seed=options.search_seed,
            overrides=(*_shared(options), *SEARCH_PROMPTS, *trial.overrides),
            budget=budget,
        )
        results.append(search.result(trial, ensure(job, fresh=options.fresh), SCORES[0], budget))
        print(json.dumps({key: results[-1][key] for key in ("method", "tried", "score")}))
    record = {
        "machine": tables.machine(),
        "metric": SCORES[0],
        "seed": options.search_seed,
        "budget": budget,
        "overrides": options.overrides,
        "effort": f"Each method: learning rates {', '.join(map(str, search.RATES))} times two "
        f"values of one knob of its own, {budget:g} CPU-seconds of training for each setting, "
        "scored on a straight line between the evaluations around that time",
        "winners": search.winners(results),
        "trials": results,
    }
    (options.runs / search.RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    markdown = search.report(record)
    return markdown, tables.write_results(options.out, "methods-search", markdown, record)


def run_job(
    method: str, seed: int, options: argparse.Namespace, found: Mapping[str, Any] | None
) -> Job:
    """The training command of a method and a seed."""
    tuned = found["winners"].get(method, []) if found and options.tuned else []
    return Job(
        config=Path(RECIPES[method]),
        folder=options.runs / f"{method}-seed{seed}",
        seed=seed,
        overrides=(*_shared(options), *tuned),
        budget=options.budget,
    )


def _shared(options: argparse.Namespace) -> tuple[str, ...]:
    return (
        override("evaluation.rewards", gold.evaluation_rewards(ALSO, "ocr")),
        override("evaluation.every", options.every),
        override("checkpoint.every", options.every),
        override("checkpoint.keep_last", 1),
        override("tracking.trackers", []),
        *options.overrides,
    )


# Figures


def figures(runs: Mapping[tuple[str, int], Run]) -> list[Record]:
    """One record for each run; targets and ratios belong to runs of the same seed."""
    records = []
    for (method, seed), run in runs.items():
        yardstick, reference = runs.get((YARDSTICK, seed)), runs.get((REFERENCE, seed))
        record: Record = {"method": method, "seed": seed, **costs(run)}
        for name in SCORES:
            target = final(yardstick, name) if yardstick else None
            record |= progress(run, name)
            record |= speed(run.points, reference.points if reference else (), name, target)
        record |= {f"{name}_final": final(run, name) for name in ALSO}
        records.append(record)
    return records


def odd_starts(runs: Mapping[tuple[str, int], Run]) -> list[str]:
    """Runs whose scores before training are not those of the first run."""
    named = {f"{method} seed {seed}": run for (method, seed), run in runs.items()}
    return starts_apart(named, dict.fromkeys(SCORES, START_TOLERANCE))


def final(run: Run, name: str) -> float | None:
    """The score at the end; a run that failed has none."""
    return None if run.failed else run.points[-1].scores.get(name)


def progress(run: Run, name: str) -> Record:
    """Scores before, at the end, and the best."""
    scores = [point.scores[name] for point in run.points]
    return {
        f"{name}_before": scores[0],
        f"{name}_final": final(run, name),
        f"{name}_best": max(scores),
    }


def speed(
    points: Sequence[Point], reference: Sequence[Point], name: str, target: float | None
) -> Record:
    """Seconds to a target, and how many times those of the reference that is.

    ``None`` without a target, where it is never reached, and for a ratio to no time at all.
    """
    mine, theirs = (
        None if target is None else crossing(each, name, target) for each in (points, reference)
    )
    return {
        f"{name}_target": target,
        f"{name}_cpu": mine and mine.cpu,
        f"{name}_wall": mine and mine.wall,
        f"{name}_ratio": mine.cpu / theirs.cpu if mine and theirs and theirs.cpu else None,
    }


# Report


def report(
    records: Sequence[Record],
    about: Mapping[str, Any],
    options: argparse.Namespace,
    found: Mapping[str, Any] | None,
    odd: Sequence[str] = (),
) -> str:
    """The whole result in markdown; ``odd``: runs that are evaluated in another way."""
    seeds = " ".join(map(str, options.seeds))
    ended = (
        f"after {options.budget:g} CPU-seconds of training, at the next evaluation"
        if options.budget
        else "after the number of steps of its recipe"
    )
    changes = f" All with {' '.join(options.overrides)}." if options.overrides else ""
    return "\n\n".join(
        [
            f"# Methods on the OCR task: seeds {seeds}",
            f"Each run ends {ended}; evaluated every {options.every} steps on held-out prompts "
            f"with averaged weights.{changes} CPU-seconds and wall seconds are those of the "
            "training steps (rollout, reward, update); start-up, evaluations and checkpoints are "
            "not in them.",
            *([f"**Evaluated in another way, not comparable: {', '.join(odd)}.**"] if odd else []),
            *(_score_section(records, name, options.methods) for name in SCORES),
            "## Cost and pictures",
            cost_table(records, options.methods),
            "other CPU-s: start-up, evaluations, checkpoints and export of the whole command. "
            "template: share of the final held-out pictures that an independent judge reads. "
            "diversity: mean root-mean-square distance of two pictures of a prompt, at the end.",
            _search_section(found, options),
            f"± is the standard deviation over seeds (n - 1). {about['threads']} threads. "
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def _score_section(records: Sequence[Record], name: str, methods: Sequence[str]) -> str:
    return "\n\n".join(
        [
            f"## {name}",
            score_table(records, name, methods),
            f"Target of a seed: what {YARDSTICK} has at its end with this seed. Its first crossing "
            "lies on a straight line between two evaluations. Means are over the seeds that "
            f"reached it. x {REFERENCE}: CPU-seconds over those of {REFERENCE} with the same seed.",
            seed_table(records, name, methods),
            "CPU-seconds to the target; > means not reached in so many.",
        ]
    )


def score_table(records: Sequence[Record], name: str, methods: Sequence[str]) -> str:
    """Scores and times of one score, a row for each method."""
    head = ["method", "before", "final", "best", "reached", "CPU-s to target", "wall s to target",
            f"x {REFERENCE}", "from", "to"]  # fmt: skip
    return tables.markdown_table(head, [_score_row(_of(records, m), name, m) for m in methods])


def _score_row(records: Sequence[Record], name: str, method: str) -> list[str]:
    def stated(key: str, form: str) -> str:
        return mean_and_std([record[f"{name}_{key}"] for record in records], form)

    ratios = tables.spread([record[f"{name}_ratio"] for record in records])
    asked = sum(record[f"{name}_target"] is not None for record in records)
    reached = sum(record[f"{name}_cpu"] is not None for record in records)
    missed = asked and not reached
    return [
        method,
        *(stated(key, ".3f") for key in ("before", "final", "best")),
        f"{reached} of {asked}",
        "not reached" if missed else stated("cpu", ".0f"),
        "not reached" if missed else stated("wall", ".0f"),
        stated("ratio", ".2f"),
        tables.cell(ratios and ratios.low, ".2f"),
        tables.cell(ratios and ratios.high, ".2f"),
    ]


def seed_table(records: Sequence[Record], name: str, methods: Sequence[str]) -> str:
    """Target and CPU-seconds to it, a row for each seed."""
    rows = []
    for seed in dict.fromkeys(record["seed"] for record in records):
        mine = {record["method"]: record for record in records if record["seed"] == seed}
        target = next(iter(mine.values()))[f"{name}_target"]
        cells = [_time_cell(mine[method], name) for method in methods]
        rows.append([str(seed), tables.cell(target, ".3f"), *cells])
    return tables.markdown_table(["seed", "target", *methods], rows)


def _time_cell(record: Record, name: str) -> str:
    if record[f"{name}_target"] is None:
        return tables.ABSENT
    seconds = record[f"{name}_cpu"]
    return f"> {record['train_cpu']:.0f}" if seconds is None else f"{seconds:.0f}"


def cost_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """What the runs of each method cost, and how their pictures ended up."""
    columns = {
        "steps": ("steps", ".0f"),
        "CPU-s a step": ("cpu_per_step", ".2f"),
        "training CPU-s": ("train_cpu", ".0f"),
        "training wall s": ("train_wall", ".0f"),
        "other CPU-s": ("other_cpu", ".0f"),
        **{name: (f"{name}_final", ".3f") for name in ALSO},
    }
    rows = []
    for method in methods:
        mine = _of(records, method)
        failed = sum(record["failed"] for record in mine)
        cells = [mean_and_std([r[key] for r in mine], form) for key, form in columns.values()]
        rows.append([method, f"{failed} of {len(mine)}", *cells])
    return tables.markdown_table(["method", "failed", *columns], rows)


def _of(records: Sequence[Record], method: str) -> list[Record]:
    return [record for record in records if record["method"] == method]


def _search_section(found: Mapping[str, Any] | None, options: argparse.Namespace) -> str:
    if found is None:
        return "No search was made; the recipes are as they are shipped."
    rows = []
    for method, winner in found["winners"].items():
        if method in options.methods:
            same = options.tuned or uses(method, winner)
            rows.append([method, " ".join(winner), "yes" if same else "no"])
    used = tables.markdown_table(["method", "winner", "used in the runs above"], rows)
    return f"{search.report(found)}\n\n{used}"


def uses(method: str, overrides: Sequence[str]) -> bool:
    """Whether the recipe of a method already has these values."""
    path = tables.ROOT / RECIPES[method]
    return load(path).dump() == load(path, overrides).dump()


def plot(runs: Mapping[tuple[str, int], Run]) -> Figure:
    """Scores against CPU-seconds: mean over seeds, and a band from the lowest to the highest."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    methods = list(dict.fromkeys(method for method, _ in runs))
    for axes, name in zip(figure.subplots(1, len(SCORES)), SCORES, strict=True):
        for method, colour in zip(methods, SERIES_COLOURS, strict=False):
            paths = [run.points for (m, _), run in runs.items() if m == method]
            bands.draw(axes, paths, name, colour, method)
        axes.set(xlabel="CPU-seconds of training", title=f"held-out {name}")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(loc="upper left")
    return figure


# Command line


def _refuse_mistakes(options: argparse.Namespace) -> None:
    for method in options.methods:
        if method not in RECIPES:
            raise UserError(f"--methods: unknown {method!r}; {nearest(method, list(RECIPES))}")
    if options.search_seed in options.seeds:
        raise UserError(
            f"--search-seed: {options.search_seed} is among --seeds, but the search must use a "
            "seed that the report does not"
        )
    if options.budget is not None and options.budget <= 0:
        raise UserError(f"--budget: {options.budget:g} is not positive")
    if options.tuned and _search_record(options.runs) is None:
        raise UserError(f"--tuned: no {search.RECORD} in {options.runs}; run --search first")


def _search_record(runs: Path) -> Record | None:
    path = runs / search.RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = experiment_parser("methods", every=5)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(RECIPES), help=f"any of {' '.join(RECIPES)}")
    add("--budget", type=float, help="CPU-seconds of training of each run; default: as the recipe")
    add("--tuned", action="store_true", help="with the winners of the search")
    add("--search", action="store_true", help="search instead of comparing")
    add("--search-seed", type=int, default=100, help="the seed that --search trains")
    return parser


if __name__ == "__main__":
    tables.script(main)
