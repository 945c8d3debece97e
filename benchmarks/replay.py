"""What does folding the trained steps into one forward save, and what does a sample keep?

    python -m benchmarks.replay [--samples 3 8 48] [--rounds 7] [a.b=value ...]

Flow-GRPO's update asks the network about every trained step of a sample.  *Folded*: all steps of B
samples in one forward and one backward.  *Step by step*: one forward and backward of B samples for
each step, gradients accumulated, as flow_grpo's trainer does.  Both are this project's backend and
objective on the same collated samples; log-probabilities and gradients are compared in float32
before anything is timed.  Then: bytes of a sample between rollout and update.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.rates import seconds
from diffusion.backend import DiffusionBackend, build
from mmrl import config as configuration
from mmrl.config import RunConfig
from mmrl.prompts.dataset import load_prompts
from mmrl.rollouts import make_requests
from mmrl.types import Prompt, RolloutGroup, UpdateBatch

LOGP_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
"""Largest difference in float32: absolute of a logp (of order 1), relative of the gradient."""

GUIDANCES = (1.0, 4.5)
DTYPES = ("fp32", "bf16")
AWM = "configs/quickstart.yaml"


@dataclass(frozen=True, kw_only=True)
class Work:
    """An update on ``samples`` samples: ``folded``, one batch; ``steps``, one for each decision."""

    samples: int
    folded: UpdateBatch
    steps: Sequence[UpdateBatch]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Folded against step by step.

    ``logp_gap``: largest absolute difference; ``gradient_gap``: of the gradients, over the norm of
    that of the second.  Times are medians over rounds; ``ratio``: step by step over folded, the
    median of the rounds' ratios, with their extremes.
    """

    dtype: str
    guidance: float
    samples: int
    rows: int
    logp_gap: float
    gradient_gap: float
    folded_seconds: float
    steps_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of one ``state``, of one sample's ``text`` and of its ``negative`` embeddings."""

    name: str
    num_steps: int
    state: int
    text: int
    negative: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, time, count bytes, print, write."""
    options = _parser().parse_args(arguments)
    prompts = load_prompts(load(options, ()).prompts.source, "prompts.source")
    prompts = prompts[: -(-max(options.samples) // options.group_size)]
    loads = [os.getloadavg()[0]]
    found = [
        comparison
        for dtype in DTYPES
        for guidance in GUIDANCES
        for comparison in compare(options, prompts, dtype, guidance)
    ]
    loads.append(os.getloadavg()[0])
    held = measured_bytes(options, prompts)
    shapes = [measured_sizes(options, prompts), sd35_sizes(205), sd35_sizes(333)]
    about = tables.machine() | {"threads": torch.get_num_threads(), "load": loads}
    markdown = report(found, held, shapes, options, about)
    data = {
        "machine": about,
        "config": str(options.config),
        "overrides": options.overrides,
        "update": [asdict(comparison) for comparison in found],
        "measured_bytes": held,
        "sizes": [asdict(sizes) | held_bytes(sizes, options.group_size) for sizes in shapes],
    }
    path = tables.write_results(options.out, "replay", markdown, data)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def load(options: argparse.Namespace, extra: Sequence[str]) -> RunConfig:
    """The configuration with the overrides of the command line and ``extra`` ones."""
    return configuration.load(options.config, [*options.overrides, *extra])


def open_backend(run: RunConfig, prompts: Sequence[Prompt]) -> DiffusionBackend:
    """The diffusion backend of a run on the accelerator, if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config: Any = run.backend.config
    return build(config, device=device, prompts=prompts, seed=0, needs=frozenset({"logp"}))


# Speed


def compare(
    options: argparse.Namespace, prompts: Sequence[Prompt], dtype: str, guidance: float
) -> list[Comparison]:
    """One line for each number of samples; ``SystemExit`` if float32 results differ."""
    run = load(options, [f"backend.model.dtype={dtype}", f"backend.rollout.guidance={guidance}"])
    backend = open_backend(run, prompts)
    found = []
    for samples in options.samples:
        work = make_work(backend, prompts, samples, options.group_size)
        gaps = differences(backend, run, work)
        if dtype == "fp32" and not (gaps[0] <= LOGP_TOLERANCE and gaps[1] <= GRADIENT_TOLERANCE):
            raise SystemExit(f"the two forms differ for {samples} samples: {gaps}")
        found.append(
            timed(backend, run, work, options.rounds, dtype=dtype, guidance=guidance, gaps=gaps)
        )
        print(found[-1], flush=True)
    return found


def make_work(
    backend: DiffusionBackend, prompts: Sequence[Prompt], samples: int, group_size: int
) -> Work:
    """Samples of a rollout with fixed random advantages, collated in both forms."""
    groups = roll_out(backend, prompts, samples, group_size)
    rows = [(group, i) for group in groups for i in range(len(group.outputs))][:samples]
    count = backend.config.num_decisions
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(samples, dtype=torch.float64, generator=generator)

    def collated(decisions: slice) -> UpdateBatch:
        payload, mask = backend.collate(rows, decisions)
        return UpdateBatch(
            payload=payload,
            mask=mask,
            advantages=advantages,
            weights=torch.ones(samples, dtype=torch.float64),
        )

    return Work(
        samples=samples,
        folded=_on_device(collated(slice(0, count)), backend),
        steps=[_on_device(collated(slice(k, k + 1)), backend) for k in range(count)],
    )


