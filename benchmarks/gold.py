"""What held-out pictures look like to judges that training never sees, as rewards of evaluation.

Each function is called as a reward is: the pictures of one prompt, and its columns.  None of them
trains anything; ``evaluation_rewards`` writes them into a run beside the reward that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import judges

OCR = (
    {"name": "ocr", "label": "ocr_exact", "mode": "exact"},
    {"name": "ocr", "label": "ocr_soft"},
)
"""The trained reward on held-out prompts, and its strict form."""

Images = Sequence[Image.Image]


def template(prompts: Sequence[str], images: Images, text: Sequence[str], **_: Any) -> list[float]:
    """1 where ``judges.TemplateJudge`` reads the text, else 0."""
    return _read_exactly(_template_judge(), images, text)


def ddddocr(prompts: Sequence[str], images: Images, text: Sequence[str], **_: Any) -> list[float]:
    """1 where ``judges.DdddOcr`` reads the text, else 0."""
    return _read_exactly(_ddddocr_judge(), images, text)


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
    for function in (template, ddddocr, saturation, contrast, grain, diversity)
}


def available() -> list[str]:
    """Names of the measures that work here."""
    return [name for name in MEASURES if name != "ddddocr" or find_spec("ddddocr")]


def evaluation_rewards(names: Sequence[str]) -> list[dict[str, str]]:
    """Section ``evaluation.rewards``: the trained reward, its strict form, and these measures."""
    return [*OCR, *({"name": f"{__name__}.{name}", "label": name} for name in names)]


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
