"""Does GRPO-Guard delay reward hacking? Its ratios, and pictures at equal reward, beside Flow-GRPO.

    python -m benchmarks.guard [--reward preference] [--seeds 0 1 2] [--steps 240] [a.b=value ...]

Both methods train on the same prompts with the same seeds: the recipe of GRPO-Guard, and that of
Flow-GRPO written as GRPO-Guard without its three corrections, so that both log the same ratios.
Proxy is the reward that is trained, on held-out prompts; gold is what judges say that no training
sees, of the same pictures.  ``preference`` is a learned reward that reads no prompt, so a policy
that pleases it alone forgets what it was asked for.  What is finished is kept, what was interrupted
is continued.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import gold, tables
from benchmarks.runs import (
    NUM_STEPS,
    Job,
    Point,
    Run,
    between,
    ensure,
    experiment_parser,
    first_crossing,
    mean_and_std,
    override,
    stop_when_terminated,
)
from mmrl.charts import SERIES_COLOURS
from mmrl.errors import UserError
from mmrl.run_folder import Row

FLOW, GUARD = "flow-grpo", "grpo-guard"
RECIPES = {
    FLOW: "configs/diffusion/tiny-sd3/flow-grpo.yaml",
    GUARD: "configs/diffusion/tiny-sd3/grpo-guard.yaml",
}
WITHOUT_CORRECTIONS = (
    "objective.name=grpo_guard",
    "objective.drift_correction=false",
    "objective.std_normalisation=false",
    "objective.reweight=false",
)
PREFERENCE = (
    override("prompts.source", "assets/prompts/preference-train.jsonl"),
    override("rewards", [{"name": "preference"}]),
    override("evaluation.source", "assets/prompts/preference-eval.jsonl"),
)
TASKS = {"ocr": (), "preference": PREFERENCE}
"""Reward -> what it changes in the recipes, which train the first."""
PROXIES = {"ocr": "ocr_soft", "preference": "preference"}
"""Reward -> its score on held-out prompts."""
LEVELS = (0.5, 0.75, 1.0)
VIEWS = (
    (FLOW, FLOW, "_raw"),
    (f"{GUARD}, before", GUARD, "_raw"),
    (f"{GUARD}, after", GUARD, ""),
)
"""Log-ratios that are compared: title, method, and which of its two kinds."""

Runs = Mapping[tuple[str, int], Run]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """First moment, and second about it, of the log-ratios of one denoising step."""

    mean: float
    variance: float

    @property
    def std(self) -> float:
        """The root of the variance."""
        return math.sqrt(self.variance)

    @property
    def bias(self) -> float:
        """The mean in standard deviations; 0 if there is no spread."""
        return self.mean / self.std if self.variance else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then print and write."""
    stop_when_terminated()
    options = _parser().parse_args(arguments)
    runs = {
        (method, seed): ensure(run_job(method, seed, options), fresh=options.fresh)
        for seed in options.seeds
        for method in RECIPES
    }
    about = tables.machine() | {"threads": torch.get_num_threads()}
    proxy, names = PROXIES[options.reward], gold.available(options.reward)
    markdown = report(runs, about, options)
    data = {
        "machine": about,
        "reward": options.reward,
        "overrides": options.overrides,
        "ratios": ratio_records(runs),
        "equal_proxy": equal_proxy(runs, names, proxy),
        "runs": [{"method": method, **run.record()} for (method, _), run in runs.items()],
    }
    path = tables.write_results(options.out, f"guard-{options.reward}", markdown, data)
    plot_ratios(runs).savefig(path.with_name(f"{path.stem}-ratios.png"), dpi=150)
    plot_gold(runs, names, proxy).savefig(path.with_name(f"{path.stem}-gold.png"), dpi=150)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def run_job(method: str, seed: int, options: argparse.Namespace) -> Job:
    """The training command of a method and a seed."""
    names = gold.available(options.reward)
    return Job(
        config=Path(RECIPES[method]),
        folder=options.runs / options.reward / f"{method}-seed{seed}",
        seed=seed,
        overrides=(
            *(WITHOUT_CORRECTIONS if method == FLOW else ()),
            override("objective.log_by_sigma", True),
            *TASKS[options.reward],
            override("evaluation.rewards", gold.evaluation_rewards(names, options.reward)),
            override("evaluation.every", options.every),
            override("checkpoint.every", options.every),
            override("checkpoint.keep_last", 1),
            override("tracking.trackers", []),
            override(NUM_STEPS, options.steps),
            *options.overrides,
        ),
    )


