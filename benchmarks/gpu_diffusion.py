"""Speed, memory and share of peak of AWM, Flow-GRPO and DiffusionOPD on networks of full size.

    python -m benchmarks.gpu_diffusion [--models sd35 flux] [--methods awm flow-grpo opd]
        [--attention sdpa xformers flash] [--compile-backend none]

The weights are random, so no download is needed; everything else is the shipped recipe in bf16 and
the backend that trains.  Text encoders and autoencoder are left out.  MFU counts the operations of
forwards and backwards without recomputation (PaLM, Chowdhery et al. 2022, arXiv:2204.02311,
appendix B) over the dense bf16 peak of the data sheet; the rate of a large matrix product, measured
here, is the floor that can be reached.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.gpu_models import (
    METHODS,
    SIZES,
    TOYS,
    Size,
    Variant,
    adapted_family,
    build_backend,
    load_recipe,
    random_condition,
    requests_for,
    tokens_of,
)
from benchmarks.rates import (
    count_flops,
    matmul_rate,
    peak_rate,
    timed,
    within_memory,
    working,
)
from diffusion.attention import available_backends
from diffusion.backend import DiffusionBackend
from diffusion.config import Config, FlowMatchingConfig
from diffusion.decisions import OTHER_POLICIES
from diffusion.models.base import Condition
from mmrl.adapters import adapters_off
from mmrl.config import RunConfig
from mmrl.errors import UserError
from mmrl.needs import needs_of
from mmrl.preflight import micro_batch_shape
from mmrl.replay import ANCHORED
from mmrl.types import RolloutGroup, UpdateBatch


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds for each image, peak bytes (``None`` without CUDA); ``failed``: why there is none.

    ``norm``: mean v^2 of the policy over the first update.  Variants of one training differ in it
    by rounding alone.
    """

    variant: Variant
    rollout: float | None = None
    update: float | None = None
    peak: int | None = None
    norm: float | None = None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations for each image, and how many decisions of it are trained."""

    rollout: float
    update: float
    decisions: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method on a model, and what was measured."""

    model: str
    method: str
    size: Size
    run: RunConfig
    work: Work
    floor: float
    measured: list[Measured]

    @property
    def images(self) -> tuple[int, int]:
        """Of the rollout, and of the optimizer step."""
        return rollout_images(self.run), update_images(self.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every variant, print, write; 2 if the device is missing or a name is wrong."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --tiny --device cpu runs the same code at toy size")
        return 2
    if device.type == "cpu" and not options.tiny:
        print("--device cpu needs --tiny: the full size would take hours on a CPU")
        return 2
    try:
        compiled = None if options.compile_backend == "none" else options.compile_backend
        kernels = working(options.attention, available_backends(device))
        variants = all_variants(kernels, compiled)
    except UserError as error:
        print(error)
        return 2
    chosen = product(options.models, options.methods)
    cases = [measure_case(*pair, variants, device, options) for pair in chosen]
    about = tables.machine()
    markdown = report(cases, options, about)
    path = tables.write_results(
        options.out, "gpu-diffusion", markdown, as_data(cases, options, about)
    )
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def all_variants(attention: Sequence[str], compile_backend: str | None) -> list[Variant]:
    """Every attention kernel, with and without checkpointing and (if given) compilation."""
    backends = [None] if compile_backend is None else [None, compile_backend]
    return [
        Variant(attention=name, checkpointing=checkpointing, compile_backend=backend)
        for name, checkpointing, backend in product(attention, (False, True), backends)
    ]


# Measuring


def measure_case(
    model: str,
    method: str,
    variants: Sequence[Variant],
    device: torch.device,
    options: argparse.Namespace,
) -> Case:
    """A method on a model in every variant; prints each as it is done."""
    size = (TOYS if options.tiny else SIZES)[model]
    given = options.rollout_images, options.micro_batch
    work, measured = count_work(size, method), []
    for variant in variants:
        run = load_recipe(size, method, variant, *given)
        measured.append(try_variant(run, variant, size, device, options.repeats))
        print(" | ".join([model, method, *_row(measured[-1], work)]), flush=True)
    return Case(
        model=model,
        method=method,
        size=size,
        run=load_recipe(size, method, variants[0], *given),
        work=work,
        floor=matmul_rate(size.matmul, torch.bfloat16, device),
        measured=measured,
    )


