"""Six tasks with rewards of unlike shapes: what does the advantage estimator make of the mix?

    python -m benchmarks.advantages [--seeds 0 1 2] [--steps 60] [--tails heavy] [a.b=value ...]

The tiny vision-language model answers questions whose rewards are right or wrong (four tasks), an
overlap of boxes, and agreeing letters; all get a second reward for the form of the answer.  The
recipe, prompts and seeds are the same for every estimator.  Reported are the gain of each task, and
at the start of training the share of each task in the gradient: the norm of the gradient of its own
samples over the sum of these norms.  ``--tails heavy`` trains reading with a reward that has
outliers, ``price_of_letters``.  What is finished is kept, what was interrupted is continued.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rapidfuzz.distance import Levenshtein

from benchmarks import bands, tables
from benchmarks.runs import (
    NUM_STEPS,
    Job,
    Run,
    ensure,
    experiment_parser,
    mean_and_std,
    override,
    stop_when_terminated,
)
from mmrl.charts import SERIES_COLOURS
from mmrl.config import RunConfig, load
from mmrl.errors import UserError
from mmrl.metrics import Means
from mmrl.rollouts import assemble, collect_scores, make_requests, roll_out
from mmrl.runner import Session, make_trainer, open_session
from mmrl.types import Advantages, RolloutGroup, Scores, UpdateBatch
from rewards._answers import extract

RECIPE = Path("configs/vlm/tiny-qwen-vl/g2rpo-vas.yaml")
WEIGHTS = {"exact_match": 1.0, "box_iou": 1.0, "edit_distance": 1.0, "format_tags": 0.1}
"""Of the rewards, also where each is normalised by itself."""
ESTIMATORS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "group", "deviation": "group"},
    "gdpo": {"name": "per_reward", "deviation": "group", "weights": WEIGHTS},
    "g2rpo": {"name": "g2rpo"},
    "g2rpo, each reward": {"name": "g2rpo", "per_reward": True, "weights": WEIGHTS},
}
EXACT = ("count", "colour", "compare", "position")
REWARDS = (
    {"name": "exact_match", "where": "tag", "tasks": list(EXACT)},
    {"name": "box_iou", "where": "tag", "tasks": ["box"]},
    {"name": "edit_distance", "where": "tag", "tasks": ["read"]},
    {"name": "format_tags", "weight": WEIGHTS["format_tags"]},
)
OUTLIERS = {
    "name": "benchmarks.advantages.price_of_letters",
    "label": "edit_distance",
    "tasks": ["read"],
}
TASKS: dict[str, dict[str, Any]] = {
    **{task: {"name": "exact_match", "where": "tag"} for task in EXACT},
    "box": {"name": "box_iou", "where": "tag"},
    "read": {"name": "edit_distance", "where": "tag"},
}
"""Task -> the reward that judges it on held-out prompts."""
MEAN = "mean of tasks"
ROWS = 64
"""Samples in one forward and backward of the gradient shares."""

Runs = Mapping[tuple[str, int], Run]
Record = dict[str, Any]


def price_of_letters(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float]:
    """1 - e^d for an answer d edits away from the right text: each costs e times the one before.

    Right is 0 and three letters off -19, so few samples hold most of the spread of a group.
    """
    said = (extract(completion, "tag") or "" for completion in completions)
    return [
        1 - math.exp(Levenshtein.distance(text, right))
        for text, right in zip(said, answer, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, measure, then print and write."""
    stop_when_terminated()
    options = _parser().parse_args(arguments)
    for name in options.estimators:
        if name not in ESTIMATORS:
            raise UserError(f"--estimators: unknown {name!r}; allowed: {', '.join(ESTIMATORS)}")
    runs = {
        (name, seed): ensure(run_job(name, seed, options), fresh=options.fresh)
        for seed in options.seeds
        for name in options.estimators
    }
    starts = {seed: gradient_shares(seed, options) for seed in options.seeds}
    shares = [{"seed": seed, **each} for seed, (found, _) in starts.items() for each in found]
    tails = [{"seed": seed, **found} for seed, (_, found) in starts.items()]
    about = tables.machine() | {"threads": torch.get_num_threads()}
    markdown = report(runs, shares, tails, about, options)
    data = {
        "machine": about,
        "overrides": options.overrides,
        "tails": options.tails,
        "gradient_shares": shares,
        "excess_kurtosis": tails,
        "runs": [{"estimator": name, **run.record()} for (name, _), run in runs.items()],
    }
    name = "advantages-heavy-tails" if options.tails == "heavy" else "advantages"
    path = tables.write_results(options.out, name, markdown, data)
    plot(runs).savefig(path.with_suffix(".png"), dpi=150)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def run_job(name: str, seed: int, options: argparse.Namespace) -> Job:
    """The training command of an estimator and a seed."""
    return Job(
        config=RECIPE,
        folder=options.runs / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}",
        seed=seed,
        overrides=(
            *_shared(options),
            override("advantage", ESTIMATORS[name]),
            override("evaluation.every", options.every),
            override("checkpoint.every", options.every),
            override("checkpoint.keep_last", 1),
            override("tracking.trackers", []),
            override(NUM_STEPS, options.steps),
            *options.overrides,
        ),
    )