# Ratios


def moments(row: Row, sigma: str, kind: str, updates: int) -> Moments | None:
    """Moments of the log-ratios of one step in a row of metrics; ``None`` if it has none.

    Args:
        row: metrics of a training step, with ``objective.log_by_sigma``.
        sigma: the denoising step, as it stands in the names.
        kind: ``_raw``, or nothing for the corrected ones.
        updates: optimizer steps of that training step.  The first of them compares the policy with
            itself, so its log-ratios are 0; they are taken out of both moments.
    """
    first, second = (row.get(f"log_ratio/{name}{kind}/{sigma}") for name in ("mean", "sq"))
    if first is None or second is None:
        return None
    others = updates / (updates - 1)
    mean = others * first
    # Rounding alone can take a tiny variance below 0.
    return Moments(mean=mean, variance=max(0.0, others * second - mean**2))


def sigmas(rows: Sequence[Row]) -> list[str]:
    """The denoising steps that metrics name, from noise to data."""
    keys = (re.fullmatch(r"log_ratio/mean/([\d.]+)", key) for row in rows for key in row)
    return sorted({match[1] for match in keys if match}, key=float, reverse=True)


def pooled(parts: Sequence[Moments]) -> Moments:
    """Moments of equally many values of each part together."""
    count = len(parts)
    mean = sum(part.mean for part in parts) / count
    second = sum(part.variance + part.mean**2 for part in parts) / count
    return Moments(mean=mean, variance=max(0.0, second - mean**2))


def run_moments(run: Run, kind: str) -> dict[str, Moments]:
    """Moments of each denoising step over a whole run."""
    updates = updates_per_step(run)
    found = {}
    for sigma in sigmas(run.rows):
        parts = [part for row in run.rows if (part := moments(row, sigma, kind, updates))]
        found[sigma] = pooled(parts)
    return found


def updates_per_step(run: Run) -> int:
    """Optimizer steps of a training step; ``UserError`` for one, which has no ratios to look at."""
    training = run.job.settings.training
    count = training.num_epochs * training.updates_per_epoch
    if count < 2:
        raise UserError(
            "training.updates_per_epoch: with one update for each rollout every ratio is 1; "
            "allowed: 2 or more"
        )
    return count


def ratio_records(runs: Runs) -> list[Record]:
    """Moments of every view and denoising step, pooled over seeds."""
    records = []
    for title, method, kind in VIEWS:
        of_seeds = [run_moments(run, kind) for (m, _), run in runs.items() if m == method]
        for sigma in of_seeds[0]:
            both = pooled([each[sigma] for each in of_seeds])
            records.append(
                {
                    "view": title,
                    "sigma": float(sigma),
                    "mean": both.mean,
                    "variance": both.variance,
                    "bias": both.bias,
                    "std": both.std,
                }
            )
    return records


def unevenness(records: Sequence[Record]) -> float:
    """The largest standard deviation over the smallest, of one view; infinite if that is 0."""
    stds = [record["std"] for record in records]
    return max(stds) / min(stds) if min(stds) else math.inf


# Gold at equal proxy


def levels(runs: Sequence[Run], proxy: str) -> dict[float, float]:
    """Proxy scores at which all runs can be compared, by their share of the common gain.

    The gain goes from the highest start to the lowest of the best scores; none without a gain.
    """
    paths = [[point.scores[proxy] for point in run.points] for run in runs]
    start, top = max(path[0] for path in paths), min(max(path) for path in paths)
    return {share: start + share * (top - start) for share in LEVELS} if top > start else {}


