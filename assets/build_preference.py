"""Train the small open_clip model behind the reward `preference`, from nothing.

    python assets/build_preference.py --out assets/tiny-preference

The stated preference: a picture is the better, the higher its contrast, the nearer its ink to the
middle and the cleaner its background.  Each of the three has a grade in [0, 1], measured on the
layers a picture is made of (see `grades`), and the utility is their mean.

Signs and scenes of shapes are rendered as layers and put together at random contrast, place and
background pattern.  An image tower and a text tower learn, by cross-entropy with soft labels, that
an image of utility u goes with the good text rather than the bad one with probability u; three more
pairs of texts ask for one grade each.  The score of a picture is that probability, so it estimates
the utility, and differences of its logits are those of a Bradley-Terry model.

Everything is drawn from --seed.  Floating-point sums differ between machines and library versions,
so a rebuild gives an equal model, not the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

# The script is run by its path, which puts its folder on the import path but not the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import shapes, textart
from assets.composition_task import split
from assets.shapes import Kind
from assets.textart import HEIGHT, WIDTH
from rewards import preference

OVERALL = preference.Config()
TEXTS = {
    "overall": (OVERALL.positive, OVERALL.negative),
    "contrast": ("a high-contrast picture", "a low-contrast picture"),
    "centring": ("a centred picture", "an off-centre picture"),
    "cleanliness": ("a clean picture", "a cluttered picture"),
}
"""What is learned -> good text, bad text."""
FACTORS = tuple(TEXTS)[1:]

LUMA = torch.tensor([0.299, 0.587, 0.114])
FULL_CONTRAST = 0.9
"""Difference of luma, of 1, from which contrast is as good as it gets: black ink."""
WORST_OFFSET = (24.0, 12.0)
"""Pixels right of and below the middle, each of which alone takes the whole grade of centring."""
WORST_CLUTTER = 32.0
"""Root mean square deviation of the background, of 255, from which it is as bad as it gets."""
LEAST_CONTRAST = 0.25
"""Least part of the contrast of its own ink that a picture is left with."""
MAX_PATTERN = 36.0
"""Largest root mean square of a background pattern before clipping, of 255."""
TEXT_SIZES = range(13, 26)
HELD_OUT_TEXTS = 0.2

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"
CONTEXT_LENGTH = 16
STEPS, BATCH, LEARNING_RATE = 2200, 128, 2e-3
POOL, HELD_OUT_POOL = 8000, 1000
CLEAR = 0.05
"""Difference of utilities from which a pair counts as one with a clear preference."""
PACKAGES = ("torch", "open_clip_torch", "tokenizers", "matplotlib")
_STARTED = time.time()


def log(message: str) -> None:
    """Print one progress line with the seconds since the start."""
    print(f"[{time.time() - _STARTED:6.1f}s] {message}", flush=True)


# ---------------------------------------------------------------- pictures as layers


@dataclass(frozen=True, kw_only=True)
class Layers:
    """N pictures before contrast, place and background pattern are chosen.

    `background` [N, 3]: colour, of 255.  `ink` [N, 3, 32, 64]: the plain picture minus its
    background.  `alpha` [N, 1, 32, 64]: how much of a pixel is ink, of 1.
    """

    background: Tensor
    ink: Tensor
    alpha: Tensor

    def __len__(self) -> int:
        return len(self.background)

    def take(self, index: Tensor) -> Layers:
        """The pictures at these places."""
        return Layers(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is chosen for N pictures.

    `contrast` [N]: factor on the ink's difference from the background.  `shift` [N, 2] int64:
    pixels to the right and down.  `pattern` [N, 3, 32, 64]: what is added to the background.
    """

    contrast: Tensor
    shift: Tensor
    pattern: Tensor


def text_split(seed: int) -> tuple[list[str], list[str]]:
    """Texts to train on, and texts that are never trained on."""
    texts = [*textart.NUMBERS, *textart.WORDS]
    held = set(random.Random(seed).sample(texts, round(HELD_OUT_TEXTS * len(texts))))
    return [text for text in texts if text not in held], sorted(held)


