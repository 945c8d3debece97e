"""How fast is an update of a language model, how much memory does it take, and what does TRL need?

    python -m benchmarks.language_update [--modalities text vlm] [--prompts 20 400]

One group of a random-weight Qwen3, or of a Qwen3-VL with a picture in its prompt, on the same
weights, completions and advantages, in float32: the forms of ``backend.update``, and TRL's
``GRPOTrainer`` (``pip install -e '.[bench-trl]'``).  An update is a forward and a backward of
GRPO's loss; pixels are ready before it, and the tower that reads them is not trained.  Gradients of
all are compared first, and nothing is timed if they differ.  Forms are timed by turns.  Memory:
each form in a process of its own, its peak during the update above what it held before.  A whole
step has each system's own sampling, rewards and optimizer, and its own reading of the picture.
All but memory is measured for each of ``--seeds``: of weights, prompt, completions, advantages.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.language_peers import (
    FORMS,
    OURS,
    TRAINED,
    TRL,
    TRL_COMPACT,
    Peer,
    gradient,
    gradient_gap,
    open_peer,
)
from benchmarks.language_toys import END, MODALITIES, TOWER, Shape, Work, make_model, make_work
from mmrl.charts import SERIES_COLOURS

TOLERANCE = 1e-5
"""Largest norm of a difference of two gradients, over the norm of TRL's."""

SYSTEMS = (OURS[0], TRL, TRL_COMPACT)
"""What samples in ways of its own; our forms differ in the update only."""

PROBE = Work(completions=[[END, END]], advantages=[1.0])
"""Enough to load what is loaded late, before memory is looked at."""

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """``cpu`` and ``wall`` seconds of every round, and the ``tokens`` of completions in it."""

    tokens: list[int] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def add(self, work: Callable[[], int]) -> None:
        """Another round; ``work`` returns its tokens."""
        cpu, wall = time.process_time(), time.perf_counter()
        tokens = work()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        self.tokens.append(tokens)

    @property
    def cpu_rates(self) -> list[float]:
        """Tokens a CPU-second of every round."""
        return [n / t for n, t in zip(self.tokens, self.cpu, strict=True)]

    @property
    def cpu_rate(self) -> float:
        """Their median."""
        return statistics.median(self.cpu_rates)

    @property
    def wall_rate(self) -> float:
        """Tokens a second, median of the rounds."""
        return statistics.median(n / t for n, t in zip(self.tokens, self.wall, strict=True))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All about one shape, by form: the largest ``gaps`` of the gradients of any draw, the
    ``growth`` in bytes of the first draw, the costs of updates and of whole steps in all rounds of
    all draws; the load averages before and after each draw.
    """

    shape: Shape
    gaps: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FORMS, 0.0))
    growth: dict[str, int]
    updates: dict[str, Cost] = field(default_factory=lambda: {form: Cost() for form in FORMS})
    steps: dict[str, Cost] = field(default_factory=lambda: {name: Cost() for name in SYSTEMS})
    loads: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, time, print, write; what is measured is written after each shape."""
    options = _parser().parse_args(arguments)
    cells: list[Cell] = []
    axes = options.modalities, options.trained, options.vocabularies, options.prompts
    for modality, trained, vocabulary, prompt in itertools.product(*axes):
        shape = Shape(prompt=prompt, vocabulary=vocabulary, trained=trained, modality=modality)
        cells.append(measure(shape, options))
        path = write(cells, options)
    print(f"{path.read_text(encoding='utf-8')}\nwritten to {path}")
    return 0


def measure(shape: Shape, options: argparse.Namespace) -> Cell:
    """``SystemExit`` if gradients differ."""
    draws = [replace(shape, seed=seed) for seed in options.seeds]
    with draw(draws[0], options) as (folder, work):
        # Tensors of other draws are as large.
        growth = {form: in_a_process(form, folder, draws[0], work) for form in FORMS}
    cell = Cell(shape=shape, growth=growth)
    for drawn in draws:
        cell.loads.append(os.getloadavg()[0])
        with draw(drawn, options) as (folder, work):
            add_costs(cell, open_peers(folder, drawn, options.group_size), work, options)
        cell.loads.append(os.getloadavg()[0])
    print(cell, flush=True)
    return cell


