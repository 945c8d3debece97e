"""What held-out pictures look like to judges that training never sees, as rewards of evaluation.

Each function is called as a reward is: the pictures of one prompt, and its columns.  None of them
trains anything; ``evaluation_rewards`` writes them into a run beside the reward that does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from assets import build_preference
from assets.shapes import COLOURS, SHAPES
from benchmarks import judges
from rewards import composition

OCR = (
    {"name": "ocr", "label": "ocr_exact", "mode": "exact"},
    {"name": "ocr", "label": "ocr_soft"},
)
"""The trained reward on held-out prompts, and its strict form."""

PREFERENCE = ({"name": "preference"},)
"""The learned reward on held-out prompts."""
INK = (60.0, 0.4)
"""Least distance in RGB, and least part of the largest, from which ``utility`` takes ink."""
SIGN = re.compile(r'a sign "(.+)"')
OBJECTS = re.compile(rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})s")

Images = Sequence[Image.Image]


def template(prompts: Sequence[str], images: Images, text: Sequence[str], **_: Any) -> list[float]:
    """1 where ``judges.TemplateJudge`` reads the text, else 0."""
    return _read_exactly(_template_judge(), images, text)


def ddddocr(prompts: Sequence[str], images: Images, text: Sequence[str], **_: Any) -> list[float]:
    """1 where ``judges.DdddOcr`` reads the text, else 0."""
    return _read_exactly(_ddddocr_judge(), images, text)


def utility(prompts: Sequence[str], images: Images, **_: Any) -> list[float]:
    """What the model of ``preference`` was taught to estimate, measured on the pixels; in [0, 1].

    The grades of ``assets/build_preference.py`` are defined on layers; here the background is the
    median of the border, and ink is what differs enough from it.  0 without ink.  Strong patterns
    behind faint ink pass for ink themselves, which makes such a picture look better than it is.
    """
    pixels = torch.stack([torch.from_numpy(255 * _pixels(image)) for image in images])
    alpha, deviation = _layers(pixels.float().permute(0, 3, 1, 2))
    ink = alpha.sum((1, 2, 3)) > 0
    found = torch.zeros(len(images))
    grades = build_preference.grades(alpha[ink], (alpha * deviation)[ink], deviation[ink])
    found[ink] = build_preference.utility(grades)
    return found.tolist()


def faithful(prompts: Sequence[str], images: Images, **_: Any) -> list[float]:
    """1 where the picture shows what an open prompt asks for, else 0.

    A sign: ``judges.TemplateJudge`` reads its text.  A scene: for each kind of objects that the
    prompt names, ``rewards.composition`` sees at least one.
    """
    return [_shows(prompt, image) for prompt, image in zip(prompts, images, strict=True)]


def saturation(prompts: Sequence[str], images: Images, **_: Any) -> list[float]:
    """Mean over pixels of (max - min) / max over channels, 0 where black; in [0, 1]."""
    return [float(np.mean(_saturation(_pixels(image)))) for image in images]


def contrast(prompts: Sequence[str], images: Images, **_: Any) -> list[float]:
    """Standard deviation of grey values, which are in [0, 1]."""
    return [float(np.std(_grey(image))) for image in images]


def grain(prompts: Sequence[str], images: Images, **_: Any) -> list[float]:
    """Root mean square of the 4-neighbour Laplacian of grey values, off the border.

    Large for pixel noise and for hard edges.
    """
    return [float(np.sqrt(np.mean(_laplacian(_grey(image)) ** 2))) for image in images]


def diversity(prompts: Sequence[str], images: Images, **_: Any) -> list[float]:
    """``judges.diversity`` of the pictures of the prompt, the same for each of them."""
    return [judges.diversity([images])] * len(images)


MEASURES: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (
        template, ddddocr, utility, faithful, saturation, contrast, grain, diversity,
    )
}  # fmt: skip
LOOKS = ("saturation", "contrast", "grain", "diversity")


def available(reward: str) -> list[str]:
    """Names of the measures that work here for pictures of the prompts of a reward."""
    if reward == "preference":
        return ["utility", "faithful", *LOOKS]
    return ["template", *(["ddddocr"] if find_spec("ddddocr") else []), *LOOKS]


def evaluation_rewards(names: Sequence[str], reward: str) -> list[dict[str, str]]:
    """Section ``evaluation.rewards``: the trained reward, its strict form, and these measures."""
    trained = PREFERENCE if reward == "preference" else OCR
    return [*trained, *({"name": f"{__name__}.{name}", "label": name} for name in names)]


def _layers(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Ink [N, 1, H, W], 0 or 1, and difference from the background [N, 3, H, W] of [0, 255]."""
    border = torch.cat(
        [pictures[:, :, 0], pictures[:, :, -1], pictures[..., 0], pictures[..., -1]], dim=2
    )
    deviation = pictures - border.median(dim=2).values[:, :, None, None]
    distance = deviation.norm(dim=1, keepdim=True)
    least, part = INK
    # Not the maximum, which may be one noisy pixel.
    largest = distance.flatten(1).quantile(0.98, dim=1).view(-1, 1, 1, 1)
    return (distance > (part * largest).clamp(min=least)).float(), deviation


def _shows(prompt: str, image: Image.Image) -> float:
    sign = SIGN.fullmatch(prompt)
    if sign:
        return template([prompt], [image], text=[sign[1]])[0]
    asked = [composition.Wanted(colour=c or None, shape=s) for c, s in OBJECTS.findall(prompt)]
    seen = composition.seen(image)
    return float(all(composition.matching(seen, entry) for entry in asked))


@cache
def _template_judge() -> judges.Judge:
    return judges.TemplateJudge()


@cache
def _ddddocr_judge() -> judges.Judge:
    return judges.DdddOcr()


def _read_exactly(judge: judges.Judge, images: Images, texts: Sequence[str]) -> list[float]:
    read = judge.read(images)
    return [float(r == text.upper()) for r, text in zip(read, texts, strict=True)]


def _pixels(image: Image.Image) -> np.ndarray:
    """[H W 3] float64 in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def _grey(image: Image.Image) -> np.ndarray:
    return _pixels(image).mean(axis=-1)


def _saturation(pixels: np.ndarray) -> np.ndarray:
    top, bottom = pixels.max(axis=-1), pixels.min(axis=-1)
    return (top - bottom) / np.where(top > 0, top, 1.0)


def _laplacian(grey: np.ndarray) -> np.ndarray:
    """[H-2, W-2]."""
    inner = grey[1:-1, 1:-1]
    return grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
