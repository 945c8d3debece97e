"""Most prompts teach nothing: which way of choosing them learns most from a generated token?

    python -m benchmarks.prompt_sampling [--seeds 0 1 2] [--steps 60] [a.b=value ...]

A policy that was trained on arithmetic meets a mix of questions: some it always answers right, some
never, and a smaller part now and then.  Which is which is measured, by samples of that policy.  All
methods then train on the mix; every completion that is generated counts, those of refresh passes
and of groups that are dropped included.  Held-out questions are of the tasks in the open part.
What is finished is kept, what was interrupted is continued.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from assets.text_tasks import ARITHMETIC, Item, add
from benchmarks import bands, tables
from benchmarks.runs import (
    NUM_STEPS,
    Job,
    Run,
    ensure,
    experiment_parser,
    mean_and_std,
    override,
    score_at,
    stop_when_terminated,
)
from mmrl.charts import SERIES_COLOURS
from mmrl.errors import UserError
from mmrl.runner import sample
from rewards import exact_match

RECIPE = Path("configs/text/tiny-qwen/grpo-arithmetic.yaml")
PROMPTS = tables.ROOT / "assets" / "prompts"
METRIC = "accuracy"
METHODS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "vas": (override("prompts.sampler", {"name": "vas", "momentum": 0.5}),),
    "vas, variance": (
        override("prompts.sampler", {"name": "vas", "alpha": 1.0, "beta": 0.0, "momentum": 0.5}),
    ),
    "vas, refreshed": (
        override("prompts.sampler", {"name": "vas", "refresh_every": 20, "refresh_samples": 8}),
    ),
    "dynamic": (override("training.refills", 2),),
}
SHARES = {"solved": 0.3, "hopeless": 0.3, "open": 0.4}
DIGITS = 6
"""Of the summands in questions that nobody can answer here: the model has seen up to three."""

Runs = Mapping[tuple[str, int], Run]
Question = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then print and write."""
    stop_when_terminated()
    options = _parser().parse_args(arguments)
    for name in options.methods:
        if name not in METHODS:
            raise UserError(f"--methods: unknown {name!r}; allowed: {', '.join(METHODS)}")
    start = starting_policy(options)
    mix = mixed_prompts(start, options)
    runs = {
        (name, seed): ensure(run_job(name, seed, start, options), fresh=options.fresh)
        for seed in options.seeds
        for name in options.methods
    }
    about = tables.machine() | {"threads": torch.get_num_threads()}
    markdown = report(runs, mix, about, options)
    data = {
        "machine": about,
        "overrides": options.overrides,
        "mix": mix,
        "runs": [{"method": name, **run.record()} for (name, _), run in runs.items()],
    }
    path = tables.write_results(options.out, "prompt-sampling", markdown, data)
    plot(runs).savefig(path.with_suffix(".png"), dpi=150)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


# The policy and the prompts


def starting_policy(options: argparse.Namespace) -> Path:
    """Run folder of the recipe, seed 0."""
    changes = (
        override("tracking.trackers", []),
        override(NUM_STEPS, options.start_steps),
        *options.overrides,
    )
    job = Job(config=RECIPE, folder=options.runs / "start", seed=0, overrides=changes)
    ensure(job)
    return job.folder.resolve()