def try_variant(
    run: RunConfig, variant: Variant, size: Size, device: torch.device, repeats: int
) -> Measured:
    """Measure one variant; running out of memory is a result, not an error."""
    found = within_memory(lambda: measure(run, variant, size, device, repeats), device)
    return found or Measured(variant=variant, failed="out of memory")


def measure(
    run: RunConfig, variant: Variant, size: Size, device: torch.device, repeats: int
) -> Measured:
    """Medians over ``repeats`` after one warm-up: a forward of rollouts, and an optimizer step."""
    drawn, trained = rollout_images(run), update_images(run)
    backend = build_backend(run, size, variant, device, drawn)
    parameters = [p for p in backend.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.optimizer.learning_rate)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rollouts, updates, norms = [], [], []
    for step in range(repeats + 1):
        requests = requests_for(run, drawn, step)
        groups, time = timed(lambda r=requests: list(backend.rollout(r)), device)
        rollouts.append(time)
        batches = update_batches(run, backend, groups, trained, device)
        norm, time = timed(lambda b=batches: update(run, backend, optimizer, b), device)
        updates.append(time)
        norms.append(norm)
    return Measured(
        variant=variant,
        rollout=statistics.median(rollouts[1:]) / drawn,
        update=statistics.median(updates[1:]) / trained,
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        norm=norms[0],
    )


def rollout_images(run: RunConfig) -> int:
    """Images of the rollout that is measured: of a forward, and one for each teacher."""
    config: Config = run.backend.config  # type: ignore[assignment]
    return max(config.rollout.batch_size, len(config.teachers))


def update_images(run: RunConfig) -> int:
    """Images of the optimizer step that is measured: of a micro-batch, and one for each teacher."""
    config: Config = run.backend.config  # type: ignore[assignment]
    shape = micro_batch_shape(config.num_decisions, run.training.micro_batch_size)
    return max(shape.samples, len(config.teachers))


def update_batches(
    run: RunConfig,
    backend: DiffusionBackend,
    groups: Sequence[RolloutGroup],
    images: int,
    device: torch.device,
) -> list[UpdateBatch]:
    """The micro-batches of ``images`` samples of the groups, which are repeated if too few."""
    shape = micro_batch_shape(backend.config.num_decisions, run.training.micro_batch_size)
    drawn = [(group, i) for group in groups for i in range(len(group.outputs))]
    rows = [drawn[i % len(drawn)] for i in range(images)]
    chunks = [rows[i : i + shape.samples] for i in range(0, images, shape.samples)]
    return [
        update_batch(backend, chunk, decisions, device)
        for chunk, decisions in product(chunks, shape.decisions)
    ]


def update_batch(
    backend: DiffusionBackend,
    rows: Sequence[tuple[RolloutGroup, int]],
    decisions: slice,
    device: torch.device,
) -> UpdateBatch:
    """Some decisions of some samples, with advantages of alternating sign."""
    payload, mask = backend.collate(rows, decisions)
    signs = [1.0 - 2.0 * (i % 2) for i in range(len(rows))]
    return UpdateBatch(
        payload=payload,
        mask=mask.to(device),
        advantages=torch.tensor(signs, dtype=torch.float64, device=device),
        weights=torch.ones(len(rows), dtype=torch.float64, device=device),
    )