def _shared(options: argparse.Namespace) -> list[str]:
    """Prompts and rewards of every run."""
    judged = [{**reward, "label": task, "tasks": [task]} for task, reward in TASKS.items()]
    heavy = options.tails == "heavy"
    rewards = [OUTLIERS if heavy and r["name"] == "edit_distance" else r for r in REWARDS]
    return [
        override("prompts.sampler", {"name": "uniform"}),
        override("rewards", rewards),
        override("evaluation.rewards", judged),
    ]


# Gradient shares


def gradient_shares(seed: int, options: argparse.Namespace) -> tuple[list[Record], Record]:
    """Before training: for each estimator, the norm of each task's gradient over their sum.

    And ``excess_kurtosis`` of the rewards of each task.
    """
    changes = [*_shared(options), override("seed", seed), *options.overrides]
    session = open_session(load(tables.ROOT / RECIPE, changes))
    groups, scores = first_groups(session, options.probes)
    found = []
    for name in options.estimators:
        part = load(tables.ROOT / RECIPE, [*changes, override("advantage", ESTIMATORS[name])])
        advantages, _ = part.advantage.module.estimate(scores, part.advantage.config, {})
        norms = {task: task_norm(session, part, groups, advantages, scores, task) for task in TASKS}
        total = sum(norms.values())
        found.append(
            {"estimator": name, **{t: norm / total if total else 0.0 for t, norm in norms.items()}}
        )
    return found, {task: excess_kurtosis(scores, task) for task in TASKS}


def excess_kurtosis(scores: Scores, task: str) -> float:
    """Of the valid rewards of a task less the means of their groups; a Gaussian has 0."""
    chosen = scores.valid & torch.tensor([each == task for each in scores.task])
    rewards, group = scores.combined[chosen], scores.group[chosen]
    centred = torch.cat([rewards[group == g] - rewards[group == g].mean() for g in group.unique()])
    variance = centred.square().mean()
    return float(centred.pow(4).mean() / variance.square() - 3) if variance else math.nan


def first_groups(session: Session, probes: int) -> tuple[list[RolloutGroup], Scores]:
    """Groups of ``probes`` training prompts of each task, and their scores."""
    prompts = [
        prompt
        for task in TASKS
        for prompt in [p for p in session.training_prompts if p.task == task][:probes]
    ]
    config = session.config
    requests = make_requests(prompts, config.training.group_size, config.seed, 0)
    scorer = make_trainer(session).scorer
    groups = roll_out(session.backend, session.accelerator, scorer, requests, Means())
    scores = assemble(collect_scores(session.accelerator, scorer))
    scorer.close()
    return groups, scores


