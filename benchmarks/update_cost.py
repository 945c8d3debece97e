"""What does a loss add to the cost of an update of plain GRPO?

    python -m benchmarks.update_cost [--task text] [--methods grpo mhpo ...] [--steps 12]

All methods of the zoo that bring a loss train side by side in one process, at a learning rate that
changes nothing: so every method sees the same samples at the same step, which is checked, and does
the same forward and backward passes but for what its loss asks for.  They take turns, step by step,
in an order that rotates.  CPU-seconds from the end of the rollout to the end of the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.objective_zoo import BASE, METHODS, RECIPES
from benchmarks.runs import override
from benchmarks.search import LEARNING_RATE
from mmrl import runner
from mmrl.config import load
from mmrl.errors import UserError
from mmrl.schema import nearest
from mmrl.trainer import Trainer

LOSSES = tuple(name for name, method in METHODS.items() if method.kind == "loss")
UNCHANGED = (
    override(LEARNING_RATE, 1e-30),
    override("optimizer.weight_decay", 0.0),
    override("optimizer.warmup_updates", 0),
    override("prompts.sampler", {"name": "uniform"}),
    override("advantage", {"name": "group", "deviation": "none"}),
    override("evaluation", None),
)
"""Adam moves each parameter by the learning rate at most, which is nothing in float32."""


@dataclass
class Meter:
    """One method in training: what each step drew, and CPU-seconds of its update."""

    trainer: Trainer
    drawn: list[list[str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One training step."""
        started = 0.0

        def observe(rolled, advantages) -> None:
            nonlocal started
            del advantages
            self.drawn.append([text for group in rolled.groups for text in group.outputs])
            started = time.process_time()

        self.trainer.observe = observe
        self.trainer.step()
        self.seconds.append(time.process_time() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = _parser().parse_args(arguments)
    for name in options.methods:
        if name not in METHODS:
            raise UserError(f"--methods: unknown {name!r}; {nearest(name, list(METHODS))}")
    seconds = measure([BASE, *(name for name in options.methods if name != BASE)], options)
    about = tables.machine() | {"threads": torch.get_num_threads()}
    text = report(seconds, options)
    text += f"\n\n{about['threads']} threads. Machine: {tables.machine_line(about)}"
    data = {"machine": about, "overrides": options.overrides, "seconds": seconds}
    path = tables.write_results(options.out, f"update-cost-{options.task}", text, data)
    print(f"{text}\n\nwritten to {path}")
    return 0


def measure(names: Sequence[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """CPU-seconds of the update of each method, step by step; the first is a warm-up, not counted.

    Raises:
        UserError: two methods drew different samples.
    """
    meters = {name: Meter(open_trainer(name, options)) for name in names}
    try:
        for step in range(options.steps + 1):
            turn = step % len(names)
            for name in (*names[turn:], *names[:turn]):
                meters[name].step()
    finally:
        for meter in meters.values():
            meter.trainer.scorer.close()
    first = meters[names[0]]
    for name, meter in meters.items():
        if meter.drawn != first.drawn:
            raise UserError(f"{name} and {names[0]} drew different samples: not the same work")
    return {name: meter.seconds[1:] for name, meter in meters.items()}


def open_trainer(name: str, options: argparse.Namespace) -> Trainer:
    """A run of the recipe with the parts of a method, which learns nothing."""
    changes = [*UNCHANGED, *METHODS[name].overrides, *options.overrides]
    return runner.make_trainer(
        runner.open_session(load(tables.ROOT / RECIPES[options.task], changes))
    )


def report(seconds: Mapping[str, Sequence[float]], options: argparse.Namespace) -> str:
    """The result in markdown."""
    changes = f" With {' '.join(options.overrides)}." if options.overrides else ""
    return "\n\n".join(
        [
            f"# Update cost of each loss, {options.task}",
            f"{RECIPES[options.task]}, {options.steps} steps after a warm-up, methods by turns on "
            f"the same samples.{changes}",
            cost_table(seconds),
            f"CPU-s: median of the steps. over {BASE}: median, least and greatest of the ratios "
            "step by step.",
        ]
    )


def cost_table(seconds: Mapping[str, Sequence[float]]) -> str:
    """A row for each method."""
    rows = []
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(mine, seconds[BASE], strict=True)]
        rows.append(
            [
                name,
                f"{statistics.median(mine):.3f}",
                *(f"{each:.3f}" for each in (statistics.median(ratios), min(ratios), max(ratios))),
            ]
        )
    return tables.markdown_table(["loss", "CPU-s", f"over {BASE}", "least", "greatest"], rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update_cost")
    add = parser.add_argument
    add("--task", choices=list(RECIPES), default="text")
    add("--methods", nargs="+", default=list(LOSSES), help=f"any of {list(METHODS)}")
    add("--steps", type=int, default=12, help="measured steps of each method")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    add("overrides", nargs="*", help="a.b=value, for every method")
    return parser


if __name__ == "__main__":
    tables.script(main)
