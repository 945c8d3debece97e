"""Speed, memory and share of peak of language models of full size, by attention kernel and layout.

    python -m benchmarks.gpu_language [--models qwen3-4b qwen2.5-vl-3b] [--tuning lora full]
        [--updates shared_prompt packed padded] [--attention sdpa flash xformers flex]

The weights and tokens are random, so no download is needed; everything else is the backend that
trains, in bf16.  A rollout samples groups of 8 side by side, none of which ends before its limit.
An update is an optimizer step of GRPO on completions of that length on average, from half to one
and a half times of it, in micro-batches of one group.

MFU counts what a layout has to do, without padding and recomputation, over the dense bf16 peak of
the data sheet (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B).  Of N weights in the
products of the blocks, T tokens (a shared prompt once, else once for each completion), P pairs of
a token and one it sees, and M completion tokens, a forward takes 2 N T + 4 H d layers P
operations and 2 D V M in the head; the backward of a product takes as many again for its inputs
and, where its weights are trained, for these.  The vision tower's attention is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import tables
from benchmarks.gpu_language_models import (
    SIZES,
    TOYS,
    Size,
    Variant,
    build_backend,
    make_requests,
    random_network,
    random_rows,
)
from benchmarks.rates import matmul_rate, peak_rate, timed, within_memory, working
from mmrl.adapters import ADAPTER
from mmrl.errors import UserError
from mmrl.objectives import grpo
from mmrl.text.backend import TextBackend
from mmrl.text.kernels import available_backends, segments
from mmrl.text.layout import Row, lay_out
from mmrl.types import UpdateBatch
from mmrl.weights import trainable

TUNING = ("lora", "full")
UPDATES = ("shared_prompt", "packed", "padded")
LOGP = frozenset({"logp"})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of an optimizer step, peak bytes (``None`` without CUDA); ``failed``: why there is
    none.

    ``logp``: mean log-probability over the first update, which variants of one training share up
    to rounding.  ``work``: operations of the step.
    """

    variant: Variant
    work: float
    seconds: float | None = None
    peak: int | None = None
    logp: float | None = None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to train a model, and what was measured.

    ``rollout``: completion tokens a second.  ``tokens``: those of completions in an update.
    """

    model: str
    tuning: str
    size: Size
    rollout: float | None
    tokens: int
    floor: float
    measured: list[Measured]


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
        kernels = working(options.attention, available_backends(device))
    except UserError as error:
        print(error)
        return 2
    chosen = product(options.models, options.tuning)
    cases = [measure_case(*pair, kernels, device, options) for pair in chosen]
    about = tables.machine()
    markdown = report(cases, options, about)
    path = tables.write_results(
        options.out, "gpu-language", markdown, as_data(cases, options, about)
    )
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def all_variants(tuning: str, updates: Sequence[str], kernels: Sequence[str]) -> list[Variant]:
    """Every layout with every kernel it takes, with and without checkpointing."""
    return [
        Variant(tuning=tuning, update=update, attention=name, checkpointing=checkpointing)
        for update, name, checkpointing in product(updates, kernels, (False, True))
        if update != "padded" or name == "sdpa"
    ]


# Measuring


def measure_case(
    model: str,
    tuning: str,
    kernels: Sequence[str],
    device: torch.device,
    options: argparse.Namespace,
) -> Case:
    """A way to train a model in every variant; prints each as it is done."""
    size = (TOYS if options.tiny else SIZES)[model]
    rows, measured = random_rows(size, options.groups), []
    for variant in all_variants(tuning, options.updates, kernels):
        empty = Measured(variant=variant, work=count_update(size, variant, rows))
        work = partial(measure_update, empty, size, rows, device, options.repeats)
        found = within_memory(work, device) or replace(empty, failed="out of memory")
        measured.append(found)
        print(" | ".join([model, tuning, *_row(found, _tokens(rows))]), flush=True)
    work = partial(measure_rollout, size, tuning, device, options)
    return Case(
        model=model,
        tuning=tuning,
        size=size,
        rollout=within_memory(work, device),
        tokens=_tokens(rows),
        floor=matmul_rate(size.matmul, torch.bfloat16, device),
        measured=measured,
    )


def measure_rollout(
    size: Size, tuning: str, device: torch.device, options: argparse.Namespace
) -> float:
    """Completion tokens a second, by the median of some rollouts after one warm-up."""
    backend = build_backend(size, Variant(tuning=tuning), device, options.groups)
    times = []
    for step in range(options.repeats + 1):
        requests = make_requests(size, options.groups, step)
        groups, time = timed(lambda r=requests: list(backend.rollout(r)), device)
        tokens = sum(len(s.ids) for group in groups for s in group.payload.samples)
        times.append(time / tokens)
    return 1 / statistics.median(times[1:])


def measure_update(
    empty: Measured, size: Size, rows: Sequence[Row], device: torch.device, repeats: int
) -> Measured:
    """Medians over ``repeats`` optimizer steps after one warm-up."""
    backend = build_backend(size, empty.variant, device)
    optimizer = torch.optim.AdamW(trainable(backend.model).values(), lr=1e-6)
    batches = update_batches(rows, size.group, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = [timed(lambda: update(backend, optimizer, batches), device) for _ in range(repeats + 1)]
    return replace(
        empty,
        seconds=statistics.median(time for _, time in found[1:]),
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        logp=found[0][0],
    )


def update_batches(rows: Sequence[Row], group: int, device: torch.device) -> list[UpdateBatch]:
    """A micro-batch for each group, with advantages of alternating sign."""
    return [
        _update_batch(rows[first : first + group], device) for first in range(0, len(rows), group)
    ]


def _update_batch(rows: Sequence[Row], device: torch.device) -> UpdateBatch:
    lengths = torch.tensor([len(row.completion) for row in rows], device=device)
    signs = [1.0 - 2.0 * (i % 2) for i in range(len(rows))]
    return UpdateBatch(
        payload=rows,
        mask=torch.arange(int(lengths.max()), device=device) < lengths[:, None],
        advantages=torch.tensor(signs, dtype=torch.float64, device=device),
        weights=torch.ones(len(rows), dtype=torch.float64, device=device),
    )


def update(
    backend: TextBackend, optimizer: torch.optim.Optimizer, batches: Sequence[UpdateBatch]
) -> float:
    """One optimizer step over ``batches``; mean log-probability of their tokens."""
    total = sum(int(batch.mask.sum()) for batch in batches)
    seen = 0.0
    for batch in batches:
        terms = backend.evaluate(batch, LOGP)
        assert terms.logp is not None
        (grpo.loss(terms, batch, grpo.Config()).loss.sum() / total).backward()
        seen += float((terms.logp.detach() * batch.mask).sum())
    optimizer.step()
    optimizer.zero_grad()
    return seen / total


# Counting


def count_update(size: Size, variant: Variant, rows: Sequence[Row]) -> float:
    """Operations of an optimizer step on ``rows``, as the module's docstring says."""
    network = random_network(size, variant, torch.device("meta"))
    text = network.config.get_text_config()
    layout = lay_out(rows, share_prompts=variant.update == "shared_prompt")
    tokens = layout.tokens.shape[1]
    block, adapter, tower = weights_in_products(network)
    full = variant.tuning == "full"
    head = text.hidden_size * text.vocab_size
    attention = 4 * text.num_attention_heads * size.head_width * text.num_hidden_layers
    return float(
        2 * (3 if full else 2) * (block * tokens + head * len(layout.targets))
        + 2 * 3 * adapter * tokens
        + 3 * attention * sum(pairs_of(rows, variant))
        + 2 * tower * len(layout.inputs.get("pixel_values", ()))
    )


