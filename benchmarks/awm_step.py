"""Where does the time of a training step go, and how near is it to what the machine can do?

    python -m benchmarks.awm_step [--steps 5] [a.b=value ...]

Times are medians over steps.  The floor is the rate of one matrix product of the shape and dtype of
the network's feed-forward layer, measured between the steps: other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.rates import count_flops, matmul_rate, seconds
from mmrl import config as configuration
from mmrl import runner
from mmrl.rollouts import make_requests
from mmrl.trainer import Trainer
from mmrl.types import DTYPES


@dataclass(frozen=True, kw_only=True)
class Phase:
    """``seconds``: median; ``flops``: operations in one step, or ``None`` where uncounted."""

    name: str
    seconds: float
    flops: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _parser().parse_args(arguments)
    run = configuration.load(options.config, options.overrides)
    session = runner.open_session(run)
    trainer = runner.make_trainer(session)
    try:
        phases, rate, shape = measure(session, trainer, options.steps)
    finally:
        trainer.scorer.close()
    about = tables.machine()
    markdown = report(phases, rate, shape, options, about)
    data = {
        "machine": about,
        "config": str(options.config),
        "overrides": options.overrides,
        "matmul": {"shape": shape, "flops_per_second": rate},
        "phases": [vars(phase) for phase in phases],
    }
    path = tables.write_results(options.out, "awm-step", markdown, data)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def measure(
    session: runner.Session, trainer: Trainer, steps: int
) -> tuple[list[Phase], float, tuple[int, int, int]]:
    """Phases of a step, operations a second of the matrix product, and its shape [m, k, n]."""
    device = session.accelerator.device
    shape = feed_forward_shape(session)
    dtype = DTYPES[session.config.backend.config.model.dtype]  # type: ignore[attr-defined]
    trainer.step()  # warm-up; also the only step that replays a rollout first
    rollout_flops = count_flops(lambda: _roll_out(session))
    update_flops = count_flops(trainer.step) - rollout_flops
    rows, alone, rates = [], [], []
    for _ in range(steps):
        rows.append(trainer.step())
        rates.append(matmul_rate(shape, dtype, device))
        alone.append(seconds(lambda: _roll_out(session), device))
        rates.append(matmul_rate(shape, dtype, device))

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    phases = [
        Phase(name="rollout alone", seconds=statistics.median(alone), flops=rollout_flops),
        Phase(name="rollout, rewards beside it", seconds=median("time/rollout")),
        Phase(name="waiting for rewards", seconds=median("time/reward")),
        Phase(name="reward calls, in their threads", seconds=median("time/reward_calls")),
        Phase(name="update", seconds=median("time/update"), flops=update_flops),
        Phase(name="whole step", seconds=median("step_time"), flops=rollout_flops + update_flops),
    ]
    return phases, statistics.median(rates), shape


def feed_forward_shape(session: runner.Session) -> tuple[int, int, int]:
    """[m, k, n] of the first feed-forward product of an update: image tokens, width, 4 width."""
    network: Any = session.accelerator.unwrap_model(session.backend.model)
    _, height, width = session.backend._shape  # type: ignore[attr-defined]
    tokens = height * width // network.config.patch_size**2
    rows = session.config.training.micro_batch_size
    return rows * tokens, network.inner_dim, 4 * network.inner_dim


def report(
    phases: Sequence[Phase],
    rate: float,
    shape: tuple[int, int, int],
    options: argparse.Namespace,
    about: dict[str, Any],
) -> str:
    """The whole result in markdown."""
    changes = f" with {' '.join(options.overrides)}" if options.overrides else ""
    m, k, n = shape
    return "\n\n".join(
        [
            f"# One training step of {options.config}{changes}",
            tables.markdown_table(
                ["phase", "median s", "GFLOP", "GFLOP/s", "share of the matmul rate"],
                [_row(phase, rate) for phase in phases],
            ),
            f"Matmul rate: {rate / 1e9:.0f} GFLOP/s for [{m}, {k}] @ [{k}, {n}] in the dtype of "
            f"the run, measured between the steps. {options.steps} steps after a warm-up; "
            "operations counted by torch.utils.flop_counter.",
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def _row(phase: Phase, rate: float) -> list[str]:
    achieved = phase.flops and phase.flops / phase.seconds
    return [
        phase.name,
        tables.cell(phase.seconds, ".3f"),
        tables.cell(phase.flops and phase.flops / 1e9, ".1f"),
        tables.cell(achieved and achieved / 1e9, ".0f"),
        tables.cell(achieved and achieved / rate, ".2f"),
    ]


def _roll_out(session: runner.Session) -> None:
    training = session.config.training
    prompts = list(session.training_prompts)
    prompts = (prompts * training.prompts_per_step)[: training.prompts_per_step]
    requests = make_requests(prompts, training.group_size, session.config.seed, 0)
    list(session.backend.rollout(requests))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.awm_step")
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/quickstart.yaml"))
    add("--steps", type=int, default=5, help="measured steps")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    add("overrides", nargs="*", help="a.b=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
