"""Speed, memory and share of peak of AWM on a network of the size of Stable Diffusion 3.5 Medium.

    python -m benchmarks.gpu_sd35 [--attention sdpa xformers flash] [--compile-backend none]

The weights are random, so no download is needed; everything else is the shipped recipe
(configs/diffusion/sd35/awm-ocr.yaml) in bf16 and the backend that trains.  Text encoders and
autoencoder are left out.  MFU counts the operations of forward and backward without recomputation
(PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B) over the dense bf16 peak of the data
sheet; the rate of a large matrix product, measured here, is the floor that can be reached.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.rates import count_flops, matmul_rate, seconds
from diffusion.attention import apply_attention, available_backends, pick_attention
from diffusion.backend import DiffusionBackend
from diffusion.config import Config
from diffusion.lora import adapters_off, prepare_weights
from diffusion.models.base import Condition
from diffusion.models.sd3 import LORA_TARGETS, SD3, latent_shape
from mmrl import config as configuration
from mmrl.config import RunConfig
from mmrl.errors import UserError
from mmrl.schema import nearest
from mmrl.trainer import make_requests, needs_of
from mmrl.types import Prompt, RolloutGroup, UpdateBatch

RECIPE = tables.ROOT / "configs/diffusion/sd35/awm-ocr.yaml"
PIXELS_PER_LATENT = 8
PEAK_BF16 = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}
"""Dense bf16 operations a second of NVIDIA's data sheets, by part of the device name."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and its inputs: ``pixels`` a side, text ``tokens``, and the matmul of the floor."""

    network: dict[str, Any]
    pixels: int
    tokens: int
    matmul: tuple[int, int, int]
    overrides: list[str] = field(default_factory=list)


