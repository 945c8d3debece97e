"""Build the tiny SD3 pipeline that this repository ships, from nothing.

    python assets/build_tiny_sd3.py --out assets

The script renders small text signs (see textart.py), trains an AutoencoderKL on them, then
pre-trains an SD3Transformer2DModel together with two small CLIP text encoders by flow matching,
and writes a folder that `StableDiffusion3Pipeline.from_pretrained` loads, the prompt files and a
manifest.  Training stops while the model still garbles about half of the held-out texts: it knows
every glyph, but it is no reliable writer, which leaves room for a reward to improve it.

Everything is drawn from --seed.  The shipped build took 12 minutes on two CPU cores, 4 of them for
the autoencoder.  Floating-point sums differ between machines and library versions, so
a rebuild gives an equal pipeline, not the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.metadata
import json
import math
import random
import time
from pathlib import Path

import cv2
import numpy as np
import textart
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from rapidocr import RapidOCR
from rapidocr.ch_ppocr_rec import TextRecInput
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

VAE_STEPS = 1500
NUM_STEPS = 1750
BATCH = 128
LEARNING_RATE = 1.5e-3
EMA_DECAY = 0.998
TEXT_LENGTH = 10  # start, a, colour, sign, ", up to three characters, ", end
WORD_START = "\u2581"  # what T5 tokenizers put for a space
TEXT_WIDTH = 64
LATENT_CHANNELS = 8
SAMPLE_STEPS = 10
UNSEEN_NUMBERS = 6
EVAL_NUMBERS = 66
EVAL_SEEDS = (1000, 1001, 1002)
PACKAGES = ("torch", "diffusers", "transformers", "rapidocr", "onnxruntime", "matplotlib")
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


# ---------------------------------------------------------------- prompts


def split_prompts(seed: int) -> tuple[list[dict], list[dict], list[str]]:
    """Train rows, held-out evaluation rows, and the numbers that are never trained on.

    Every text has one colour it is never trained in; these pairs are the evaluation prompts.
    A few whole numbers are left out in every colour.
    """
    rng = random.Random(seed)
    unseen = sorted(rng.sample(textart.NUMBERS, UNSEEN_NUMBERS))
    colours = list(textart.COLOURS)
    train, held_numbers, held_words, held_unseen = [], [], [], []
    for text in textart.NUMBERS + textart.WORDS:
        held_colour = rng.choice(colours)
        kind = "number" if text in textart.NUMBERS else "word"
        for colour in colours:
            row = {"prompt": textart.prompt_for(text, colour), "text": text, "kind": kind}
            row["colour"] = colour
            if text in unseen:
                if colour == held_colour:
                    held_unseen.append(row | {"held_out": "text"})
            elif colour == held_colour:
                held = held_numbers if kind == "number" else held_words
                held.append(row | {"held_out": "pair"})
            else:
                train.append(row)
    held_numbers = sorted(rng.sample(held_numbers, EVAL_NUMBERS), key=lambda r: r["text"])
    return train, held_numbers + held_unseen + held_words, unseen


def tuning_prompts(train: list[dict], seed: int) -> list[dict]:
    """The training rows that reinforcement learning gets: all words, each number in two colours.

    Words start further from the goal than numbers, so they get more than their share of the pool.
    """
    rng = random.Random(seed + 2)
    kept = []
    for text in dict.fromkeys(row["text"] for row in train):
        rows = [row for row in train if row["text"] == text]
        kept += rows if rows[0]["kind"] == "word" else rng.sample(rows, 2)
    return kept


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- models


def byte_symbols() -> list[str]:
    """The 256 printable characters that byte-level BPE uses for the bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(extra)) for b in range(256)]


