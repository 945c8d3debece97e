"""Build the tiny SD3 pipeline that this repository ships, from nothing.

    python assets/build_tiny_sd3.py --out assets

The script renders the images of two tasks, small text signs (see textart.py) and scenes of flat
shapes (see shapes.py), trains an AutoencoderKL on them, then pre-trains an SD3Transformer2DModel
together with two small CLIP text encoders by flow matching, and writes a folder that
`StableDiffusion3Pipeline.from_pretrained` loads, the prompt files and a manifest.  Training stops
while the model still fails about half of the held-out prompts: it knows every glyph and shape, but
is neither a reliable writer nor a reliable composer, which leaves room for a reward to improve it.

Everything is drawn from --seed.  Floating-point sums differ between machines and library versions,
so a rebuild gives an equal pipeline, not the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.metadata
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTokenizer,
)

# The script is run by its path, which puts its folder on the import path but not the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import textart
from assets.composition_task import write_jsonl
from assets.tasks import TASKS, Task
from assets.tiny_models import (
    LATENT_CHANNELS,
    TEXT_LENGTH,
    build_models,
    save_pipeline,
    write_tokenizer,
)

VAE_STEPS = 1500
NUM_STEPS = 4500
BATCH = 128
LEARNING_RATE = 1.5e-3
EMA_DECAY = 0.998
SAMPLE_STEPS = 10
EVAL_SEEDS = (1000, 1001, 1002)
SOURCES = (
    "build_tiny_sd3",
    "tasks",
    "ocr_task",
    "composition_task",
    "textart",
    "shapes",
    "tiny_models",
)
PACKAGES = ("torch", "diffusers", "transformers", "rapidocr", "onnxruntime", "matplotlib")
# The text task came first, and readers of the manifest know its accuracy without a prefix.
ACCURACY_KEYS = {"ocr": "base_accuracy", "composition": "composition_base_accuracy"}
_STARTED = time.time()


def log(message: str) -> None:
    """Print one progress line with the seconds since the start."""
    print(f"[{time.time() - _STARTED:7.1f}s] {message}", flush=True)


def spent(begun: tuple[float, float]) -> dict:
    """Wall-clock and CPU seconds since `begun`, a pair of time.time() and time.process_time()."""
    wall, cpu = time.time() - begun[0], time.process_time() - begun[1]
    return {"wall_seconds": round(wall), "cpu_seconds": round(cpu)}


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks: returning them costs the VAE most of its time in faults."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        log("no glibc: memory settings left alone")


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Pool:
    """What stands in the pre-training images of all tasks.

    `owner` [N]: the image's place in `prompts`.  `weight` [N]: how often an image is drawn; the
    weights of each task have the same sum.
    """

    owner: torch.Tensor
    weight: torch.Tensor
    prompts: list[str]


def render_pools(tasks: Mapping[str, Task]) -> tuple[np.ndarray, Pool]:
    """Images (N, 32, 64, 3) of all tasks, one after the other, and what stands in them."""
    images, owners, weights, prompts = [], [], [], []
    for name, task in tasks.items():
        pictures, owner = task.pool()
        per_row = np.bincount(owner, minlength=len(task.pretraining))
        weight = (task.share / per_row)[owner]
        log(f"rendered {len(pictures)} images of {name}")
        images.append(pictures)
        owners.append(owner + len(prompts))
        weights.append(weight / weight.sum())
        prompts += [row["prompt"] for row in task.pretraining]
    owner, weight = (torch.from_numpy(np.concatenate(parts)) for parts in (owners, weights))
    return np.concatenate(images), Pool(owner, weight, prompts)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 HWC images as floats in [-1, 1], NCHW."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_images(tensor: torch.Tensor) -> np.ndarray:
    """Floats in [-1, 1], NCHW, as uint8 HWC images."""
    scaled = tensor.float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.byte().permute(0, 2, 3, 1).numpy()


def save_grid(images: np.ndarray, path: Path, columns: int = 12, scale: int = 2) -> None:
    """Write a contact sheet."""
    rows = [
        np.concatenate(list(images[i : i + columns]), 1)
        for i in range(0, len(images) - columns + 1, columns)
    ]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.NEAREST).save(path)


# ---------------------------------------------------------------- VAE


def train_vae(vae: AutoencoderKL, images: np.ndarray, steps: int, seed: int) -> None:
    """Fit the autoencoder: absolute and squared error, ink weighted up, small KL."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps))),
    )
    vae.train()
    for step in range(1, steps + 1):
        x = to_tensor(images[rng.integers(len(images), size=64)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.sample()
            # The transformer will never hit the latents exactly, so the decoder meets noise here.
            z = z + 0.1 * torch.randn_like(z)
            y = vae.decode(z).sample
        error = (y.float() - x).abs()
        ink = (x - x[:, :, :1, :1]).abs().amax(1, keepdim=True).gt(0.1).float()
        weight = 1 + 2 * F.max_pool2d(ink, 3, 1, 1)
        reconstruction = (weight * (error + error.square())).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction + 1e-3 * kl
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            log(f"vae {step}/{steps} reconstruction {reconstruction:.4f} kl {kl:.3f}")
    vae.eval()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Posterior means of all images, half precision."""
    parts = []
    for i in range(0, len(images), 256):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(to_tensor(images[i : i + 256])).latent_dist.mean.half())
    return torch.cat(parts)


# ---------------------------------------------------------------- flow matching


def encode_text(
    models: dict, ids: torch.Tensor, t5_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors of `StableDiffusion3Pipeline.encode_prompt` with T5 left out."""
    first = models["text_encoder"](ids, output_hidden_states=True)
    second = models["text_encoder_2"](ids, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    zeros = states.new_zeros(len(ids), t5_length, states.shape[-1])
    pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
    return torch.cat([states, zeros], dim=1), pooled


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Token numbers padded as the pipeline pads them; none is longer than the pipeline allows."""
    ids = tokenizer(list(prompts), padding="max_length", max_length=TEXT_LENGTH).input_ids
    return torch.tensor(ids)


@torch.no_grad()
def sample(models: dict, ids: torch.Tensor, seed: int) -> np.ndarray:
    """Euler samples without guidance, one image for each row of ids."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / SAMPLE_STEPS, SAMPLE_STEPS))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(ids), LATENT_CHANNELS, 8, 16, generator=generator)
    vae = models["vae"]
    with torch.autocast("cpu", torch.bfloat16):
        states, pooled = encode_text(models, ids, TEXT_LENGTH)
        for i, t in enumerate(scheduler.timesteps):
            v = models["transformer"](x, states, pooled, t.expand(len(ids)), return_dict=False)[0]
            x = x + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * v.float()
        images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
    return to_images(images)


def flow_batch(pool: Pool, latents, ids, empty, vae, size: int):
    """Clean latents, noise, mixtures, times in [0, 1] and token numbers of a training batch."""
    index = torch.multinomial(pool.weight, size, replacement=True)
    x0 = (latents[index].float() - vae.config.shift_factor) * vae.config.scaling_factor
    ids = ids[pool.owner[index]]
    ids[torch.rand(size) < 0.03] = empty
    u = (torch.arange(size) + torch.rand(size)) / size
    t = 3 * u / (1 + 2 * u)
    noise = torch.randn_like(x0)
    mix = t.view(-1, 1, 1, 1)
    return x0, noise, (1 - mix) * x0 + mix * noise, t, ids


def pretrain(models, latents, pool: Pool, tokenizer, tasks, args) -> list[dict]:
    """Flow matching with an average of the weights; returns the accuracy curve."""
    torch.manual_seed(args.seed)
    trained = [models[n] for n in ("transformer", "text_encoder", "text_encoder_2")]
    params = [p for m in trained for p in m.parameters()]
    optimiser = torch.optim.AdamW(
        params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    average = [p.detach().clone() for p in params]
    ids, empty = tokenise(tokenizer, pool.prompts), tokenise(tokenizer, [""])[0]
    curve, begun = [], (time.time(), time.process_time())
    running = 0.0
    for step in range(1, args.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1.0, step / 200)
        # The pipeline's default call appends 256 zero T5 tokens, a frugal one as many as CLIP's.
        # Meeting both keeps the model usable either way; long batches are smaller, for time.
        long = step % 20 == 0
        x0, noise, x, t, batch_ids = flow_batch(
            pool, latents, ids, empty, models["vae"], BATCH // 4 if long else BATCH
        )
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode_text(models, batch_ids, 256 if long else TEXT_LENGTH)
            v = models["transformer"](x, states, pooled, 1000 * t, return_dict=False)[0]
        loss = F.mse_loss(v.float(), noise - x0)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
        running += (loss.item() - running) / min(step, 100)
        if step % 100 == 0:
            log(f"flow {step}/{args.steps} loss {running:.4f}")
        if step % args.eval_every == 0 or step == args.steps:
            kept = swap(params, average)
            accuracy = {
                name: snapshot(models, tokenizer, name, tasks[name], step, args.work)
                for name in tasks
            }
            save_snapshot(models, args.work / f"snapshot-{step}.safetensors")
            swap(params, kept)
            curve.append({"step": step} | accuracy | spent(begun))
            (args.work / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
            log(f"flow {step}/{args.steps} accuracy on held-out prompts {accuracy}")
    swap(params, average)
    return curve


def snapshot(models, tokenizer, name: str, task: Task, step: int, work: Path) -> float:
    """Accuracy on a task's held-out prompts now; leaves a contact sheet."""
    ids = tokenise(tokenizer, [row["prompt"] for row in task.held])
    images = np.concatenate([sample(models, ids, seed) for seed in EVAL_SEEDS])
    save_grid(images[: len(task.held)], work / f"samples-{name}-{step}.png")
    right = task.correct(images, list(task.held) * len(EVAL_SEEDS))
    return round(float(right.mean()), 4)


def swap(params: list, values: list) -> list:
    """Put values into params; returns what was there."""
    kept = [p.detach().clone() for p in params]
    for p, v in zip(params, values, strict=True):
        p.data.copy_(v)
    return kept


def save_snapshot(models: dict, path: Path) -> None:
    """All weights in one file, to export an earlier step or to look at it."""
    flat = {
        f"{n}.{k}": v.contiguous() for n, m in models.items() for k, v in m.state_dict().items()
    }
    save_file(flat, path)


def load_snapshot(models: dict, path: Path) -> None:
    """The reverse of save_snapshot."""
    flat = load_file(path)
    for name, model in models.items():
        head = name + "."
        model.load_state_dict({k[len(head) :]: v for k, v in flat.items() if k.startswith(head)})


# ---------------------------------------------------------------- measuring and the manifest


def measure(folder: Path, name: str, task: Task, work: Path) -> dict:
    """Accuracy of the written folder through diffusers' own pipeline call, in fp32."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    right = []
    for seed in EVAL_SEEDS:
        images = pipe(
            [r["prompt"] for r in task.held],
            height=textart.HEIGHT,
            width=textart.WIDTH,
            sigmas=np.linspace(1, 1 / SAMPLE_STEPS, SAMPLE_STEPS).tolist(),
            guidance_scale=1.0,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
        images = (images * 255).round().astype(np.uint8)
        right.append(task.correct(images, task.held))
        save_grid(images, work / f"final-{name}-{seed}.png")
    right = np.stack(right)
    groups = {"overall": np.ones(len(task.held), bool), **task.groups}
    return {
        **{group: round(float(right[:, mask].mean()), 4) for group, mask in groups.items()},
        "images": int(right.size),
        "seeds": list(EVAL_SEEDS),
        "per_seed": [round(float(r.mean()), 4) for r in right],
        "setting": f"{SAMPLE_STEPS} Euler steps, guidance 1, fp32, {task.criterion}",
    }


def write_manifest(out: Path, facts: dict) -> None:
    """Checksums of everything shipped, and how it was made."""
    paths = [out / f"{name}.py" for name in SOURCES]
    paths += [p for part in ("tiny-sd3", "prompts") for p in (out / part).rglob("*")]
    files = {
        p.relative_to(out).as_posix(): {
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            "bytes": p.stat().st_size,
        }
        for p in sorted(paths)
        if p.is_file()
    }
    facts = facts | {"libraries": {n: importlib.metadata.version(n) for n in PACKAGES}}
    facts["files"] = files
    (out / "manifest.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def parse_tasks(text: str) -> list[str]:
    """The names in a comma-separated list; `argparse` reports unknown ones."""
    names = text.split(",")
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown task {unknown[0]!r}; allowed: {', '.join(TASKS)}"
        )
    return names


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="the assets folder to write")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny-sd3-build"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tasks", type=parse_tasks, default=list(TASKS), help="comma-separated, default both"
    )
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="flow-matching steps")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reuse-vae", action="store_true", help="take vae.safetensors of --work")
    parser.add_argument("--note", help="a remark on this build, kept in the manifest")
    parser.add_argument("--export", type=int, help="write the snapshot of this step from --work")
    return parser.parse_args()


def fit_vae(models: dict, images: np.ndarray, args: argparse.Namespace) -> torch.Tensor:
    """Train or load the autoencoder, set its latent scale, return the latents of the images."""
    vae, stored = models["vae"], args.work / "vae.safetensors"
    if args.reuse_vae and stored.exists():
        vae.load_state_dict(load_file(stored))
        vae.eval()
    else:
        begun = (time.time(), time.process_time())
        train_vae(vae, images, args.vae_steps, args.seed)
        save_file(vae.state_dict(), stored)
        (args.work / "vae.json").write_text(json.dumps(spent(begun)), encoding="utf-8")
    vae.requires_grad_(False)
    latents = encode_all(vae, images)
    shift, scale = latents.float().mean().item(), 1 / latents.float().std().item()
    vae.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5))
    log(f"latents {tuple(latents.shape)} shift {shift:.4f} scale {scale:.4f}")
    return latents


def check_task(models: dict, name: str, task: Task, args: argparse.Namespace) -> dict[str, float]:
    """How often held-out rows are judged correct as rendered, and as the VAE rebuilds them."""
    rng = random.Random(args.seed + 1)
    rows = [row for row in task.held for _ in range(4)]
    images = np.stack([task.render(row, rng) for row in rows])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rebuilt = to_images(models["vae"](to_tensor(images)).sample)
    save_grid(images[:144], args.work / f"ground-truth-{name}.png")
    save_grid(rebuilt[:144], args.work / f"reconstructions-{name}.png")
    found = {
        f"{name}_ground_truth": round(float(task.correct(images, rows).mean()), 4),
        f"{name}_reconstructions": round(float(task.correct(rebuilt, rows).mean()), 4),
    }
    log(f"judged correct: {found}")
    return found


def trained_curve(models, latents, pool, tokenizer, tasks, args) -> list[dict]:
    """Pre-train, or load an earlier snapshot with the curve up to it."""
    if not args.export:
        return pretrain(models, latents, pool, tokenizer, tasks, args)
    load_snapshot(models, args.work / f"snapshot-{args.export}.safetensors")
    curve = json.loads((args.work / "curve.json").read_text(encoding="utf-8"))
    return [point for point in curve if point["step"] <= args.export]


def main() -> None:
    """Build everything."""
    args = parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tasks = {name: TASKS[name](args.seed) for name in args.tasks}
    for name, task in tasks.items():
        write_jsonl(args.out / "prompts" / f"{name}-train.jsonl", task.tuning)
        write_jsonl(args.out / "prompts" / f"{name}-eval.jsonl", task.held)
        log(f"{name}: {len(task.pretraining)} prompts to train, {len(task.held)} held out")
    folder = args.out / "tiny-sd3"
    tokenizer = write_tokenizer(args.work / "tokenizer")
    models = build_models(tokenizer)
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
    log(f"parameters {counts}")
    images, pool = render_pools(tasks)
    latents = fit_vae(models, images, args)
    del images
    judged = {}
    for name, task in tasks.items():
        judged |= check_task(models, name, task, args)
    curve = trained_curve(models, latents, pool, tokenizer, tasks, args)
    save_pipeline(models, tokenizer, folder)
    accuracy = {
        ACCURACY_KEYS[name]: measure(folder, name, task, args.work) for name, task in tasks.items()
    }
    log(f"accuracy of the written pipeline {accuracy}")
    write_manifest(
        args.out, facts(args, tasks, counts, curve) | judged | accuracy | {"curve": curve}
    )
    log("done")


def facts(args, tasks: Mapping[str, Task], counts: dict[str, int], curve: list[dict]) -> dict:
    """How the pipeline was made."""
    steps = args.export or args.steps
    command = f"python assets/build_tiny_sd3.py --tasks {','.join(tasks)} --seed {args.seed}"
    made = {
        "build": f"{command} --steps {steps}",
        "seed": args.seed,
        "tasks": list(tasks),
        "steps": steps,
        "vae_steps": args.vae_steps,
        "batch": BATCH,
        "vae_time": json.loads((args.work / "vae.json").read_text(encoding="utf-8")),
        "flow_time": {k: curve[-1][k] for k in ("wall_seconds", "cpu_seconds")},
        "threads": args.threads,
        "parameters": counts,
        "held_out": {key: value for task in tasks.values() for key, value in task.facts.items()},
    }
    return made | ({"note": args.note} if args.note else {})


if __name__ == "__main__":
    main()
