"""The search behind the comparison of methods: the same small effort for each.

Every method gets the same learning rates times as many values of one knob of its own, the same
CPU-seconds of training for each of these settings, and one seed that the report does not use.  The
winner has the best score when exactly that time is spent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.runs import Run, override, score_at

RATES = (5e-4, 1e-3, 2e-3)
LEARNING_RATE = "optimizer.learning_rate"
RECORD = "search.json"


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One thing of a method that is tried at several values; ``keys`` all get the same."""

    keys: tuple[str, ...]
    values: tuple[float, ...]


CLIP = ("objective.clip_low", "objective.clip_high")
NOISE_LEVEL = ("backend.likelihood.noise_level",)
KNOBS: dict[str, Knob] = {
    "awm": Knob(keys=("regularisers.1.coef",), values=(0.3, 1.0)),  # of kl_ema
    "flow-grpo": Knob(keys=CLIP, values=(1e-4, 1e-3)),
    "flow-grpo-fast": Knob(keys=NOISE_LEVEL, values=(0.5, 0.8)),
    "nft": Knob(keys=("backend.likelihood.ema.max_decay",), values=(0.5, 0.9)),
    "grpo-guard": Knob(keys=CLIP, values=(2e-6, 2e-5)),
    "dance-grpo": Knob(keys=NOISE_LEVEL, values=(0.3, 0.6)),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting of a method: what it changes, and a name made of its values."""

    method: str
    name: str
    overrides: tuple[str, ...]


def trials(method: str) -> list[Trial]:
    """The grid of a method: every learning rate with every value of its knob."""
    knob = KNOBS[method]
    return [
        Trial(
            method=method,
            name=f"{method}-{rate:g}-{value:g}",
            overrides=(
                override(LEARNING_RATE, rate),
                *(override(key, value) for key in knob.keys),
            ),
        )
        for rate, value in product(RATES, knob.values)
    ]


def result(trial: Trial, run: Run, metric: str, budget: float = math.inf) -> dict[str, Any]:
    """What the results file keeps of a trial; a run that failed has no score.

    The score is that after ``budget`` CPU-seconds, or at the end.
    """
    score = None if run.failed else score_at(run.points, metric, budget)
    return {
        "method": trial.method,
        "tried": list(trial.overrides),
        "score": score,
        "steps": run.points[-1].step,
        **run.record(),
    }


def winners(results: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Overrides of the best setting of each method; the first of equals, none where all failed."""
    best: dict[str, Mapping[str, Any]] = {}
    for each in results:
        leader = best.get(each["method"])
        if each["score"] is not None and (leader is None or each["score"] > leader["score"]):
            best[each["method"]] = each
    return {method: list(each["tried"]) for method, each in best.items()}


def report(record: Mapping[str, Any]) -> str:
    """The search in markdown: what was tried, at what cost, and what won."""
    won = record["winners"]
    changes = f" All with {' '.join(record['overrides'])}." if record.get("overrides") else ""
    rows = [
        [
            each["method"],
            " ".join(each["tried"]),
            str(each["steps"]),
            tables.cell(each["score"], ".3f") if each["score"] is not None else "failed",
            "won" if won.get(each["method"]) == each["tried"] else "",
        ]
        for each in record["trials"]
    ]
    return "\n\n".join(
        [
            "## Search",
            f"{record['effort']}, seed {record['seed']}, which no other table uses.{changes} "
            f"Score: {record['metric']} on the training prompts.",
            tables.markdown_table(["method", "setting", "steps", "score", ""], rows),
        ]
    )


def folder(runs: Path, trial: Trial) -> Path:
    """Where a trial is trained."""
    return runs / "search" / trial.name