@contextlib.contextmanager
def draw(shape: Shape, options: argparse.Namespace) -> Iterator[tuple[Path, Work]]:
    """A folder with the model of a seed, for as long as it is used, and the work for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, shape, num_hidden_layers=options.layers, hidden_size=options.hidden)
        yield folder, make_work(shape, options.group_size)


def add_costs(cell: Cell, peers: dict[str, Peer], work: Work, options: argparse.Namespace) -> None:
    """Those of one more draw; what compares gradients and warms up before is not timed."""
    gaps = differences(peers, work)
    refuse_differences(gaps)
    cell.gaps.update({form: max(gap, cell.gaps[form]) for form, gap in gaps.items()})
    time_by_turns(cell.updates, options.rounds, lambda form: update(peers[form].use(form), work))
    for form in SYSTEMS:
        peers[form].use(form).step()
    time_by_turns(cell.steps, options.step_rounds, lambda form: peers[form].use(form).step())


def open_peers(folder: Path, shape: Shape, group_size: int) -> dict[str, Peer]:
    """By form; forms of one system share its model."""
    ours, trl = (open_peer(form, folder, shape, group_size) for form in (OURS[0], TRL))
    return {form: ours if form in OURS else trl for form in FORMS}


def differences(peers: dict[str, Peer], work: Work) -> dict[str, float]:
    """``gradient_gap`` of each form from TRL's."""
    found = {}
    for form, peer in peers.items():
        peer.use(form).update(work)
        found[form] = gradient(peer)
    return {form: gradient_gap(value, found[TRL]) for form, value in found.items()}


def refuse_differences(gaps: dict[str, float]) -> None:
    """``SystemExit`` if a gap is above ``TOLERANCE``."""
    wrong = {form: gap for form, gap in gaps.items() if not gap <= TOLERANCE}
    if wrong:
        raise SystemExit(f"gradients differ, so there is nothing to compare: {wrong}")


def update(peer: Peer, work: Work) -> int:
    """An update, from no gradients to gradients; returns the tokens of its completions."""
    for parameter in peer.parameters().values():
        parameter.grad = None
    peer.update(work)
    return work.tokens


def time_by_turns(costs: dict[str, Cost], rounds: int, run: Callable[[str], int]) -> None:
    """Add ``rounds`` of ``run(form)`` to the costs of each form, the order reversed every round."""
    forms = list(costs)
    for _ in range(rounds):
        odd = len(costs[forms[0]].cpu) % 2
        for form in forms[:: -1 if odd else 1]:
            costs[form].add(lambda form=form: run(form))


# Memory


def in_a_process(form: str, folder: Path, shape: Shape, work: Work) -> int:
    """``growth`` in a fresh process with as many threads."""
    # The allocator then gives back what is freed, and the next update cannot hide in it.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            threads = torch.get_num_threads()
            return pool.submit(growth, form, folder, shape, work, threads).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def growth(form: str, folder: Path, shape: Shape, work: Work, threads: int) -> int:
    """Bytes by which an update's peak exceeds what the process held before; Linux only."""
    torch.set_num_threads(threads)
    peer = open_peer(form, folder, shape, len(work.completions))
    peer.update(PROBE)
    gradient(peer)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = resident("VmRSS")
    peer.update(work)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of resident memory: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


# Report


def write(cells: Sequence[Cell], options: argparse.Namespace) -> Path:
    """The results so far, and their drawing."""
    about = tables.machine() | {"threads": torch.get_num_threads()}
    data = {
        "machine": about,
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "cells": [asdict(cell) for cell in cells],
    }
    markdown = report(cells, options, about)
    path = tables.write_results(options.out, "language-update", markdown, data)
    plot(cells).savefig(path.with_suffix(".png"), dpi=150)
    return path