def roll_out(
    backend: DiffusionBackend, prompts: Sequence[Prompt], samples: int, group_size: int
) -> list[RolloutGroup]:
    """At least ``samples`` samples, in groups."""
    chosen = prompts[: -(-samples // group_size)]
    return list(backend.rollout(make_requests(chosen, group_size, 0, 0)))


def update(backend: DiffusionBackend, run: RunConfig, batches: Sequence[UpdateBatch]) -> Tensor:
    """Forward and backward of each batch into ``.grad``; their logp [B, K], detached."""
    objective, scored = run.objective, []
    needs = frozenset({"logp"}) | objective.module.needs(objective.config)
    count = sum(batch.mask.numel() for batch in batches)
    for batch in batches:
        terms = backend.evaluate(batch, needs)
        (objective.module.loss(terms, batch, objective.config).loss.sum() / count).backward()
        scored.append(terms.logp.detach())
    return torch.cat(scored, dim=1)


def differences(backend: DiffusionBackend, run: RunConfig, work: Work) -> tuple[float, float]:
    """``logp_gap`` and ``gradient_gap`` of ``Comparison``."""
    parameters = [p for p in backend.model.parameters() if p.requires_grad]

    def outputs(batches: Sequence[UpdateBatch]) -> tuple[Tensor, Tensor]:
        backend.model.zero_grad()
        logp = update(backend, run, batches)
        return logp, torch.cat(
            [p.grad.double().flatten() for p in parameters if p.grad is not None]
        )

    (logp, gradient), (logp_steps, gradient_steps) = outputs([work.folded]), outputs(work.steps)
    gap = (gradient - gradient_steps).norm() / gradient_steps.norm()
    return float((logp - logp_steps).abs().max()), float(gap)


def timed(
    backend: DiffusionBackend,
    run: RunConfig,
    work: Work,
    rounds: int,
    *,
    dtype: str,
    guidance: float,
    gaps: tuple[float, float],
) -> Comparison:
    """Both forms by turns, the order swapped every round, so that other load hits both."""
    forms = {"folded": [work.folded], "steps": work.steps}
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds):
        for name in sorted(forms, reverse=number % 2 == 1):
            backend.model.zero_grad()
            taken[name].append(seconds(_calling(backend, run, forms[name]), backend._device))
    pairs = zip(taken["steps"], taken["folded"], strict=True)
    ratios = [steps / folded for steps, folded in pairs]
    return Comparison(
        dtype=dtype,
        guidance=guidance,
        samples=work.samples,
        rows=work.folded.mask.numel() * (1 if guidance == 1.0 else 2),
        logp_gap=gaps[0],
        gradient_gap=gaps[1],
        folded_seconds=statistics.median(taken["folded"]),
        steps_seconds=statistics.median(taken["steps"]),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )


def _calling(
    backend: DiffusionBackend, run: RunConfig, batches: Sequence[UpdateBatch]
) -> Callable[[], Tensor]:
    return lambda: update(backend, run, batches)


def _on_device(batch: UpdateBatch, backend: DiffusionBackend) -> UpdateBatch:
    """With mask, advantages and weights where the trainer puts them."""
    names = ("mask", "advantages", "weights")
    return replace(batch, **{name: getattr(batch, name).to(backend._device) for name in names})


# Bytes


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Memory that the tensors keep alive: whole storages, each counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None
    }
    return sum(storage.nbytes() for storage in storages.values())