def word_merges() -> list[str]:
    """BPE merges that make one token of "sign" and of each colour, and touch no quoted text."""
    merges: list[str] = []
    # Long words first: "r e" of "red" would otherwise come before "g r" and split "green".
    for word in sorted(("sign", *textart.COLOURS), key=len, reverse=True):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            parts[:2] = ["".join(parts[:2])]
            if pair not in merges:
                merges.append(pair)
    return merges


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the files of a CLIP tokenizer that spells quoted texts character by character."""
    merges = word_merges()
    tokens = byte_symbols()
    tokens += [t + "</w>" for t in tokens]
    tokens += [m.replace(" ", "") for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(m.split(" ")) for m in merges]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(m + "\n" for m in merges), encoding="utf-8"
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for text in textart.NUMBERS + textart.WORDS:
        for colour in textart.COLOURS:
            ids = tokenizer(textart.prompt_for(text, colour)).input_ids
            assert len(ids) == 7 + len(text) <= TEXT_LENGTH, (text, colour, ids)
    return tokenizer


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder whose output is exactly zero, and its tokenizer of template words and letters.

    diffusers treats an absent T5 as zeros, but then wants to be told on loading that it is absent.
    This one lets a plain `from_pretrained(folder)` work and changes no image.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(symbol, -2.0) for symbol in [WORD_START, *map(chr, range(33, 127))]]
    words = [(WORD_START + word, -1.0) for word in ("a", "sign", '"', *textart.COLOURS)]
    tokenizer = T5Tokenizer(vocab=special + words + letters, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=1
    )
    encoder = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_models(tokenizer: CLIPTokenizer) -> dict[str, torch.nn.Module]:
    """Fresh transformer, VAE and text encoders."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 32],
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=textart.WIDTH,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    zero_init(transformer)
    return {
        "vae": vae,
        "text_encoder": CLIPTextModelWithProjection(text_config),
        "text_encoder_2": CLIPTextModelWithProjection(text_config),
        "transformer": transformer,
    }