def report(cells: Sequence[Cell], options: argparse.Namespace, about: dict[str, Any]) -> str:
    """The whole result in markdown."""
    loads = [load for cell in cells for load in cell.loads]
    draws = (
        f"Draws of weights, prompt, completions and advantages: {len(options.seeds)} (seeds "
        f"{' '.join(map(str, options.seeds))})."
    )
    return "\n\n".join(
        [
            "# Update of a language model beside TRL's",
            f"A Qwen3 (text) or Qwen3-VL (vlm) of {options.layers} layers, width {options.hidden}, "
            "random weights, float32. A prompt of the latter is a picture and a few words; its "
            f"vision tower has {TOWER['depth']} layers of width {TOWER['hidden_size']} and is not "
            f"trained. One group of {options.group_size} completions with "
            f"{make_work(cells[0].shape, options.group_size).tokens} tokens together. "
            f"`{TRL}`: `GRPOTrainer` as it is; on a CPU its head scores every position, those of "
            f"prompts and padding too. `{TRL_COMPACT}`: the same told to score completion tokens "
            "only, as it does on CUDA. Neither has gradient checkpointing.",
            "## shared_prompt over TRL",
            ratio_table(cells),
            "Speed in completion tokens a CPU-second, as a multiple: of the medians, and in "
            "brackets the least and the greatest of single rounds; memory growth as a share. "
            f"{draws}",
            "## Updates",
            update_table(cells),
            f"Forward and backward; {options.rounds} rounds for each draw, taken by turns; medians "
            "of all. Growth: peak of the update above what the process held before, gradients "
            "included, each form in a process of its own; first draw. Gap: norm of the "
            "difference of the gradients from TRL's, over their norm; the largest of the draws, "
            f"refused above {TOLERANCE:g}.",
            "## Whole steps",
            step_table(cells),
            "Sampling, a reward that costs nothing, update and optimizer; "
            f"{options.step_rounds} steps for each draw, taken by turns; medians of all. Each "
            "system samples for itself, so the lengths of completions differ. TRL prepares the "
            "picture of each completion in every step; mmrl keeps what it prepared once.",
            f"Threads: {about['threads']}. Load average of the machine: {min(loads):.1f} to "
            f"{max(loads):.1f}; CPU-seconds suffer from it less than seconds do.",
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def ratio_table(cells: Sequence[Cell]) -> str:
    """Ours against both forms of TRL, one line for each shape."""
    ours, peers = OURS[0], (TRL, TRL_COMPACT)
    titles = [f"{what} / {peer}" for what in ("update", "step", "memory") for peer in peers]

    def faster(costs: dict[str, Cost], peer: str) -> str:
        rounds = zip(costs[ours].cpu_rates, costs[peer].cpu_rates, strict=True)
        middle = costs[ours].cpu_rate / costs[peer].cpu_rate
        return _spread(middle, [mine / its for mine, its in rounds], ".2f")

    return tables.markdown_table(
        [*_SHAPE, *titles],
        [
            [
                *_shape(cell),
                *(faster(cell.updates, peer) for peer in peers),
                *(faster(cell.steps, peer) for peer in peers),
                *(_share(cell.growth[ours], cell.growth[peer]) for peer in peers),
            ]
            for cell in cells
        ],
    )


def _spread(middle: float, rounds: Sequence[float], form: str) -> str:
    return f"{middle:{form}} ({min(rounds):{form}} to {max(rounds):{form}})"


def _share(part: float, whole: float) -> str:
    """A dash where the whole fitted into memory that was held before."""
    return tables.cell(part / whole if whole else None, ".2f")


def update_table(cells: Sequence[Cell]) -> str:
    """One line for each shape and form."""
    header = [*_SHAPE, "form", "tokens / CPU-s", "tokens / s", "growth MiB", "gap"]
    return tables.markdown_table(
        header,
        [
            [
                *_shape(cell),
                form,
                _spread(cost.cpu_rate, cost.cpu_rates, ".0f"),
                f"{cost.wall_rate:.0f}",
                f"{cell.growth[form] / MIB:.0f}",
                f"{cell.gaps[form]:.1e}",
            ]
            for cell in cells
            for form, cost in cell.updates.items()
        ],
    )


def step_table(cells: Sequence[Cell]) -> str:
    """One line for each shape and system."""
    header = [*_SHAPE, "system", "tokens / CPU-s", "tokens / s", "tokens of a step"]
    return tables.markdown_table(
        header,
        [
            [
                *_shape(cell),
                form,
                _spread(cost.cpu_rate, cost.cpu_rates, ".0f"),
                f"{cost.wall_rate:.0f}",
                f"{statistics.median(cost.tokens):.0f}",
            ]
            for cell in cells
            for form, cost in cell.steps.items()
        ],
    )


def plot(cells: Sequence[Cell]) -> Figure:
    """Tokens a CPU-second of the updates, and their memory, as bars for each shape."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for i, (form, colour) in enumerate(zip(FORMS, SERIES_COLOURS, strict=False)):
        at = [place + (i - 2) * 0.16 for place in range(len(cells))]
        rates = [cell.updates[form].cpu_rate for cell in cells]
        speed.bar(at, rates, width=0.15, color=colour, label=form)
        memory.bar(at, [cell.growth[form] / MIB for cell in cells], width=0.15, color=colour)
    speed.set(title="update: completion tokens a CPU-second", yscale="log")
    memory.set(title="memory growth of the update, MiB", yscale="log")
    for axes in (speed, memory):
        axes.set_xticks(range(len(cells)), ["\n".join(_shape(cell)) for cell in cells])
        axes.set_xlabel(", ".join(_SHAPE))
        axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(FORMS), fontsize="small")
    return figure


_SHAPE = ("modality", "trained", "prompt", "vocabulary")


def _shape(cell: Cell) -> list[str]:
    return [str(getattr(cell.shape, name)) for name in _SHAPE]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_update", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    modalities = list(MODALITIES)
    add("--modalities", nargs="+", choices=modalities, default=modalities,
        help="vlm: a picture is most of the prompt")  # fmt: skip
    add("--prompts", type=int, nargs="+", default=[20, 400],
        help="tokens of the prompt, those of a picture included")  # fmt: skip
    add("--vocabularies", type=int, nargs="+", default=[512, 32768, 151936])
    add("--trained", nargs="+", choices=TRAINED, default=["lora"])
    add("--group-size", type=int, default=8, help="completions of the prompt")
    add("--layers", type=int, default=3)
    add("--hidden", type=int, default=256, help="width of the network")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="a draw each")
    add("--rounds", type=int, default=2, help="timed updates of each form, for each draw")
    add("--step-rounds", type=int, default=1, help="timed whole steps of each system, likewise")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