def measured_bytes(options: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Bytes for each sample of real groups: states and scores, and a share of the embeddings."""
    window = "backend.likelihood.steps={select: window, size: 3}"
    runs = {
        "all steps": load(options, ()),
        "window of 3": load(options, [window]),
        "AWM": configuration.load(Path(AWM), []),
    }
    return {name: _measured(open_backend(run, prompts), prompts) for name, run in runs.items()}


def _measured(backend: DiffusionBackend, prompts: Sequence[Prompt]) -> float:
    group = next(iter(backend.rollout(make_requests(prompts[:1], 8, 0, 0))))
    payload = group.payload
    paths = payload if isinstance(payload, tuple) else [payload]
    tensors = [t for path in paths for t in vars(path).values()]
    return storage_bytes([*tensors, group.logp_old, *_embeddings(backend, prompts[0])]) / 8


def _embeddings(backend: DiffusionBackend, prompt: Prompt) -> list[Tensor | None]:
    condition = backend._conditions[prompt.id]
    return [condition.text, condition.pooled]


def measured_sizes(options: argparse.Namespace, prompts: Sequence[Prompt]) -> Sizes:
    """Sizes of the model in the configuration, from its tensors."""
    run = load(options, ["backend.rollout.guidance=4.5"])
    backend = open_backend(run, prompts[:1])
    shape, steps = backend._shape, backend.config.rollout.num_steps
    text = storage_bytes(_embeddings(backend, prompts[0]))
    empty = backend._conditions[""]
    return Sizes(
        name=Path(backend.config.model.path).name,
        num_steps=steps,
        state=torch.zeros(shape).nbytes,
        text=text,
        negative=storage_bytes([empty.text, empty.pooled]),
    )


def sd35_sizes(tokens: int) -> Sizes:
    """SD3.5-M at 512 px, 10 steps: float32 latents, float16 embeddings of ``tokens`` tokens.

    77 of them are CLIP's; flow_grpo asks T5 for 128, diffusers' default is 256.
    """
    with torch.device("meta"):
        state = torch.empty(16, 64, 64, dtype=torch.float32).nbytes
        text = torch.empty(tokens, 4096, dtype=torch.float16).nbytes
        pooled = torch.empty(2048, dtype=torch.float16).nbytes
    return Sizes(
        name=f"SD3.5-M, 512 px, {tokens} tokens",
        num_steps=10,
        state=state,
        text=text + pooled,
        negative=text + pooled,
    )


def held_bytes(sizes: Sizes, group_size: int) -> dict[str, float]:
    """Bytes of a sample by form; small index tensors are left out, logp (float64) counts.

    Ours: the states before and after the trained steps, one of them fewer than ``num_steps``, and
    its group's share of one copy of the embeddings.
    """
    steps, state = sizes.num_steps, sizes.state
    shared, trained = sizes.text / group_size, steps - 1
    return {
        "all steps": (trained + 1) * state + 8 * trained + shared,
        "window of 3": 4 * state + 8 * 3 + shared,
        "AWM": state + shared,
        "T+1 states, own embeddings": (steps + 1) * state + 8 * steps + sizes.text,
        "T+1 states, own embeddings and negative ones": (steps + 1) * state
        + 8 * steps
        + sizes.text
        + sizes.negative,
        "2T states, own embeddings": 2 * steps * state + 8 * steps + sizes.text,
    }


# Report


def report(
    found: Sequence[Comparison],
    held: dict[str, float],
    shapes: Sequence[Sizes],
    options: argparse.Namespace,
    about: dict[str, Any],
) -> str:
    """The whole result in markdown."""
    loads = " and ".join(f"{load:.1f}" for load in about["load"])
    changes = f" with {' '.join(options.overrides)}" if options.overrides else ""
    return "\n\n".join(
        [
            f"# Folded replay of {options.config}{changes}",
            "Forward and backward of one update on the same samples: all steps in one batch "
            "(folded), or one batch for each step with gradients accumulated.",
            speed_table(found),
            "rows: of the network's batch when folded; guidance other than 1 doubles them. ratio: "
            f"step by step over folded, median of {options.rounds} rounds taken by turns (min to "
            "max). The gaps are the largest difference of a logp and the norm of the difference of "
            "the gradients over their norm; float32 was refused above "
            f"{LOGP_TOLERANCE:g} and {GRADIENT_TOLERANCE:g}. Threads: {about['threads']}. Load "
            f"average of the machine before and after: {loads}.",
            "## Bytes of a sample between rollout and update",
            byte_table(shapes, options.group_size),
            "Embeddings in the first three rows are held once for a prompt and shared by its "
            f"{options.group_size} samples. `2T states`: `latents` and `next_latents` as flow_grpo "
            "holds them once its batches are concatenated; it keeps one copy of the negative "
            "embeddings. Whole storages of the first model's groups, indices and all, in groups of "
            "8: " + ", ".join(f"{name} {value:.0f}" for name, value in held.items()) + " bytes.",
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def speed_table(found: Sequence[Comparison]) -> str:
    """One line for each comparison."""
    header = ["dtype", "guidance", "samples", "rows", "folded s", "step by step s", "ratio",
              "logp gap", "gradient gap"]  # fmt: skip
    return tables.markdown_table(
        header,
        [
            [
                c.dtype,
                f"{c.guidance:g}",
                str(c.samples),
                str(c.rows),
                f"{c.folded_seconds:.3f}",
                f"{c.steps_seconds:.3f}",
                f"{c.ratio:.2f} ({c.ratio_low:.2f} to {c.ratio_high:.2f})",
                f"{c.logp_gap:.1e}",
                f"{c.gradient_gap:.1e}",
            ]
            for c in found
        ],
    )


def byte_table(shapes: Sequence[Sizes], group_size: int) -> str:
    """One line for each form, one column for each model, with multiples of our "all steps"."""
    columns = [held_bytes(sizes, group_size) for sizes in shapes]
    rows = [
        [form, *(f"{c[form] / 1024:.1f} ({c[form] / c['all steps']:.2f})" for c in columns)]
        for form in columns[0]
    ]
    return tables.markdown_table(["KiB (times all steps)", *(s.name for s in shapes)], rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay")
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/diffusion/tiny-sd3/flow-grpo.yaml"))
    add("--samples", type=int, nargs="+", default=[3, 8, 48], help="samples of one forward")
    add("--rounds", type=int, default=7, help="timed repetitions of each form")
    add("--group-size", type=int, default=8, help="samples of a prompt")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    add("overrides", nargs="*", help="a.b=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