def update(
    run: RunConfig,
    backend: DiffusionBackend,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[UpdateBatch],
) -> float:
    """One optimizer step over ``batches``; mean v^2 of the policy."""
    needs = needs_of(run)
    if is_anchored(run):
        batches = [anchored(backend, batch, needs) for batch in batches]
    total = sum(int(batch.mask.sum()) for batch in batches)
    tallies = []
    for batch in batches:
        terms = backend.evaluate(batch, needs)
        loss = run.objective.module.loss(terms, batch, run.objective.config).loss.sum()
        for part in run.regularisers:
            penalty = part.module.loss(terms, batch, part.config).loss.sum()
            loss = loss + part.config.coef * penalty  # type: ignore[attr-defined]
        (loss / total).backward()
        tallies.append(terms.metrics["velocity_norm"])
    optimizer.step()
    optimizer.zero_grad()
    return sum(value for value, _ in tallies) / sum(count for _, count in tallies)


def is_anchored(run: RunConfig) -> bool:
    """Whether the trainer asks the sampling policy again: in half precision, for two updates."""
    several = run.training.num_epochs * run.training.updates_per_epoch > 1
    return several and bool(run.objective.module.needs(run.objective.config) & ANCHORED)


def anchored(backend: DiffusionBackend, batch: UpdateBatch, needs: frozenset[str]) -> UpdateBatch:
    """``batch`` with the log-probabilities that its update starts from."""
    anchors = backend.anchor(batch, needs)
    return replace(
        batch,
        logp_old=torch.stack([anchor.logp for anchor in anchors]),
        memory=[anchor.memory for anchor in anchors],
    )


# Counting


def count_work(size: Size, method: str) -> Work:
    """Operations for each image, counted on forwards and a backward of shapes alone.

    The dtype does not change their number, so it is float32 without autocast.
    """
    run = load_recipe(size, method, Variant(dtype="fp32"))
    config: Config = run.backend.config  # type: ignore[assignment]
    sampling, reference, training = count_row(size, config)
    plain = isinstance(config.likelihood, FlowMatchingConfig)  # trains the model without guidance
    asked = rows_asked(size, 1.0 if plain else config.rollout.guidance)
    policies = {OTHER_POLICIES[name] for name in needs_of(run) & OTHER_POLICIES.keys()}
    decision = asked * (training + is_anchored(run) * sampling)
    decision += asked * (("reference" in policies) * reference + ("ema" in policies) * sampling)
    if "teacher" in policies:
        decision += sampling * statistics.fmean(
            rows_asked(size, teacher.guidance) for teacher in config.teachers
        )
    drawn = config.rollout.num_steps * rows_asked(size, config.rollout.guidance) * sampling
    return Work(
        rollout=drawn,
        update=config.num_decisions * decision,
        decisions=config.num_decisions,
    )


def count_row(size: Size, config: Config) -> tuple[int, int, int]:
    """Operations for one image at one level: forwards with and without the adapter, and a forward
    and backward.
    """
    meta = torch.device("meta")
    family = adapted_family(size, config, torch.float32, meta)
    network: Any = family.transformer
    row = torch.empty(1, *family.latent_shape(size.pixels, size.pixels), device=meta)
    condition = Condition.stack([random_condition(size, config, network, torch.float32)], meta)

    def forward() -> Tensor:
        return family.velocity(network, row, torch.ones(1, device=meta), condition, 1.0)

    with torch.no_grad():
        sampling = count_flops(forward)
        with adapters_off(network):
            reference = count_flops(forward)
    return sampling, reference, count_flops(lambda: forward().sum().backward())


def rows_asked(size: Size, guidance: float) -> int:
    """Forwards of one row: two under guidance, unless it is an input of the network."""
    return 2 if guidance != 1.0 and not size.network.get("guidance_embeds", False) else 1


# Report