def render_layers(texts: Sequence[str], rows: Sequence[dict], count: int, seed: int) -> Layers:
    """As many signs of random texts as scenes of random rows of the composition task."""
    rng = random.Random(seed)
    drawn = [
        _sign(rng.choice(texts), rng) if i % 2 else _scene(rng.choice(rows), rng)
        for i in range(count)
    ]
    plain, black, background = (
        np.stack(part).astype(np.float32) for part in zip(*drawn, strict=True)
    )
    ink = torch.from_numpy(plain - background[:, None, None]).permute(0, 3, 1, 2).contiguous()
    alpha = torch.from_numpy((255 - black) / (255 - textart.COLOURS["black"][0]))
    return Layers(background=torch.from_numpy(background), ink=ink, alpha=alpha[:, None, :, :, 0])


def _sign(text: str, rng: random.Random) -> tuple[np.ndarray, ...]:
    """A sign as it is, in black on white, and its background."""
    layout = replace(textart.random_layout(rng), size=rng.choice(TEXT_SIZES), dx=0, dy=0)
    plain = textart.render(text, rng.choice(list(textart.COLOURS)), layout)
    black = textart.render(text, "black", replace(layout, background=(255, 255, 255)))
    return plain, black, np.array(layout.background)


def _scene(row: dict, rng: random.Random) -> tuple[np.ndarray, ...]:
    """A scene as it is, in black on white, and its background."""
    kinds = [Kind(**entry) for entry in row["objects"]]
    scene = shapes.random_scene(kinds, row["relation"], rng)
    outlines = tuple(replace(item, colour="black") for item in scene.objects)
    black = shapes.render(shapes.Scene(objects=outlines))
    return shapes.render(scene), black, np.array(scene.background)


# ---------------------------------------------------------------- looks


def random_look(layers: Layers, generator: torch.Generator) -> Look:
    """Contrast, place and pattern drawn independently; a quarter of each at its best."""
    size = len(layers)
    best = centring_shift(layers)
    ends = torch.stack(_room(layers.alpha))
    corner = torch.randint(2, (size, 2), generator=generator)
    far = torch.where(corner.bool(), ends[1], ends[0])
    direction = torch.rand(size, 2, generator=generator)
    part = _amount(size, generator)[:, None] * direction / direction.amax(1, keepdim=True)
    strength = MAX_PATTERN * _amount(size, generator).square()
    return Look(
        contrast=1 - (1 - LEAST_CONTRAST) * _amount(size, generator),
        shift=(best + part * (far - best)).round().long(),
        pattern=strength.view(-1, 1, 1, 1) * random_patterns(size, generator),
    )


def best_look(layers: Layers) -> Look:
    """Full contrast, centred, nothing behind."""
    ones = torch.ones(len(layers))
    return Look(contrast=ones, shift=centring_shift(layers), pattern=torch.zeros_like(layers.ink))


def _amount(size: int, generator: torch.Generator) -> Tensor:
    """[N] of [0, 1], a quarter of it 0."""
    return (torch.rand(size, generator=generator) * 4 / 3 - 1 / 3).clamp(min=0)