def gold_at(points: Sequence[Point], name: str, proxy: str, level: float) -> float | None:
    """A gold score when the proxy first reached a level, on straight lines between evaluations."""
    at = first_crossing([point.scores[proxy] for point in points], level)
    return None if at is None else between([point.scores[name] for point in points], at)


def equal_proxy(runs: Runs, names: Sequence[str], proxy: str) -> list[Record]:
    """Gold of both methods, seed by seed, when they first reached the same proxy."""
    seeds = dict.fromkeys(seed for _, seed in runs)
    records = []
    for seed in seeds:
        pair = {method: runs[method, seed] for method in RECIPES}
        for share, level in levels(list(pair.values()), proxy).items():
            for name in names:
                found = {m: gold_at(run.points, name, proxy, level) for m, run in pair.items()}
                records.append(
                    {"seed": seed, "share": share, "proxy": level, "measure": name, **found}
                )
    return records


# Report


def report(runs: Runs, about: Mapping[str, Any], options: argparse.Namespace) -> str:
    """The whole result in markdown."""
    proxy, names = PROXIES[options.reward], gold.available(options.reward)
    strict = ["ocr_exact"] if options.reward == "ocr" else []
    changes = f" Both with {' '.join(options.overrides)}." if options.overrides else ""
    failed = [f"{method} seed {seed}" for (method, seed), run in runs.items() if run.failed]
    return "\n\n".join(
        [
            f"# GRPO-Guard and Flow-GRPO: seeds {' '.join(map(str, options.seeds))}",
            f"{options.steps} steps each, evaluated every {options.every}.{changes} "
            f"Runs that failed: {', '.join(failed) or 'none'}.",
            "## Log-ratios of each denoising step",
            ratio_table(ratio_records(runs)),
            "Over all updates of all steps but the first update of each, whose ratio is 1. "
            "mean/std: how far the ratios lie to one side, in units of their own spread. "
            "unevenness: the largest std of a denoising step over the smallest. "
            f"Share of clipped ratios, low and high: {_clipped(runs)}.",
            f"## Gold when the proxy ({proxy}) is equal",
            equal_proxy_table(equal_proxy(runs, names, proxy)),
            "Seed by seed, when both methods first reached the same proxy; levels are shares of "
            f"the gain that both made (seeds without one are left out). difference: {GUARD} minus "
            f"{FLOW}.",
            "## Start and end",
            end_table(runs, [proxy, *strict, *names]),
            "template, ddddocr: share that this judge reads exactly; faithful: share that shows "
            "what the prompt asks for; utility: what the learned reward was taught to estimate, "
            "measured on pixels; saturation, contrast, grain (root mean square of the Laplacian) "
            "and diversity are statistics of pixels in [0, 1].",
            f"± is the standard deviation over seeds (n - 1). {about['threads']} threads. "
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def ratio_table(records: Sequence[Record]) -> str:
    """A row for each denoising step, then the unevenness of each view."""
    views = {title: [r for r in records if r["view"] == title] for title, _, _ in VIEWS}
    rows = []
    for each in zip(*views.values(), strict=True):
        cells = [
            format(record[key], form)
            for record in each
            for key, form in (("mean", ".1e"), ("variance", ".1e"), ("bias", "+.3f"))
        ]
        rows.append([f"{each[0]['sigma']:.3f}", *cells])
    ends = [["", f"{unevenness(view):.1f}", ""] for view in views.values()]
    rows.append(["**unevenness**", *(cell for end in ends for cell in end)])
    head = [f"{title}: {what}" for title in views for what in ("mean", "variance", "mean/std")]
    return tables.markdown_table(["sigma", *head], rows)


def equal_proxy_table(records: Sequence[Record]) -> str:
    """Means over seeds of both methods and of their difference, for each level and measure."""
    if not records:
        return "With no seed did both methods raise the proxy, so there is nothing to compare."
    rows = []
    for share, name in dict.fromkeys((r["share"], r["measure"]) for r in records):
        mine = [r for r in records if (r["share"], r["measure"]) == (share, name)]
        differences = [r[GUARD] - r[FLOW] for r in mine]
        higher = sum(difference > 0 for difference in differences)
        rows.append(
            [
                f"{share:.0%}",
                mean_and_std([r["proxy"] for r in mine], ".3f"),
                name,
                mean_and_std([r[FLOW] for r in mine], ".3f"),
                mean_and_std([r[GUARD] for r in mine], ".3f"),
                mean_and_std(differences, "+.3f"),
                f"{higher} of {len(mine)}",
            ]
        )
    head = ["level", "proxy", "measure", FLOW, GUARD, "difference", "seeds above 0"]
    return tables.markdown_table(head, rows)


def end_table(runs: Runs, names: Sequence[str]) -> str:
    """Scores before training and at the end, a row for each method."""
    rows = []
    for method in RECIPES:
        mine = [run for (m, _), run in runs.items() if m == method]
        for when, index in (("start", 0), ("end", -1)):
            cells = [mean_and_std([r.points[index].scores.get(n) for r in mine], ".3f")
                     for n in names]  # fmt: skip
            rows.append([f"{method}, {when}", *cells])
    return tables.markdown_table(["", *names], rows)


def _clipped(runs: Runs) -> str:
    shares = []
    for method in RECIPES:
        rows = [row for (m, _), run in runs.items() if m == method for row in run.rows]
        low, high = (
            mean_and_std([row.get(f"clip_ratio/{side}") for row in rows], ".3f").split(" ")[0]
            for side in ("low", "high")
        )
        shares.append(f"{method} {low} and {high}")
    return ", ".join(shares)


# Plots


def plot_ratios(runs: Runs) -> Figure:
    """Mean of the log-ratios in standard deviations, and their evenness over denoising steps."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    records = ratio_records(runs)
    for (title, _, _), colour in zip(VIEWS, SERIES_COLOURS, strict=False):
        mine = [record for record in records if record["view"] == title]
        at = [record["sigma"] for record in mine]
        average = sum(record["std"] for record in mine) / len(mine) or 1.0
        left.plot(at, [r["bias"] for r in mine], "o-", color=colour, label=title)
        right.plot(at, [r["std"] / average for r in mine], "o-", color=colour, label=title)
    left.set(title="mean of log r over its std", xlabel="sigma of the denoising step")
    right.set(title="std of log r, 1 = average of the steps", xlabel="sigma of the denoising step")
    right.set_yscale("log")
    for axes in (left, right):
        axes.invert_xaxis()  # from noise to data, as an image is drawn
        axes.grid(alpha=0.3)
    left.legend()
    return figure


def plot_gold(runs: Runs, names: Sequence[str], proxy: str) -> Figure:
    """Each measure against the proxy; a line is a run, its time goes from small to large dots."""
    columns = 3
    figure = Figure(figsize=(12, 3.6 * math.ceil(len(names) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for method, colour in zip(RECIPES, SERIES_COLOURS, strict=False):
            mine = [run for (m, _), run in runs.items() if m == method]
            for run in mine:
                _path(axes, run.points, (proxy, name), colour, method if run is mine[0] else None)
        axes.set(xlabel=f"proxy: {proxy}", title=name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    panels[0].legend()
    figure.suptitle("held-out pictures along training: time goes from small to large dots")
    return figure


def _path(
    axes: Axes, points: Sequence[Point], names: tuple[str, str], colour: str, label: str | None
) -> None:
    proxy, measure = ([point.scores[name] for point in points] for name in names)
    sizes = [4 + 36 * i / max(1, len(points) - 1) for i in range(len(points))]
    axes.plot(proxy, measure, color=colour, alpha=0.5, linewidth=1, label=label)
    axes.scatter(proxy, measure, s=sizes, color=colour, alpha=0.6, linewidths=0)


# Command line


def _parser() -> argparse.ArgumentParser:
    parser = experiment_parser("guard", seeds=(0, 1, 2), every=10)
    add = parser.add_argument
    add("--reward", choices=list(TASKS), default="ocr", help="what is trained")
    add("--steps", type=int, default=240, help="training steps of each run")
    return parser


if __name__ == "__main__":
    tables.script(main)