def task_norm(
    session: Session,
    config: RunConfig,
    groups: Sequence[RolloutGroup],
    advantages: Advantages,
    scores: Scores,
    task: str,
) -> float:
    """Norm of the gradient of a task's samples, summed over tokens."""
    backend, objective = session.backend, config.objective
    size = config.training.group_size
    rows = [
        (group, i, advantages.values[number * size + i])
        for number, group in enumerate(groups)
        for i in range(size)
        if scores.task[number * size] == task
    ]
    parameters = [p for p in backend.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        payload, mask = backend.collate([(group, i) for group, i, _ in part])
        batch = UpdateBatch(
            payload=payload,
            mask=mask,
            advantages=torch.stack([value for _, _, value in part]),
            weights=torch.ones(len(part), dtype=torch.float64),
            tasks=[task] * len(part),
        )
        terms = backend.evaluate(batch, objective.module.needs(objective.config))
        loss = objective.module.loss(terms, batch, objective.config).loss
        loss.masked_fill(~mask, 0.0).sum().backward()
    squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


# Report


def report(
    runs: Runs,
    shares: Sequence[Record],
    tails: Sequence[Record],
    about: Mapping[str, Any],
    options: argparse.Namespace,
) -> str:
    """The whole result in markdown."""
    changes = f" All with {' '.join(options.overrides)}." if options.overrides else ""
    failed = [f"{name} seed {seed}" for (name, seed), run in runs.items() if run.failed]
    return "\n\n".join(
        [
            f"# Advantage estimators on six tasks: seeds {' '.join(map(str, options.seeds))}",
            f"{options.steps} steps each.{changes} "
            f"Runs that failed: {', '.join(failed) or 'none'}.",
            "## Held-out scores before, and gains",
            gain_table(runs, options.estimators),
            "count, colour, compare, position: share of right answers; box: IoU; read: 1 - edit "
            "distance over length. Gain: score after the last step minus score before training.",
            "## Share of each task in the first gradient",
            share_table(shares, options.estimators),
            f"{options.probes} prompts of each task; 0.167 each would be equal shares.",
            "## Excess kurtosis of the rewards of each task",
            tables.markdown_table(
                list(TASKS), [[mean_and_std([r[task] for r in tails], ".1f") for task in TASKS]]
            ),
            f"Tails: {options.tails}. The same samples, less the mean of their group; a Gaussian "
            "has 0.",
            f"± is the standard deviation over seeds (n - 1). {about['threads']} threads. "
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def gain_table(runs: Runs, names: Sequence[str]) -> str:
    """The scores of all before training, then the gains of each estimator."""
    first = [run.points[0].scores for run in runs.values()]
    rows = [["before", *(mean_and_std([s[t] for s in first], ".3f") for t in TASKS),
             mean_and_std([_mean(s) for s in first], ".3f")]]  # fmt: skip
    for name in names:
        mine = [run for (n, _), run in runs.items() if n == name and not run.failed]
        gains = [
            {t: run.points[-1].scores[t] - run.points[0].scores[t] for t in TASKS} for run in mine
        ]
        cells = [mean_and_std([gain[task] for gain in gains], "+.3f") for task in TASKS]
        rows.append([name, *cells, mean_and_std([_mean(gain) for gain in gains], "+.3f")])
    return tables.markdown_table(["", *TASKS, MEAN], rows)


def share_table(shares: Sequence[Record], names: Sequence[str]) -> str:
    """A row for each estimator."""
    rows = []
    for name in names:
        mine = [record for record in shares if record["estimator"] == name]
        rows.append([name, *(mean_and_std([r[task] for r in mine], ".3f") for task in TASKS)])
    return tables.markdown_table(["", *TASKS], rows)


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores[task] for task in TASKS) / len(TASKS)


def plot(runs: Runs) -> Figure:
    """Held-out scores of every task against CPU-seconds."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, task in zip(panels, TASKS, strict=True):
        for name, colour in zip(dict.fromkeys(n for n, _ in runs), SERIES_COLOURS, strict=False):
            paths = [run.points for (n, _), run in runs.items() if n == name and not run.failed]
            if paths:
                bands.draw(axes, paths, task, colour, name)
        axes.set(title=task, xlabel="CPU-seconds of training")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle("held-out scores, mean over seeds, band from the lowest to the highest")
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = experiment_parser("advantages", every=20)
    add = parser.add_argument
    add("--estimators", nargs="+", default=list(ESTIMATORS), help=f"any of {list(ESTIMATORS)}")
    add("--steps", type=int, default=60, help="training steps of every run")
    add("--tails", choices=("recipe", "heavy"), default="recipe", help="of the reward for reading")
    add("--probes", type=int, default=16, help="prompts of each task for the gradient shares")
    return parser


if __name__ == "__main__":
    tables.script(main)
