"""Does a recipe work for every seed, and what does it cost?

    python -m benchmarks.recipe_seeds configs/text/tiny-qwen/grpo-arithmetic.yaml [--seeds 0 1]

Held-out scores before training and after the last step, seed by seed.  What is finished is kept,
what was interrupted is continued; ``--fresh`` begins anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.runs import Job, Run, costs, ensure, mean_and_std, override, stop_when_terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then print and write."""
    stop_when_terminated()
    options = _parser().parse_args(arguments)
    runs = [ensure(run_job(seed, options), fresh=options.fresh) for seed in options.seeds]
    about = tables.machine() | {"threads": torch.get_num_threads()}
    markdown = report(runs, about, options)
    data = {"machine": about, "recipe": str(options.recipe), "runs": [r.record() for r in runs]}
    path = tables.write_results(options.out, name_of(options.recipe), markdown, data)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def name_of(recipe: Path) -> str:
    """Of the results of a recipe: its folder and its own name."""
    return f"{recipe.parent.name}-{recipe.stem}"


def run_job(seed: int, options: argparse.Namespace) -> Job:
    """The training command of a seed."""
    return Job(
        config=options.recipe,
        folder=options.runs / f"{name_of(options.recipe)}-seed{seed}",
        seed=seed,
        overrides=(override("tracking.trackers", []), *options.overrides),
    )


def report(runs: Sequence[Run], about: Mapping[str, Any], options: argparse.Namespace) -> str:
    """The whole result in markdown."""
    changes = f" With {' '.join(options.overrides)}." if options.overrides else ""
    return "\n\n".join(
        [
            f"# {options.recipe}: seeds {' '.join(map(str, options.seeds))}",
            f"Held-out scores before training and after the last step.{changes}",
            seed_table(runs),
            "CPU-s a step, training s: of the training steps (rollout, reward, update), start-up, "
            "evaluations and checkpoints left out; whole s: wall seconds of the command. ± is the "
            f"standard deviation over seeds (n - 1). {about['threads']} threads. "
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def seed_table(runs: Sequence[Run]) -> str:
    """A row for each seed, and their mean."""
    names = list(runs[0].points[0].scores)
    figures = [_figures(run, names) for run in runs]
    forms = {key: ".3f" for key in figures[0]} | {"training s": ".0f", "whole s": ".0f"}
    rows = [
        [str(run.job.seed), *(tables.cell(found[key], forms[key]) for key in found)]
        for run, found in zip(runs, figures, strict=True)
    ]
    means = [mean_and_std([found[key] for found in figures], form) for key, form in forms.items()]
    return tables.markdown_table(["seed", *forms], [*rows, ["mean ± std", *means]])


def _figures(run: Run, names: Sequence[str]) -> dict[str, float | None]:
    first, last, spent = run.points[0].scores, run.points[-1].scores, costs(run)
    scores: dict[str, float | None] = {}
    for name in names:
        scores |= {
            f"{name} before": first[name],
            f"{name} after": last.get(name),
            f"{name} gain": last[name] - first[name] if name in last else None,
        }
    return scores | {
        "CPU-s a step": spent["cpu_per_step"],
        "training s": spent["train_wall"],
        "whole s": sum(piece.wall for piece in run.pieces),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_seeds")
    add = parser.add_argument
    add("recipe", type=Path, help="a YAML file")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--runs", type=Path, default=Path("runs/recipe-seeds"), help="where the run folders go")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    add("--fresh", action="store_true", help="train again what is finished")
    add("overrides", nargs="*", help="a.b=value, for every run")
    return parser


if __name__ == "__main__":
    tables.script(main)
