"""What does each published method do on the same small task, with the same effort?

    python -m benchmarks.objective_zoo --search
    python -m benchmarks.objective_zoo [--seeds 0 1 2 3 4] [--methods grpo mhpo ...]

Every method is the recipe of the task with the parts that the method names, so model, prompts,
seeds and number of steps are the same, and with them the samples that are generated (but for
methods that change just that); what a step costs is measured.  ``--search`` tries the same learning
rates for each, on one seed that the table does not use and on prompts that it does not use; the
table takes the winners; a search of some ``--methods`` keeps what is known of others.  What is
finished is kept and what was interrupted is continued; ``--fresh`` begins anew.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import search, tables
from benchmarks.runs import (
    NUM_STEPS,
    Job,
    Run,
    crossing,
    ensure,
    experiment_parser,
    mean_and_std,
    override,
    stop_when_terminated,
)
from mmrl.charts import SERIES_COLOURS
from mmrl.errors import UserError
from mmrl.schema import nearest
from rewards import exact_match

RECIPES = {
    "text": Path("configs/text/tiny-qwen/grpo-arithmetic.yaml"),
    "vlm": Path("configs/vlm/tiny-qwen-vl/g2rpo-vas.yaml"),
}
TRAINING_PROMPTS = {
    "text": "assets/prompts/arithmetic-train.jsonl",
    "vlm": "assets/prompts/pictures-train.parquet",
}
BASE = "grpo"
RATES = (5e-5, 1e-4, 2e-4)
ACCURACY, PASS = "accuracy", "pass"
LAST_STEPS = 5
"""Training steps at the end whose mean is the final entropy."""
CONFIDENCE = 0.95
STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}
"""Number of seeds -> quantile of Student's t for ``CONFIDENCE``, two-sided, n - 1 degrees."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Sections that a method changes in the recipe, and what kind of part it brings."""

    kind: str
    sections: Mapping[str, Any]

    @property
    def overrides(self) -> tuple[str, ...]:
        """As on the command line."""
        return tuple(override(key, value) for key, value in self.sections.items())


def _loss(name: str, **settings: Any) -> Method:
    return Method(kind="loss", sections={"objective": {"name": name, **settings}})


def _advantage(name: str, **settings: Any) -> Method:
    return Method(kind="advantage", sections={"advantage": {"name": name, **settings}})


def _modulator(name: str, **settings: Any) -> Method:
    return Method(kind="modulator", sections={"modulators": [{"name": name, **settings}]})


def _selection(name: str, **settings: Any) -> Method:
    return Method(kind="selection", sections={"selection": [{"name": name, **settings}]})


def _regulariser(name: str, **settings: Any) -> Method:
    return Method(kind="regulariser", sections={"regularisers": [{"name": name, **settings}]})


METHODS: dict[str, Method] = {
    BASE: _loss("grpo", clip_low=0.2, clip_high=0.28),
    "gspo": _loss("grpo", importance="sample", clip_low=3e-4, clip_high=4e-4),
    "cispo": _loss("cispo"),
    "sapo": _loss("sapo"),
    "reinforce": _loss("reinforce"),
    "mhpo": _loss("mhpo"),
    "gbpo": _loss("gbpo"),
    "etr": _loss("etr"),
    "p3o_pairwise": _loss("p3o_pairwise"),
    "mdpo_mirror": _loss("mdpo_mirror"),
    "real": _loss("real"),
    "r2vpo": _loss("r2vpo"),
    "group_std": _advantage("group"),
    "leave_one_out": _advantage("leave_one_out"),
    "g2rpo": _advantage("g2rpo"),
    "risk_pass_at_4": _advantage("risk", measure="pass_at_k", k=4),
    "risk_mixed_var": _advantage("risk", measure="mixed_var", scope="batch"),
    "riskpo": _advantage("riskpo", bundle_size=4, credit="sum_mean", natural_baseline=False),
    "bnpo": _advantage("bnpo"),
    "gdpo_decoupled": _advantage("gdpo_decoupled"),
    "copo_consistency": _advantage("copo_consistency"),
    "optimal_baseline": _advantage("optimal_baseline"),
    "subpo_max": _advantage("subpo", function="max", reward_weight=0.5),
    "gp_loo": _advantage("gp_loo", fit=True),
    "adora": _modulator("adora", rule="vlm", success=0.5),
    "dcpo": _modulator("dcpo"),
    "d3s": _selection("d3s", scope="step", samples_start=0.25, samples_end=1.0,
                      decisions_start=0.2, decisions_end=1.0),
    "entropy_quantile": _selection("entropy_quantile", share=0.2),
    "pf_ppo": _selection("pf_ppo", strategy="br", mode="draw"),
    "knapsack": Method(kind="budget", sections={"prompts.budget": {"name": "knapsack"}}),
    "refills": Method(kind="budget", sections={"training.refills": 2}),
    "orpo_occupancy": _regulariser("orpo_occupancy", coef=8e-4),
    "kl_target": _regulariser("kl_target", estimator="k3", coef=0.1, target=0.01),
    "entropy_target": _regulariser("entropy_target", target=0.2, coef=1e-4, max_multiplier=50),
}  # fmt: skip