SHARED = {"patch_size": 2, "qk_norm": "rms_norm"}
MEDIUM = Size(
    network=SHARED
    | {
        "sample_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    pixels=512,
    tokens=333,
    matmul=(8192, 8192, 8192),
)
TOY = Size(
    network=SHARED
    | {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 1,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
    },
    pixels=64,
    tokens=7,
    matmul=(64, 64, 64),
    overrides=["backend.rollout.num_steps=4", "backend.likelihood.num_times=2",
               "backend.model.lora.rank=2"],
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the same training."""

    attention: str = "sdpa"
    checkpointing: bool = False
    compile_backend: str | None = None
    dtype: str = "bf16"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds for each image, peak bytes (``None`` without CUDA); ``failed``: why there is none."""

    variant: Variant
    rollout: float | None = None
    update: float | None = None
    peak: int | None = None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations for each image."""

    rollout: int
    update: int


class PipelinelessSD3(SD3):
    """The SD3 family with a randomly initialised transformer and nothing around it."""

    def __init__(self, transformer: Any, device: torch.device) -> None:
        self.transformer = transformer
        self.device = device

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """See ``SD3.latent_shape``."""
        return latent_shape(self.transformer.config, PIXELS_PER_LATENT, height, width)

    def shift(self, height: int | None, width: int | None) -> float | None:
        """None of its own."""
        return None

    def decode(self, latents: Tensor) -> list[Any]:
        """No pictures: one ``None`` each."""
        return [None] * len(latents)


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
    size = TOY if options.tiny else MEDIUM
    try:
        compiled = None if options.compile_backend == "none" else options.compile_backend
        variants = all_variants(_working(options.attention, device), compiled)
    except UserError as error:
        print(error)
        return 2
    measured = []
    for variant in variants:
        measured.append(try_variant(variant, size, device, options))
        print(" | ".join(_row(measured[-1])), flush=True)
    floor = matmul_rate(size.matmul, torch.bfloat16, device)
    about, work = tables.machine(), count_work(size)
    markdown = report(measured, work, floor, size, options, about)
    data = {
        "machine": about,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "flops_per_image": vars(work),
        "matmul_flops_per_second": floor,
        "peak_flops_per_second": peak_rate(about["accelerator"]),
        "variants": [vars(m) | {"variant": vars(m.variant)} for m in measured],
    }
    path = tables.write_results(options.out, "gpu-sd35", markdown, data)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


def all_variants(attention: Sequence[str], compile_backend: str | None) -> list[Variant]:
    """Every attention kernel, with and without checkpointing and (if given) compilation."""
    backends = [None] if compile_backend is None else [None, compile_backend]
    return [
        Variant(attention=name, checkpointing=checkpointing, compile_backend=backend)
        for name, checkpointing, backend in product(attention, (False, True), backends)
    ]


# Building


def load_recipe(size: Size, variant: Variant, images: int, micro_batch_size: int) -> RunConfig:
    """The shipped recipe at this size, ``micro_batch_size`` images in one forward."""
    times = configuration.load(RECIPE, size.overrides).backend.config.num_decisions  # type: ignore[attr-defined]
    return configuration.load(
        RECIPE,
        [
            f"backend.model.dtype={variant.dtype}",
            f"backend.model.gradient_checkpointing={str(variant.checkpointing).lower()}",
            f"backend.rollout.height={size.pixels}",
            f"backend.rollout.width={size.pixels}",
            f"backend.rollout.batch_size={images}",
            "training.prompts_per_step=1",
            f"training.group_size={images}",
            f"training.micro_batch_size={micro_batch_size * times}",
            *size.overrides,
        ],
    )


def random_transformer(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformer with seeded random weights."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(0)
        # The method of the base class: diffusers' own warns of every change of dtype.
        return torch.nn.Module.to(SD3Transformer2DModel(**size.network), device, dtype)


def build_backend(
    run: RunConfig, size: Size, variant: Variant, device: torch.device
) -> DiffusionBackend:
    """The training backend around a random transformer, for the prompt ``prompt()``."""
    config: Config = run.backend.config  # type: ignore[assignment]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[variant.dtype]
    transformer = random_transformer(size, dtype, device)
    prepare_weights(transformer, config.model, LORA_TARGETS, seed=0)
    apply_attention(transformer, variant.attention)
    if variant.compile_backend is not None:
        compile_blocks(transformer, variant.compile_backend)
    generator = torch.Generator().manual_seed(0)
    condition = Condition(
        text=torch.randn(1, size.tokens, transformer.config.joint_attention_dim,
                         generator=generator).to(dtype),
        pooled=torch.randn(1, transformer.config.pooled_projection_dim,
                           generator=generator).to(dtype),
    )  # fmt: skip
    return DiffusionBackend(
        config,
        PipelinelessSD3(transformer, device),
        {prompt().id: condition},
        needs=needs_of(run),
        attention=pick_attention(variant.attention, device, dtype),
    )


def compile_blocks(transformer: Any, backend: str) -> None:
    """Compile block by block: the blocks share their code, and whole-network graphs would break
    at every change of adapter and of gradient mode.
    """
    # Three kinds of blocks, each with and without gradient, adapter and recomputation.
    torch._dynamo.config.recompile_limit = 64
    for block in transformer.transformer_blocks:
        block.compile(backend=backend, dynamic=False)


def prompt() -> Prompt:
    """The only prompt; its embedding is random."""
    return Prompt(id="0", text="")


# Measuring


def try_variant(
    variant: Variant, size: Size, device: torch.device, options: argparse.Namespace
) -> Measured:
    """Measure one variant; running out of memory is a result, not an error."""
    try:
        return measure(
            variant, size, device, options.rollout_images, options.update_images, options.repeats
        )
    except torch.cuda.OutOfMemoryError:
        return Measured(variant=variant, failed="out of memory")
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    variant: Variant,
    size: Size,
    device: torch.device,
    rollout_images: int,
    update_images: int,
    repeats: int,
) -> Measured:
    """Medians over ``repeats`` after one warm-up; ``update_images`` is one micro-batch."""
    run = load_recipe(size, variant, rollout_images, update_images)
    backend = build_backend(run, size, variant, device)
    trained = [p for p in backend.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.optimizer.learning_rate)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rollouts, updates, groups = [], [], []
    for step in range(repeats + 1):
        requests = make_requests([prompt()], rollout_images, run.seed, step)
        rollouts.append(seconds(lambda r=requests: groups.extend(backend.rollout(r)), device))
        batch = update_batch(backend, groups[-1], update_images, device)
        updates.append(seconds(lambda b=batch: update(run, backend, optimizer, b), device))
    return Measured(
        variant=variant,
        rollout=statistics.median(rollouts[1:]) / rollout_images,
        update=statistics.median(updates[1:]) / update_images,
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def update_batch(
    backend: DiffusionBackend, group: RolloutGroup, images: int, device: torch.device
) -> UpdateBatch:
    """One micro-batch of ``images`` samples of a group (repeated if it is smaller), advantages
    of alternating sign.
    """
    size = len(group.outputs)
    payload, mask = backend.collate([(group, i % size) for i in range(images)])
    signs = [1.0 - 2.0 * (i % 2) for i in range(images)]
    return UpdateBatch(
        payload=payload,
        mask=mask.to(device),
        advantages=torch.tensor(signs, dtype=torch.float64, device=device),
        weights=torch.ones(images, dtype=torch.float64, device=device),
    )


def update(
    run: RunConfig,
    backend: DiffusionBackend,
    optimizer: torch.optim.Optimizer,
    batch: UpdateBatch,
) -> float:
    """Loss of the recipe's objective and regularisers, backward, one optimizer step."""
    terms = backend.evaluate(batch, needs_of(run))
    loss = run.objective.module.loss(terms, batch, run.objective.config).loss.mean()
    for part in run.regularisers:
        penalty = part.module.loss(terms, batch, part.config).loss.mean()
        loss = loss + part.config.coef * penalty  # type: ignore[attr-defined]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def count_work(size: Size) -> Work:
    """Operations for each image, counted on one forward and backward of shapes alone.

    The dtype does not change their number, so it is float32 without autocast.
    """
    run = load_recipe(size, Variant(), 1, 1)
    config: Config = run.backend.config  # type: ignore[assignment]
    meta = torch.device("meta")
    network = random_transformer(size, torch.float32, meta)
    prepare_weights(network, config.model, LORA_TARGETS, seed=0)
    family = PipelinelessSD3(network, meta)
    row = torch.empty(1, *family.latent_shape(size.pixels, size.pixels), device=meta)
    condition = Condition(
        text=torch.empty(1, size.tokens, network.config.joint_attention_dim, device=meta),
        pooled=torch.empty(1, network.config.pooled_projection_dim, device=meta),
    )

    def forward() -> Tensor:
        return family.velocity(network, row, torch.ones(1, device=meta), condition, 1.0)

    with torch.no_grad():
        sampling = count_flops(forward)
        with adapters_off(network):
            reference = count_flops(forward)
    training = count_flops(lambda: forward().sum().backward())
    others = {"velocity_gap_reference": reference, "velocity_gap_ema": sampling}
    extra = sum(flops for name, flops in others.items() if name in needs_of(run))
    return Work(
        rollout=config.rollout.num_steps * sampling,
        update=config.likelihood.num_times * (training + extra),
    )


def peak_rate(name: str | None) -> float | None:
    """Data-sheet peak of a device, if it is known here."""
    return next((rate for part, rate in PEAK_BF16.items() if name and part in name), None)


def _working(names: Sequence[str] | None, device: torch.device) -> list[str]:
    """Attention kernels to measure; ``UserError`` for a name that is none or does not run."""
    found = available_backends(device)
    known, works = [a.name for a in found], [a.name for a in found if a.works]
    for name in names or []:
        if name not in known:
            raise UserError(f"--attention {name!r}: {nearest(name, known)}")
        if name not in works:
            reason = next(a.reason for a in found if a.name == name)
            raise UserError(f"--attention {name!r} does not work here: {reason}")
    return list(names or works)


# Report


def report(
    measured: Sequence[Measured],
    work: Work,
    floor: float,
    size: Size,
    options: argparse.Namespace,
    about: dict[str, Any],
) -> str:
    """The whole result in markdown."""
    peak = peak_rate(about["accelerator"])
    header = ["attention, checkpointing, compiled", "rollout s/image", "update s/image", "peak GiB"]
    header += ["rollout MFU", "update MFU", "rollout / matmul", "update / matmul"]
    rows = [[*_row(m), *_shares(m, work, peak), *_shares(m, work, floor)] for m in measured]
    named = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown here, so no MFU"
    return "\n\n".join(
        [
            "# AWM on a random network of the size of SD3.5 Medium"
            + (" (toy size: the numbers mean nothing)" if options.tiny else ""),
            tables.markdown_table(header, rows),
            f"{size.pixels} x {size.pixels} pixels, {size.tokens} text tokens, bf16, recipe "
            f"{RECIPE.relative_to(tables.ROOT)}; {options.rollout_images} images in a rollout "
            f"forward, {options.update_images} in an update; medians of {options.repeats} after a "
            f"warm-up. Counted for each image: rollout {work.rollout / 1e12:.4g} TFLOP, update "
            f"{work.update / 1e12:.4g} TFLOP without recomputation. Data-sheet peak: {named}. "
            f"Matmul rate measured here: {floor / 1e12:.4g} TFLOP/s for "
            f"{' x '.join(map(str, size.matmul))}.",
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def _row(m: Measured) -> list[str]:
    v = m.variant
    checkpointing = "yes" if v.checkpointing else "no"
    name = f"{v.attention}, {checkpointing}, {v.compile_backend or 'no'}"
    if m.failed:
        return [name, m.failed, tables.ABSENT, tables.ABSENT]
    gib = m.peak and m.peak / 2**30
    return [
        name,
        tables.cell(m.rollout, ".4f"),
        tables.cell(m.update, ".4f"),
        tables.cell(gib, ".1f"),
    ]


def _shares(m: Measured, work: Work, rate: float | None) -> list[str]:
    pairs = ((work.rollout, m.rollout), (work.update, m.update))
    return [
        tables.cell(flops / (time * rate) if time and rate else None, ".3f")
        for flops, time in pairs
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_sd35")
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--tiny", action="store_true", help="toy size, to try the script itself")
    add("--attention", nargs="+", help="kernels to measure; default: all that work here")
    add("--compile-backend", default="inductor", help="of torch.compile; none: do not compile")
    add("--rollout-images", type=int, default=6, help="images in one rollout forward")
    add("--update-images", type=int, default=3, help="images in one micro-batch")
    add("--repeats", type=int, default=3, help="measurements after one warm-up")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