def mixed_prompts(start: Path, options: argparse.Namespace) -> dict[str, int]:
    """Write the prompts to train on; how many there are of each kind.

    A candidate is solved or hopeless if all or none of its samples are right, else open.
    """
    path = mix_path(options)
    if not path.is_file():
        found = rated(start, candidates(options.size), options.samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {**row, "kind": kind}
            for kind, share in SHARES.items()
            for row in found[kind][: round(share * options.size)]
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    return {kind: kinds.count(kind) for kind in SHARES}


def candidates(size: int) -> list[Question]:
    """Questions of every task, and sums of numbers that are far too long."""
    rng = random.Random(0)
    rows = [json.loads(line) for line in (PROMPTS / "text-train.jsonl").read_text().splitlines()]
    rng.shuffle(rows)
    return rows[: 5 * size] + [_long_sum(rng).row for _ in range(size)]


def _long_sum(rng: random.Random) -> Item:
    a, b = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
    return replace(add(rng), task="long", prompt=f"{a} + {b} = ?", answer=str(a + b))


def rated(start: Path, rows: Sequence[Question], samples: int) -> dict[str, list[Question]]:
    """The rows by kind."""
    right = exact_match.build(exact_match.Config(where="tag"))
    prompts = [row["prompt"] for row in rows]
    found: dict[str, list[Question]] = {kind: [] for kind in SHARES}
    for row, texts in zip(rows, sample(start, prompts, count=samples, seed=1), strict=True):
        marks = right([row["prompt"]] * samples, texts, answer=[row["answer"]] * samples)
        mean = float(marks.mean())
        kind = "solved" if mean == 1 else "hopeless" if mean == 0 else "open"
        if kind != "open" or row["task"] not in ARITHMETIC:
            found[kind].append(row)
    return found


def mix_path(options: argparse.Namespace) -> Path:
    """Where the mix lies."""
    return (options.runs / "mix.jsonl").resolve()


def held_out(options: argparse.Namespace) -> Path:
    """Held-out questions of the tasks in the open part."""
    path = (options.runs / "held-out.jsonl").resolve()
    rows = [json.loads(line) for line in (PROMPTS / "text-eval.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["task"] not in ARITHMETIC]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return path


def run_job(name: str, seed: int, start: Path, options: argparse.Namespace) -> Job:
    """The training command of a method and a seed."""
    judged = [{"name": "exact_match", "label": METRIC, "where": "tag"}]
    return Job(
        config=RECIPE,
        folder=options.runs / f"{name.replace(', ', '-')}-seed{seed}",
        seed=seed,
        overrides=(
            override("backend.model.path", str(start / "final")),
            override("prompts.source", str(mix_path(options))),
            override("evaluation.source", str(held_out(options))),
            override("evaluation.rewards", judged),
            override("evaluation.every", options.every),
            override("checkpoint.every", options.every),
            override("checkpoint.keep_last", 1),
            override("tracking.trackers", []),
            override(NUM_STEPS, options.steps),
            *METHODS[name],
            *options.overrides,
        ),
    )


# What was learned from


def varied(run: Run) -> float:
    """Share of all groups that were rolled out for training whose rewards differ."""
    useful = asked = 0.0
    for row in run.rows:
        if "frac_reward_zero_std" in row:
            groups = row.get("sampling/groups", row["num_samples"] / _group_size(run))
            trained = row.get("sampling/groups_trained", groups)
            useful += trained * (1 - row["frac_reward_zero_std"])
            asked += groups
    return useful / asked


def _group_size(run: Run) -> int:
    return run.job.settings.training.group_size


# Report


def report(
    runs: Runs, mix: Mapping[str, int], about: Mapping[str, Any], options: argparse.Namespace
) -> str:
    """The whole result in markdown."""
    changes = f" All with {' '.join(options.overrides)}." if options.overrides else ""
    parts = ", ".join(f"{count} {kind}" for kind, count in mix.items())
    failed = [f"{name} seed {seed}" for (name, seed), run in runs.items() if run.failed]
    end = min(run.points[-1].tokens for run in runs.values() if not run.failed)
    return "\n\n".join(
        [
            f"# Choosing prompts: seeds {' '.join(map(str, options.seeds))}",
            f"{options.steps} steps each, {sum(mix.values())} prompts to train on: {parts}, by "
            f"{options.samples} samples of the starting policy.{changes} Runs that failed: "
            f"{', '.join(failed) or 'none'}.",
            method_table(runs, options.methods, end),
            "groups with a gradient: of all groups that were rolled out for training, those whose "
            "rewards differ; refresh passes are not among them. accuracy: held-out questions of "
            f"the open tasks; at equal tokens: after {end:.0f} generated tokens, which all reach.",
            f"± is the standard deviation over seeds (n - 1). {about['threads']} threads. "
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def method_table(runs: Runs, names: Sequence[str], end: float) -> str:
    """A row for each method."""
    rows = []
    for name in names:
        mine = [run for (n, _), run in runs.items() if n == name and not run.failed]
        paths = [run.points for run in mine]
        columns = (
            ([varied(run) for run in mine], ".3f"),
            ([path[-1].tokens / 1000 for path in paths], ".0f"),
            ([path[0].scores[METRIC] for path in paths], ".3f"),
            ([path[-1].scores[METRIC] for path in paths], ".3f"),
            ([score_at(path, METRIC, end, "tokens") for path in paths], ".3f"),
        )
        rows.append([name, *(mean_and_std(values, form) for values, form in columns)])
    head = ["method", "groups with a gradient", "thousand tokens", "before", "after",
            "at equal tokens"]  # fmt: skip
    return tables.markdown_table(head, rows)


def plot(runs: Runs) -> Figure:
    """Held-out accuracy against generated tokens."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(dict.fromkeys(n for n, _ in runs), SERIES_COLOURS, strict=False):
        paths = [run.points for (n, _), run in runs.items() if n == name and not run.failed]
        if paths:
            bands.draw(axes, paths, METRIC, colour, name, "tokens")
    axes.set(xlabel="generated tokens, all of them", ylabel="held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = experiment_parser("prompt_sampling", every=10)
    add_option = parser.add_argument
    add_option("--methods", nargs="+", default=list(METHODS), help=f"any of {list(METHODS)}")
    add_option("--steps", type=int, default=60, help="training steps of every run")
    add_option("--start-steps", type=int, default=60, help="steps of arithmetic before")
    add_option("--size", type=int, default=400, help="prompts in the mix")
    add_option("--samples", type=int, default=16, help="samples that tell solved from hopeless")
    return parser


if __name__ == "__main__":
    tables.script(main)