def pairs_of(rows: Sequence[Row], variant: Variant) -> Iterator[int]:
    """Of each prompt and completion of a layout: pairs of a token and one that it sees."""
    for own, seen in segments(lay_out(rows, share_prompts=variant.update == "shared_prompt")):
        length, others = own.stop - own.start, sum(s.stop - s.start for s in seen[:-1])
        yield length * others + length * (length + 1) // 2


def weights_in_products(network: nn.Module) -> tuple[int, int, int]:
    """Of the language model's blocks, of adapters, and of the vision tower for each patch."""
    blocks = adapters = tower = 0
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            count = module.weight.numel()
            if "visual" in name:
                tower += count // 4 if "merger" in name else count  # it sees four as one
            elif ADAPTER in name.split("."):
                adapters += count
            else:
                blocks += count
    return blocks, adapters, tower


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.completion) for row in rows)


# Report


def report(cases: Sequence[Case], options: argparse.Namespace, about: dict[str, Any]) -> str:
    """The whole result in markdown."""
    peak = peak_rate(about["accelerator"])
    named = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown here, so no MFU"
    toy = " (toy size: the numbers mean nothing)" if options.tiny else ""
    return "\n\n".join(
        [
            f"# Language models of full size with random weights{toy}",
            *(text for case in cases for text in _section(case, options.groups, peak)),
            f"bf16; medians of {options.repeats} after a warm-up. tokens/s: of completions, in an "
            "optimizer step. mean logp: of the first update, to be compared down a column. MFU: "
            "operations that the layout needs, without padding and recomputation, so a shared "
            f"prompt counts once. Data-sheet peak: {named}.",
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def _section(case: Case, groups: int, peak: float | None) -> list[str]:
    """Heading, table and conditions of a case."""
    header = ["layout, attention, checkpointing", "update tokens/s", "update s", "peak GiB",
              "mean logp", "MFU", "of matmul"]  # fmt: skip
    rows = [[*_row(m, case.tokens), _share(m, peak), _share(m, case.floor)] for m in case.measured]
    size = case.size
    rate = tables.cell(case.rollout and round(case.rollout), ",")
    return [
        f"## {case.tuning} on {case.model}, the size of {size.name}",
        tables.markdown_table(header, rows),
        f"Rollout: {rate} tokens/s, {groups * size.group} completions of {size.completion} tokens "
        f"side by side. Update: {groups} prompts of {size.prompt} tokens with {size.group} "
        f"completions each, {case.tokens} tokens in all. Matmul rate measured here: "
        f"{case.floor / 1e12:.4g} TFLOP/s for {' x '.join(map(str, size.matmul))}.",
    ]


def _row(m: Measured, tokens: int) -> list[str]:
    v = m.variant
    name = f"{v.update}, {v.attention}, {'yes' if v.checkpointing else 'no'}"
    if m.failed:
        return [name, m.failed, *[tables.ABSENT] * 3]
    return [
        name,
        tables.cell(m.seconds and tokens / m.seconds, ",.0f"),
        tables.cell(m.seconds, ".3f"),
        tables.cell(m.peak and m.peak / 2**30, ".1f"),
        tables.cell(m.logp, ".4f"),
    ]


def _share(m: Measured, rate: float | None) -> str:
    return tables.cell(m.work / (m.seconds * rate) if m.seconds and rate else None, ".3f")


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
                "tuning": case.tuning,
                "rollout_tokens_per_second": case.rollout,
                "update_tokens": case.tokens,
                "matmul_flops_per_second": case.floor,
                "variants": [vars(m) | {"variant": vars(m.variant)} for m in case.measured],
            }
            for case in cases
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_language")
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--models", nargs="+", default=list(SIZES), choices=list(SIZES), help="sizes of network")
    add("--tuning", nargs="+", default=["lora"], choices=TUNING, help="what is trained")
    add("--updates", nargs="+", default=UPDATES, choices=UPDATES, help="layouts to measure")
    add("--tiny", action="store_true", help="toy size, to try the script itself")
    add("--attention", nargs="+", help="kernels to measure; default: all that work here")
    add("--groups", type=int, default=4, help="prompts in a rollout and in an optimizer step")
    add("--repeats", type=int, default=3, help="measurements after one warm-up")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
