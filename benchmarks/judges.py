"""Readers of the small signs that no reward has seen, and how diverse pictures are.

Each judge has ``name`` and ``read``: one upper-case text for each picture.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, Protocol

import numpy as np
from PIL import Image

from assets import textart

TEXTS = textart.NUMBERS + textart.WORDS


class Judge(Protocol):
    """Something that reads."""

    name: str

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """The text of each picture, upper case, "" where none is seen."""
        ...


class DdddOcr:
    """ddddocr: a recogniser with its own network and training data, shipped in its package."""

    name = "ddddocr"

    def __init__(self) -> None:
        """``ImportError`` unless the extra ``benchmark`` is installed."""
        import ddddocr  # pyright: ignore[reportMissingImports] - optional

        # Its default model; the one called beta reads some zeros as the letter O.
        self._engine: Any = ddddocr.DdddOcr(show_ad=False)

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """See ``Judge``."""
        return [str(self._engine.classification(_png(image))).upper() for image in images]


class TemplateJudge:
    """The text whose rendering correlates best with the picture.

    Candidates are all texts in all fonts, sizes and positions that ``textart`` draws.  Grey values
    have their mean removed and are scaled to norm 1, so neither colour nor background matters; the
    score is the inner product.  It always answers, so a smudge counts as its nearest text.
    """

    name = "template"

    def __init__(self, texts: Sequence[str] = TEXTS) -> None:
        layouts = list(_layouts())
        self._texts = [text for text in texts for _ in layouts]
        self._templates = np.stack(
            [
                _unit(textart.render(text, "black", layout))
                for text, layout in product(texts, layouts)
            ]
        )

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """See ``Judge``."""
        pictures = np.stack([_unit(np.asarray(image.convert("RGB"))) for image in images])
        best = (pictures @ self._templates.T).argmax(axis=1)
        return [self._texts[index] for index in best]


def available_judges() -> list[Judge]:
    """Every judge that is installed."""
    try:
        return [DdddOcr(), TemplateJudge()]
    except ImportError:
        return [TemplateJudge()]


def accuracy(judge: Judge, images: Sequence[Image.Image], texts: Sequence[str]) -> float:
    """Share of pictures that the judge reads exactly, whatever the case."""
    read = judge.read(images)
    return float(np.mean([r == text.upper() for r, text in zip(read, texts, strict=True)]))


def ground_truth(count: int, seed: int = 0) -> tuple[list[Image.Image], list[str]]:
    """Rendered signs and their texts: what a judge has to read to be believed."""
    rng = random.Random(seed)
    texts = [rng.choice(TEXTS) for _ in range(count)]
    colours = list(textart.COLOURS)
    images = [
        Image.fromarray(textart.render(text, rng.choice(colours), textart.random_layout(rng)))
        for text in texts
    ]
    return images, texts


def diversity(groups: Sequence[Sequence[Image.Image]]) -> float:
    """How different pictures of one prompt are: 0 for copies, at most 1.

    Mean over prompts of the mean over pairs i < j of sqrt(mean over pixels and channels of
    (x_i - x_j)^2), pixels in [0, 1].  Prompts with fewer than two pictures are left out;
    ``ValueError`` if none remains.
    """
    means = [np.mean(_pair_distances(group)) for group in groups if len(group) > 1]
    if not means:
        raise ValueError("diversity needs a prompt with two pictures or more")
    return float(np.mean(means))


def _pair_distances(images: Sequence[Image.Image]) -> list[float]:
    pixels = [np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in images]
    return [float(np.sqrt(np.mean((a - b) ** 2))) for a, b in combinations(pixels, 2)]


def _layouts():
    for font, size, dx, dy in product(
        textart.FONTS, textart.SIZES, textart.OFFSETS_X, textart.OFFSETS_Y
    ):
        yield textart.Layout(font, size, dx, dy, (255, 255, 255))


def _unit(pixels: np.ndarray) -> np.ndarray:
    """Grey values [H W] without their mean, norm 1 (0 for a flat picture)."""
    grey = pixels.astype(np.float32).mean(axis=-1).ravel()
    grey -= grey.mean()
    return grey / max(float(np.linalg.norm(grey)), 1e-6)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