Runs = Mapping[tuple[str, int], Run]
Record = dict[str, Any]


def solved(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **_: Any
) -> list[float]:
    """1 for all samples of the prompt if one of them is right, else 0: pass@k as a reward."""
    judge = exact_match.build(exact_match.Config(where="tag"))
    return [float(judge(prompts, completions, answer=answer).max())] * len(completions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then print and write."""
    stop_when_terminated()
    options = _parser().parse_args(arguments)
    _refuse_mistakes(options)
    markdown, path = _search(options) if options.search else _compare(options)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def _compare(options: argparse.Namespace) -> tuple[str, Path]:
    found = _search_record(options)
    runs = {
        (name, seed): ensure(run_job(name, seed, options, found), fresh=options.fresh)
        for seed in options.seeds
        for name in options.methods
    }
    records = figures(runs)
    about = tables.machine() | {"threads": torch.get_num_threads()}
    markdown = report(records, about, options, found)
    data = {
        "machine": about,
        "task": options.task,
        "overrides": options.overrides,
        "search": found,
        "figures": records,
        "runs": [{"method": name, **run.record()} for (name, _), run in runs.items()],
    }
    path = tables.write_results(options.out, f"objective-zoo-{options.task}", markdown, data)
    plot(records).savefig(path.with_suffix(".png"), dpi=150)
    return markdown, path


# Runs


def run_job(
    name: str, seed: int, options: argparse.Namespace, found: Mapping[str, Any] | None
) -> Job:
    """The training command of a method and a seed, with the learning rate that won its search."""
    judged = ({"label": ACCURACY, "name": "exact_match", "where": "tag"},
              {"label": PASS, "name": "benchmarks.objective_zoo.solved"})  # fmt: skip
    return Job(
        config=RECIPES[options.task],
        folder=_folder(options) / f"{name}-seed{seed}",
        seed=seed,
        overrides=(
            *_shared(options),
            override("evaluation.rewards", [_for_task(each, options.task) for each in judged]),
            *METHODS[name].overrides,
            *(found["winners"][name] if found else ()),
            *options.overrides,
        ),
    )


def trials(name: str) -> list[search.Trial]:
    """The grid, which is the same for every method."""
    return [
        search.Trial(
            method=name,
            name=f"{name}-{rate:g}",
            overrides=(override(search.LEARNING_RATE, rate),),
        )
        for rate in RATES
    ]


def _search(options: argparse.Namespace) -> tuple[str, Path]:
    judged = _for_task({"label": ACCURACY, "name": "exact_match", "where": "tag"}, options.task)
    known = _search_record(options) or {"trials": []}
    results = [each for each in known["trials"] if each["method"] not in options.methods]
    for trial in (trial for name in options.methods for trial in trials(name)):
        job = Job(
            config=RECIPES[options.task],
            folder=search.folder(_folder(options), trial),
            seed=options.search_seed,
            overrides=(
                *_shared(options),
                override("evaluation.source", TRAINING_PROMPTS[options.task]),
                override("evaluation.max_prompts", 240),
                override("evaluation.samples_per_prompt", 2),
                override("evaluation.rewards", [judged]),
                *METHODS[trial.method].overrides,
                *trial.overrides,
                *options.overrides,
            ),
        )
        run = ensure(job, fresh=options.fresh)
        results.append(search.result(trial, run, ACCURACY))
        print(json.dumps({key: results[-1][key] for key in ("method", "tried", "score")}))
    record = {
        "machine": tables.machine(),
        "metric": ACCURACY,
        "seed": options.search_seed,
        "overrides": options.overrides,
        "effort": f"Each method: learning rates {', '.join(f'{rate:g}' for rate in RATES)}, "
        f"{options.steps} steps each",
        "winners": search.winners(results),
        "trials": results,
    }
    _record_path(options).write_text(json.dumps(record, indent=1), encoding="utf-8")
    name = f"objective-zoo-{options.task}-search"
    markdown = search.report(record)
    return markdown, tables.write_results(options.out, name, markdown, record)


def _shared(options: argparse.Namespace) -> tuple[str, ...]:
    return (
        override("prompts.sampler", {"name": "uniform"}),
        override("advantage", {"name": "group", "deviation": "none"}),
        override("evaluation.every", options.every),
        override("checkpoint.every", options.steps),
        override("checkpoint.keep_last", 1),
        override("tracking.trackers", []),
        override(NUM_STEPS, options.steps),
    )


def _for_task(reward: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Answers that are right or wrong are those of four tasks of the vision-language model."""
    exact = {"tasks": ["count", "colour", "compare", "position"]} if task == "vlm" else {}
    return {**reward, **exact}


def _folder(options: argparse.Namespace) -> Path:
    return options.runs / options.task


# Figures


def figures(runs: Runs) -> list[Record]:
    """One record for each run; targets and differences are those of the same seed."""
    records = []
    for (name, seed), run in runs.items():
        base = runs.get((BASE, seed))
        last = run.points[-1]
        target = base.points[-1].scores[ACCURACY] if base and not base.failed else None
        reached = None if target is None else crossing(run.points, ACCURACY, target)
        records.append(
            {
                "method": name,
                "seed": seed,
                "failed": run.failed,
                "cpu_per_step": last.cpu / last.step if last.step else None,
                "tokens": last.tokens,
                "before": run.points[0].scores[ACCURACY],
                ACCURACY: None if run.failed else last.scores[ACCURACY],
                PASS: None if run.failed else last.scores[PASS],
                "entropy": final_entropy(run),
                "tokens_to_target": reached and reached.tokens,
                "gain_on_base": None
                if target is None or run.failed
                else last.scores[ACCURACY] - target,
            }
        )
    return records


def final_entropy(run: Run) -> float | None:
    """Mean over the last training steps, in nats a token; ``None`` where it was not logged."""
    found = [row["entropy"] for row in run.rows if "entropy" in row][-LAST_STEPS:]
    return statistics.fmean(found) if found else None


def interval(differences: Sequence[float]) -> float:
    """Half the width of Student's interval of their mean; infinite for fewer than two.

    From ten on the quantile is that of ten, so the interval is a little too wide.
    """
    count = len(differences)
    if count < 2:
        return math.inf
    quantile = STUDENT[min(count, max(STUDENT))]
    return quantile * statistics.stdev(differences) / math.sqrt(count)


def verdict(differences: Sequence[float]) -> str:
    """``+`` or ``-`` where the interval excludes 0, else ``=``: inside the noise."""
    if not differences:
        return tables.ABSENT
    mean, half = statistics.fmean(differences), interval(differences)
    if abs(mean) <= half:
        return "="
    return "+" if mean > 0 else "-"


# Report


def report(
    records: Sequence[Record],
    about: Mapping[str, Any],
    options: argparse.Namespace,
    found: Mapping[str, Any] | None,
) -> str:
    """The whole result in markdown."""
    changes = f" All with {' '.join(options.overrides)}." if options.overrides else ""
    failed = [f"{r['method']} seed {r['seed']}" for r in records if r["failed"]]
    compared = len({r["method"] for r in records}) - 1
    return "\n\n".join(
        [
            f"# Objective zoo, {options.task}: seeds {' '.join(map(str, options.seeds))}",
            f"Each run is {RECIPES[options.task]} with the parts of its method, {options.steps} "
            "steps, prompts drawn uniformly, advantages as in Dr. GRPO where the method says "
            f"nothing.{changes} Runs that failed: {', '.join(failed) or 'none'}.",
            zoo_table(records, found),
            f"accuracy and pass@k: held-out, at the end. difference: to {BASE} with the same "
            f"seeds, and half of Student's {CONFIDENCE:.0%} interval of its mean; = where that "
            f"includes 0, so that nothing was shown. Of {compared} comparisons about "
            f"{(1 - CONFIDENCE) * compared:.0f} would be marked by chance alone. entropy: nats a "
            f"token, mean of the last {LAST_STEPS} steps. tokens to target: generated until the "
            f"method first had what {BASE} has at its end, mean over the seeds that came so far. "
            "rate: the learning rate that won the search.",
            search.report(found) if found else "No search was made: learning rates of the recipe.",
            f"± is the standard deviation over seeds (n - 1). {about['threads']} threads. "
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def zoo_table(records: Sequence[Record], found: Mapping[str, Any] | None) -> str:
    """A row for each method, by kind."""
    rows = []
    for name in dict.fromkeys(record["method"] for record in records):
        mine = [record for record in records if record["method"] == name]
        gains = [r["gain_on_base"] for r in mine if r["gain_on_base"] is not None]
        reached = [r["tokens_to_target"] for r in mine if r["tokens_to_target"] is not None]
        rows.append(
            [
                name,
                METHODS[name].kind,
                _rate(name, found),
                *(mean_and_std([r[key] for r in mine], ".3f") for key in (ACCURACY, PASS)),
                _difference(name, gains),
                mean_and_std([r["entropy"] for r in mine], ".3f"),
                mean_and_std([r["cpu_per_step"] for r in mine], ".2f"),
                mean_and_std([r["tokens"] / 1000 for r in mine], ".0f"),
                f"{mean_and_std([each / 1000 for each in reached], '.0f')} "
                f"({len(reached)} of {len(mine)})",
            ]
        )
    head = ["method", "kind", "rate", "accuracy", "pass@k", f"difference to {BASE}", "entropy",
            "CPU-s a step", "thousand tokens", "thousand tokens to target"]  # fmt: skip
    return tables.markdown_table(head, rows)


def _rate(name: str, found: Mapping[str, Any] | None) -> str:
    won = found["winners"].get(name, []) if found else []
    return next((each.partition("=")[2] for each in won), tables.ABSENT)


def _difference(name: str, gains: Sequence[float]) -> str:
    if name == BASE or not gains:
        return tables.ABSENT
    return f"{verdict(gains)} {statistics.fmean(gains):+.3f} ± {interval(gains):.3f}"


def plot(records: Sequence[Record]) -> Figure:
    """Final accuracies: a dot for each seed, a bar at their mean, the base method's as a line."""
    names = list(dict.fromkeys(record["method"] for record in records))
    kinds = list(dict.fromkeys(METHODS[name].kind for name in names))
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    labelled = set()
    for place, name in enumerate(names):
        scores = [r[ACCURACY] for r in records if r["method"] == name and r[ACCURACY] is not None]
        kind = METHODS[name].kind
        colour = SERIES_COLOURS[kinds.index(kind) % len(SERIES_COLOURS)]
        label = None if kind in labelled else kind
        axes.plot(scores, [place] * len(scores), "o", color=colour, alpha=0.5, label=label)
        labelled.add(kind)
        if scores:
            axes.plot(statistics.fmean(scores), place, "|", color=colour, markersize=16)
    base = [r[ACCURACY] for r in records if r["method"] == BASE and r[ACCURACY] is not None]
    if base:
        axes.axvline(statistics.fmean(base), color="grey", linewidth=1)
    axes.axvline(records[0]["before"], color="grey", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=f"held-out accuracy at the end (dotted: before; line: mean of {BASE})")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(kinds), fontsize="small")
    return figure


# Command line


def _refuse_mistakes(options: argparse.Namespace) -> None:
    for name in options.methods:
        if name not in METHODS:
            raise UserError(f"--methods: unknown {name!r}; {nearest(name, list(METHODS))}")
    if options.search_seed in options.seeds:
        raise UserError(f"--search-seed: {options.search_seed} is among --seeds, which report")
    found = None if options.search else _search_record(options)
    missing = [n for n in options.methods if found and n not in found["winners"]]
    if missing:
        raise UserError(f"--methods: the search did not see {', '.join(missing)}; --search it")


def _record_path(options: argparse.Namespace) -> Path:
    return _folder(options) / search.RECORD


def _search_record(options: argparse.Namespace) -> Record | None:
    path = _record_path(options)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = experiment_parser("objective_zoo", every=5)
    add = parser.add_argument
    add("--task", choices=list(RECIPES), default="text")
    add("--methods", nargs="+", default=list(METHODS), help=f"any of {list(METHODS)}")
    add("--steps", type=int, default=20, help="training steps of each run")
    add("--search", action="store_true", help="search instead of comparing")
    add("--search-seed", type=int, default=100, help="the seed that --search trains")
    return parser


if __name__ == "__main__":
    tables.script(main)