def zero_init(transformer: SD3Transformer2DModel) -> None:
    """Start every block as the identity and the output at zero, as DiT does."""
    layers = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def save_pipeline(models: dict, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the pipeline folder in half precision."""
    weights = {name: m.state_dict() for name, m in models.items()}
    text_encoder_3, tokenizer_3 = silent_t5(models["transformer"].config.joint_attention_dim)
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        **models,
    )
    halves = {name: {k: v.clone() for k, v in w.items()} for name, w in weights.items()}
    pipe.to(torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    # Converting the modules rounds them in place; training goes on from the exact weights.
    for name, model in models.items():
        model.float().load_state_dict(halves[name])
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    # transformers follows this field, diffusers loads in fp32: without the edit a plain
    # from_pretrained would mix the two.
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / name / "model.safetensors").chmod(0o644)
    for name in ("transformer", "vae"):
        (folder / name / "diffusion_pytorch_model.safetensors").chmod(0o644)


# ---------------------------------------------------------------- OCR


class Reader:
    """rapidocr's text recogniser without detection, on images upscaled twofold."""

    def __init__(self) -> None:
        engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_det": False,
                "Global.use_cls": False,
                "EngineConfig.onnxruntime.intra_op_num_threads": 2,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                # 48x96 is the shape of a sign; padding to the stock 48x320 costs four times more.
                "Rec.rec_img_shape": [3, 48, 96],
                "Rec.rec_batch_num": 16,
            }
        )
        self.recognise = engine._load_rec_model()

    def __call__(self, images: np.ndarray) -> list[str]:
        """The text read in each uint8 RGB image, lower-case, without spaces."""
        big = [
            cv2.resize(i[:, :, ::-1], None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
            for i in images
        ]
        return [t.lower().replace(" ", "") for t in self.recognise(TextRecInput(img=big)).txts]


def matches(read: list[str], rows: list[dict]) -> np.ndarray:
    """Which texts were read exactly."""
    return np.array([r == row["text"].lower() for r, row in zip(read, rows, strict=True)])


# ---------------------------------------------------------------- data


def render_set(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """All layouts of all rows: images (N, 32, 64, 3) and the row number of each."""
    layouts = [
        textart.Layout(font, size, dx, dy, background)
        for font in textart.FONTS
        for size in textart.SIZES
        for dx in textart.OFFSETS_X
        for dy in textart.OFFSETS_Y
        for background in textart.BACKGROUNDS
    ]
    images = np.empty((len(rows) * len(layouts), textart.HEIGHT, textart.WIDTH, 3), dtype=np.uint8)
    owner = np.repeat(np.arange(len(rows)), len(layouts))
    for i, row in enumerate(rows):
        for j, layout in enumerate(layouts):
            images[i * len(layouts) + j] = textart.render(row["text"], row["colour"], layout)
    return images, owner


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


def tokenise(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token numbers padded as the pipeline pads them."""
    kept = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True}
    return tokenizer(prompts, return_tensors="pt", **kept).input_ids


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


def pretrain(models, latents, owner, tokenizer, train, held, reader, args) -> list[dict]:
    """Flow matching with an average of the weights; returns the accuracy curve."""
    torch.manual_seed(args.seed)
    vae = models["vae"]
    trained = [models[n] for n in ("transformer", "text_encoder", "text_encoder_2")]
    params = [p for m in trained for p in m.parameters()]
    optimiser = torch.optim.AdamW(
        params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    average = [p.detach().clone() for p in params]
    train_ids = tokenise(tokenizer, [r["prompt"] for r in train])
    empty_ids = tokenise(tokenizer, [""])[0]
    held_ids = tokenise(tokenizer, [r["prompt"] for r in held])
    owner = torch.from_numpy(owner)
    # Words are fewer and harder than numbers (more glyphs, less shared), so they are drawn more
    # often: about every second sign is a word.
    is_word = torch.tensor([r["kind"] == "word" for r in train])
    row_weight = torch.where(is_word, 5.0, 1.0)
    per_row = len(owner) // len(train)
    curve, begun = [], (time.time(), time.process_time())
    running = 0.0
    for step in range(1, args.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1.0, step / 200)
        # The pipeline's default call appends 256 zero T5 tokens, a frugal one as many as CLIP's.
        # Meeting both keeps the model usable either way; long batches are smaller, for time.
        long = step % 20 == 0
        batch = BATCH // 4 if long else BATCH
        rows = torch.multinomial(row_weight, batch, replacement=True)
        index = rows * per_row + torch.randint(per_row, (batch,))
        x0 = latents[index].float()
        x0 = (x0 - vae.config.shift_factor) * vae.config.scaling_factor
        ids = train_ids[owner[index]]
        ids[torch.rand(batch) < 0.03] = empty_ids
        u = (torch.arange(batch) + torch.rand(batch)) / batch
        t = 3 * u / (1 + 2 * u)
        noise = torch.randn_like(x0)
        mix = t.view(-1, 1, 1, 1)
        x = (1 - mix) * x0 + mix * noise
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode_text(models, ids, 256 if long else TEXT_LENGTH)
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
            images = np.concatenate([sample(models, held_ids, s) for s in EVAL_SEEDS])
            right = matches(reader(images), held * len(EVAL_SEEDS))
            curve.append({"step": step, "accuracy": round(float(right.mean()), 4)} | spent(begun))
            (args.work / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
            log(f"flow {step}/{args.steps} accuracy on held-out prompts {right.mean():.3f}")
            save_grid(images[: len(held)], args.work / f"samples-{step}.png")
            save_snapshot(models, args.work / f"snapshot-{step}.safetensors")
            swap(params, kept)
    swap(params, average)
    return curve


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


def measure(folder: Path, held: list[dict], reader: Reader, work: Path) -> dict:
    """Accuracy of the written folder through diffusers' own pipeline call, in fp32."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    right = []
    for seed in EVAL_SEEDS:
        images = pipe(
            [r["prompt"] for r in held],
            height=textart.HEIGHT,
            width=textart.WIDTH,
            sigmas=np.linspace(1, 1 / SAMPLE_STEPS, SAMPLE_STEPS).tolist(),
            guidance_scale=1.0,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
        images = (images * 255).round().astype(np.uint8)
        right.append(matches(reader(images), held))
        save_grid(images, work / f"final-{seed}.png")
    right = np.stack(right)
    groups = {
        "overall": np.ones(len(held), bool),
        "number": np.array([r["kind"] == "number" for r in held]),
        "word": np.array([r["kind"] == "word" for r in held]),
        "unseen_number": np.array([r["held_out"] == "text" for r in held]),
    }
    result = {name: round(float(right[:, mask].mean()), 4) for name, mask in groups.items()}
    result["images"] = int(right.size)
    result["seeds"] = list(EVAL_SEEDS)
    result["per_seed"] = [round(float(r.mean()), 4) for r in right]
    result["setting"] = f"{SAMPLE_STEPS} Euler steps, guidance 1, fp32, exact match by rapidocr"
    return result


def write_manifest(out: Path, facts: dict) -> None:
    """Checksums of everything shipped, and how it was made."""
    paths = [out / "build_tiny_sd3.py", out / "textart.py"]
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


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="the assets folder to write")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny-sd3-build"))
    parser.add_argument("--seed", type=int, default=0)
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


def check_reader(models: dict, held: list[dict], reader: Reader, args) -> tuple[float, float]:
    """OCR accuracy on rendered held-out signs and on their reconstructions."""
    rng = random.Random(args.seed + 1)
    rows = [row for row in held for _ in range(4)]
    layouts = [textart.random_layout(rng) for _ in rows]
    images = np.stack(
        [textart.render(r["text"], r["colour"], lay) for r, lay in zip(rows, layouts, strict=True)]
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rebuilt = to_images(models["vae"](to_tensor(images)).sample)
    save_grid(images[:144], args.work / "ground-truth.png")
    save_grid(rebuilt[:144], args.work / "reconstructions.png")
    truth = float(matches(reader(images), rows).mean())
    reconstructed = float(matches(reader(rebuilt), rows).mean())
    log(f"ocr on ground truth {truth:.3f}, on reconstructions {reconstructed:.3f}")
    return truth, reconstructed


def main() -> None:
    """Build everything."""
    args = parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    train, held, unseen = split_prompts(args.seed)
    write_jsonl(args.out / "prompts" / "ocr-train.jsonl", tuning_prompts(train, args.seed))
    write_jsonl(args.out / "prompts" / "ocr-eval.jsonl", held)
    folder = args.out / "tiny-sd3"
    tokenizer = write_tokenizer(args.work / "tokenizer")
    models = build_models(tokenizer)
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
    log(f"{len(train)} train prompts, {len(held)} evaluation prompts, parameters {counts}")
    reader = Reader()
    images, owner = render_set(train)
    log(f"rendered {len(images)} signs")
    latents = fit_vae(models, images, args)
    del images
    truth, reconstructed = check_reader(models, held, reader, args)
    if args.export:
        load_snapshot(models, args.work / f"snapshot-{args.export}.safetensors")
        curve = json.loads((args.work / "curve.json").read_text(encoding="utf-8"))
        curve = [point for point in curve if point["step"] <= args.export]
    else:
        curve = pretrain(models, latents, owner, tokenizer, train, held, reader, args)
    save_pipeline(models, tokenizer, folder)
    accuracy = measure(folder, held, reader, args.work)
    log(f"accuracy of the written pipeline {accuracy}")
    steps = args.export or args.steps
    facts = {
        "build": f"python assets/build_tiny_sd3.py --seed {args.seed} --steps {steps}",
        "seed": args.seed,
        "steps": steps,
        "vae_steps": args.vae_steps,
        "batch": BATCH,
        "vae_time": json.loads((args.work / "vae.json").read_text(encoding="utf-8")),
        "flow_time": {k: curve[-1][k] for k in ("wall_seconds", "cpu_seconds")},
        "threads": args.threads,
        "parameters": counts,
        "held_out": {
            "pairs": "every text has one colour it is never trained in (prompts/ocr-eval.jsonl)",
            "numbers_never_trained": unseen,
        },
        "ocr_ground_truth": round(truth, 4),
        "ocr_reconstructions": round(reconstructed, 4),
        "base_accuracy": accuracy,
        "curve": curve,
    }
    if args.note:
        facts["note"] = args.note
    write_manifest(args.out, facts)
    log("done")


if __name__ == "__main__":
    main()