def report(cases: Sequence[Case], options: argparse.Namespace, about: dict[str, Any]) -> str:
    """The whole result in markdown."""
    peak = peak_rate(about["accelerator"])
    named = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown here, so no MFU"
    toy = " (toy size: the numbers mean nothing)" if options.tiny else ""
    return "\n\n".join(
        [
            f"# Training of random networks of full size{toy}",
            *(text for case in cases for text in _section(case, peak)),
            f"bf16; medians of {options.repeats} after a warm-up. An update is an optimizer step "
            "in the recipe's micro-batches, with the pass that anchors its ratios where the "
            "trainer makes one. mean v^2: of the policy in the first update, to be compared down "
            "a column. Operations are counted without recomputation. Data-sheet peak: "
            f"{named}.",
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def _section(case: Case, peak: float | None) -> list[str]:
    """Heading, table and conditions of a case."""
    config: Config = case.run.backend.config  # type: ignore[assignment]
    header = ["attention, checkpointing, compiled", "rollout s/image", "update s/image",
              "decisions/s", "peak GiB", "mean v^2", "rollout MFU", "update MFU",
              "rollout / matmul", "update / matmul"]  # fmt: skip
    rows = [
        [*_row(m, case.work), *_shares(m, case.work, peak), *_shares(m, case.work, case.floor)]
        for m in case.measured
    ]
    drawn, trained = case.images
    source = case.size.recipes[case.method].path.relative_to(tables.ROOT)
    rollout, training = config.rollout, case.run.training
    return [
        f"## {case.method} on {case.model}, the size of {case.size.name}",
        tables.markdown_table(header, rows),
        f"Recipe {source}: {case.size.pixels} x {case.size.pixels} pixels, "
        f"{tokens_of(case.size, config)} text tokens, {rollout.num_steps} steps, guidance "
        f"{rollout.guidance:g}. Images of a rollout: {drawn}, in forwards of "
        f"{rollout.batch_size}; of an update: {trained}, of {case.work.decisions} decisions each, "
        f"in micro-batches of {training.micro_batch_size} decisions. Counted for each image: "
        f"rollout {case.work.rollout / 1e12:.4g} TFLOP, update {case.work.update / 1e12:.4g} "
        f"TFLOP. Matmul rate measured here: {case.floor / 1e12:.4g} TFLOP/s for "
        f"{' x '.join(map(str, case.size.matmul))}.",
    ]


def _row(m: Measured, work: Work) -> list[str]:
    v = m.variant
    checkpointing = "yes" if v.checkpointing else "no"
    name = f"{v.attention}, {checkpointing}, {v.compile_backend or 'no'}"
    if m.failed:
        return [name, m.failed, *[tables.ABSENT] * 4]
    return [
        name,
        tables.cell(m.rollout, ".4f"),
        tables.cell(m.update, ".4f"),
        tables.cell(m.update and work.decisions / m.update, ".1f"),
        tables.cell(m.peak and m.peak / 2**30, ".1f"),
        tables.cell(m.norm, ".4g"),
    ]


def _shares(m: Measured, work: Work, rate: float | None) -> list[str]:
    pairs = ((work.rollout, m.rollout), (work.update, m.update))
    return [
        tables.cell(flops / (time * rate) if time and rate else None, ".3f")
        for flops, time in pairs
    ]


def as_data(
    cases: Sequence[Case], options: argparse.Namespace, about: dict[str, Any]
) -> dict[str, Any]:
    """The whole result for the file of numbers."""
    return {
        "machine": about,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "peak_flops_per_second": peak_rate(about["accelerator"]),
        "cases": [
            {
                "model": case.model,
                "method": case.method,
                "per_image": vars(case.work),
                "images": dict(zip(("rollout", "update"), case.images, strict=True)),
                "matmul_flops_per_second": case.floor,
                "variants": [vars(m) | {"variant": vars(m.variant)} for m in case.measured],
            }
            for case in cases
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_diffusion")
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--models", nargs="+", default=["sd35"], choices=list(SIZES), help="sizes of network")
    add("--methods", nargs="+", default=["awm"], choices=METHODS, help="recipes to measure")
    add("--tiny", action="store_true", help="toy size, to try the script itself")
    add("--attention", nargs="+", help="kernels to measure; default: all that work here")
    add("--compile-backend", default="inductor", help="of torch.compile; none: do not compile")
    add("--rollout-images", type=int, help="images in a rollout forward; default: the recipe's")
    add("--micro-batch", type=int, help="decisions in a micro-batch; default: the recipe's")
    add("--repeats", type=int, default=3, help="measurements after one warm-up")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