def random_patterns(size: int, generator: torch.Generator) -> Tensor:
    """[N, 3, 32, 64] of mean square 1: noise of pixels, smooth blotches or stripes."""
    noise = torch.randn(size, 3, HEIGHT, WIDTH, generator=generator)
    coarse = torch.randn(size, 3, HEIGHT // 4, WIDTH // 4, generator=generator)
    blotches = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
    kinds = torch.stack([noise, blotches, _stripes(size, generator)])
    chosen = kinds[torch.randint(len(kinds), (size,), generator=generator), torch.arange(size)]
    return chosen / chosen.square().mean((1, 2, 3), keepdim=True).sqrt()


def _stripes(size: int, generator: torch.Generator) -> Tensor:
    """[N, 3, 32, 64]: grey stripes of any direction, 4 to 16 pixels apart."""
    period, angle, phase = torch.rand(3, size, 1, 1, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    along = columns * torch.cos(math.pi * angle) + rows * torch.sin(math.pi * angle)
    wave = torch.sin(2 * math.pi * (along / (4 + 12 * period) + phase))
    return torch.where(wave > 0, 1.0, -1.0)[:, None].expand(-1, 3, -1, -1)


def centring_shift(layers: Layers) -> Tensor:
    """[N, 2] int64: the shift that brings the ink nearest to the middle without cutting it."""
    low, high = _room(layers.alpha)
    return (-offset(layers.alpha)).round().long().clamp(low, high)


def _room(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest shifts [N, 2] that leave a pixel between the ink and the border."""
    low, high = [], []
    for axis in (2, 3)[::-1]:
        inked = (alpha > 0).any(dim=5 - axis).flatten(1).float()
        length = inked.shape[1]
        low.append(1 - inked.argmax(1))
        high.append(length - 2 - (length - 1 - inked.flip(1).argmax(1)))
    # A picture that fills its height has no room at all.
    return torch.stack(low, 1).clamp(max=0), torch.stack(high, 1).clamp(min=0)


def offset(alpha: Tensor) -> Tensor:
    """[N, 2]: where the ink's centre of mass is, in pixels right of and below the middle."""
    weight = alpha[:, 0] / alpha.sum((1, 2, 3)).view(-1, 1, 1)
    columns, rows = (torch.arange(n) - (n - 1) / 2 for n in (WIDTH, HEIGHT))
    return torch.stack([weight.sum(1) @ columns, weight.sum(2) @ rows], 1)


def compose(layers: Layers, look: Look) -> tuple[Tensor, Tensor]:
    """Whole-number pictures [N, 3, 32, 64] of 255 and their grades [N, 3], as in `FACTORS`."""
    moved = replace(
        layers, ink=_moved(layers.ink, look.shift), alpha=_moved(layers.alpha, look.shift)
    )
    ink = look.contrast.view(-1, 1, 1, 1) * moved.ink
    flat = moved.background[:, :, None, None]
    pictures = (flat + ink + (1 - moved.alpha) * look.pattern).round().clamp(0, 255)
    return pictures, grades(moved.alpha, ink, pictures - flat)


def _moved(layer: Tensor, shift: Tensor) -> Tensor:
    rows = (torch.arange(HEIGHT) - shift[:, 1:]) % HEIGHT
    columns = (torch.arange(WIDTH) - shift[:, :1]) % WIDTH
    place = torch.arange(len(layer))[:, None, None]
    return layer.movedim(1, 3)[place, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def grades(alpha: Tensor, ink: Tensor, deviation: Tensor) -> Tensor:
    """Contrast, centring and cleanliness [N, 3] in [0, 1].

    `alpha` [N, 1, 32, 64]; `ink` and `deviation` [N, 3, 32, 64]: how the ink alone and the whole
    picture differ from the background's colour, of 255.  Contrast is the ink's mean difference in
    luma over `FULL_CONTRAST`; centring falls with the distance of the ink's centre of mass from the
    middle in units of `WORST_OFFSET`; cleanliness with the root mean square deviation of what is
    not ink, over `WORST_CLUTTER`.
    """
    luma = torch.einsum("nchw,c->nhw", ink, LUMA).abs().sum((1, 2)) / alpha.sum((1, 2, 3)) / 255
    distance = (offset(alpha) / torch.tensor(WORST_OFFSET)).norm(dim=1)
    free = (alpha == 0).float()
    clutter = (deviation.square() * free).mean((1, 2, 3)) / free.mean((1, 2, 3))
    grade = [luma / FULL_CONTRAST, 1 - distance, 1 - clutter.sqrt() / WORST_CLUTTER]
    return torch.stack(grade, 1).clamp(0, 1)


def softened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures a little softer and noisier, as decoded ones are; every fourth as it was."""
    side = 0.2 * _amount(len(pictures), generator).view(-1, 1, 1, 1)
    noise = torch.randn(pictures.shape, generator=generator)
    for axis in (2, 3):
        near = pictures.roll(1, axis) + pictures.roll(-1, axis)
        pictures = (1 - 2 * side) * pictures + side * near
    return (pictures + 10 * side * noise).clamp(0, 255)


# ---------------------------------------------------------------- model


def model_config(vocabulary: Sequence[str]) -> dict:
    """What open_clip_config.json holds."""
    vision = {"image_size": [HEIGHT, WIDTH], "patch_size": 8, "width": 64, "head_width": 16}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": len(vocabulary), "width": 32}
    return {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": vision | {"layers": 3, "mlp_ratio": 2.0, "pool_type": "avg"},
            "text_cfg": text | {"heads": 2, "layers": 1, "hf_tokenizer_name": "tiny-preference"},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }


def write_tokenizer(folder: Path) -> tuple[Tokenizer, list[str]]:
    """A tokenizer of the whole words of `TEXTS`, in the files that transformers loads."""
    split_words = Whitespace()
    words = {
        word
        for pair in TEXTS.values()
        for text in pair
        for word, _ in split_words.pre_tokenize_str(text.lower())
    }
    # open_clip's text tower pools at the greatest number, which therefore is the end's.
    vocabulary = [PAD, UNKNOWN, *sorted(words), END]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), split_words
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, numbers[END])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "eos_token": END,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return tokenizer, vocabulary


def write_json(path: Path, data: Mapping) -> None:
    """Indented, with a last newline."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def tokenise(tokenizer: Tokenizer) -> Tensor:
    """Numbers of all texts, [factors x 2, context]: good and bad of each in turn."""
    tokenizer.enable_padding(pad_id=0, pad_token=PAD, length=CONTEXT_LENGTH)
    texts = [text for pair in TEXTS.values() for text in pair]
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def logits(model: open_clip.CLIP, pictures: Tensor, tokens: Tensor) -> Tensor:
    """[N, factors]: how much more an image of `pictures`, of 255, is like good than bad texts."""
    images = F.normalize(model.encode_image(pictures / 127.5 - 1), dim=-1)
    good, bad = (
        F.normalize(model.encode_text(tokens), dim=-1).view(-1, 2, images.shape[1]).unbind(1)
    )
    return model.logit_scale.exp() * images @ (good - bad).T


def targets(grade: Tensor) -> Tensor:
    """[N, factors]: the utility, then the grades [N, 3] themselves."""
    return torch.cat([utility(grade)[:, None], grade], 1)


def utility(grade: Tensor) -> Tensor:
    """[N]: the stated preference, from grades [N, 3]."""
    return grade.mean(1)


def train(model: open_clip.CLIP, layers: Layers, tokens: Tensor, steps: int, seed: int) -> None:
    """Cross-entropy with the targets as soft labels; every picture is put together anew."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    excess = 0.0
    for step in range(1, steps + 1):
        drawn = layers.take(torch.randint(len(layers), (BATCH,), generator=generator))
        pictures, grade = compose(drawn, random_look(drawn, generator))
        label = targets(grade)
        predicted = logits(model, softened(pictures, generator), tokens)
        loss = F.binary_cross_entropy_with_logits(predicted, label)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        error = (predicted.detach().sigmoid() - label).abs().mean().item()
        excess += (error - excess) / min(step, 50)
        if step % 200 == 0:
            log(f"step {step}/{steps} mean error of the grades {excess:.4f}")


def save(model: open_clip.CLIP, config: Mapping, folder: Path) -> None:
    """Half-precision weights beside their configuration."""
    write_json(folder / "open_clip_config.json", config)
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


# ---------------------------------------------------------------- measuring


def to_images(pictures: Tensor) -> list[Image.Image]:
    """PIL images of pictures [N, 3, 32, 64] of 255."""
    return [Image.fromarray(array) for array in pictures.byte().permute(0, 2, 3, 1).numpy()]


def agreement(first: Tensor, second: Tensor, least: float = 0.0) -> float:
    """Part of the pairs whose scores are in the order of their utilities.

    `first` and `second` [2, N]: scores and utilities of the two of each pair.  Pairs whose
    utilities differ by no more than `least` do not count; equal scores are no order.
    """
    score, wanted = first - second
    counted = wanted.abs() > least
    return round((score * wanted > 0)[counted].double().mean().item(), 4)


def changed(look: Look, other: Look, factor: str) -> Look:
    """`look` with one of the three things that are chosen taken from `other`."""
    name = {"contrast": "contrast", "centring": "shift", "cleanliness": "pattern"}[factor]
    return replace(look, **{name: getattr(other, name)})


def held_out_agreement(score, layers: Layers, seed: int) -> dict:
    """How often the score prefers what is stated, by the kind of pair."""
    generator = torch.Generator().manual_seed(seed)
    look, other = random_look(layers, generator), random_look(layers, generator)
    judged = judge(score, layers, look)
    shuffled = judged[:, torch.randperm(len(layers), generator=generator)]
    found = {
        "any_two_pictures": agreement(judged, shuffled, CLEAR),
        "any_two_pictures_with_close_ones": agreement(judged, shuffled),
        "same_picture_redrawn": agreement(judged, judge(score, layers, other), CLEAR),
    }
    for factor in FACTORS:
        again = judge(score, layers, changed(look, other, factor))
        # A third of the utility hangs on one factor.
        found[f"same_picture_other_{factor}"] = agreement(judged, again, CLEAR / len(FACTORS))
    error = (judged[0] - judged[1]).abs().mean().item()
    return found | {"mean_error_of_the_utility": round(error, 4)}


def judge(score, layers: Layers, look: Look) -> Tensor:
    """[2, N]: scores and utilities of the pictures."""
    pictures, grade = compose(layers, look)
    return torch.stack([score(to_images(pictures)), utility(grade)])


def sweep(layers: Layers, factor: str, levels: Sequence[float], seed: int) -> list[Look]:
    """Looks from best (level 0) to worst (level 1) in one factor and best in the others."""
    best = best_look(layers)
    generator = torch.Generator().manual_seed(seed)
    patterns = random_patterns(len(layers), generator)
    ends = torch.stack(_room(layers.alpha))
    far = torch.where((ends[1] - best.shift) > (best.shift - ends[0]), ends[1], ends[0])
    return [
        changed(
            best,
            Look(
                contrast=1 - (1 - LEAST_CONTRAST) * level * best.contrast,
                shift=(best.shift + level * (far - best.shift)).round().long(),
                pattern=level * MAX_PATTERN * patterns,
            ),
            factor,
        )
        for level in levels
    ]


def mean_scores(score, layers: Layers, seed: int) -> dict:
    """Mean score, best to worst, when one factor grows worse in even steps."""
    levels = torch.linspace(0, 1, 6).tolist()
    return {
        factor: [
            round(score(to_images(compose(layers, look)[0])).mean().item(), 4)
            for look in sweep(layers, factor, levels, seed)
        ]
        for factor in FACTORS
    }


def milliseconds(score, images: Sequence[Image.Image], rounds: int = 5) -> float:
    """Least time of an image in a call with all of them."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        score(images)
        times.append(time.perf_counter() - begun)
    return round(1000 * min(times) / len(images), 3)


def facts(score, layers: Layers, args: argparse.Namespace) -> dict:
    """What the written folder does, through the reward that reads it."""
    images = to_images(compose(layers, best_look(layers))[0])
    return {
        "held_out": held_out_agreement(score, layers, args.seed + 2),
        "mean_scores_best_to_worst": mean_scores(score, layers.take(torch.arange(200)), args.seed),
        "milliseconds_per_image": {
            f"batches of {size}": milliseconds(score, images[:size]) for size in (8, 32)
        },
        "threads": torch.get_num_threads(),
    }


def checksums(folder: Path) -> dict:
    """SHA-256 and size of every file but the manifest."""
    return {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "tiny-preference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Render, train, write, measure."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts, unseen = text_split(args.seed)
    rows = split(args.seed)
    layers = render_layers(texts, rows.pretraining, POOL, args.seed)
    log(f"rendered {len(layers)} pictures; {len(unseen)} texts are held out")
    tokenizer, vocabulary = write_tokenizer(args.out)
    config = model_config(vocabulary)
    model = open_clip.CLIP(**config["model_cfg"])
    begun = time.time(), time.process_time()
    train(model, layers, tokenise(tokenizer), args.steps, args.seed)
    spent = {"wall_seconds": time.time() - begun[0], "cpu_seconds": time.process_time() - begun[1]}
    save(model, config, args.out)
    reward = preference.build(preference.Config(model_name=str(args.out), device="cpu"))
    held = render_layers(unseen, rows.evaluation, HELD_OUT_POOL, args.seed + 1)
    measured = facts(lambda images: reward([""] * len(images), images), held, args)
    log(json.dumps(measured))
    made = {
        "build": f"python assets/build_preference.py --seed {args.seed} --steps {args.steps}",
        "preference": "mean of the grades of contrast, centring and cleanliness",
        "texts": TEXTS,
        "texts_never_trained": unseen,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_time": {key: round(value) for key, value in spent.items()},
        "libraries": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json(args.out / "manifest.json", made | measured | {"files": checksums(args.out)})


if __name__ == "__main__":
    main()
