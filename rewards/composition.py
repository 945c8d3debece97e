"""Does the image show the shapes, counts, colours and places that the prompt asks for?

Range: ``strict`` is 0 or 1; ``soft`` is at most 1 and falls below 0 where far too many objects are
shown; higher is better.  A miniature of GenEval for flat shapes, checked by classical vision.  The
columns ``objects`` and ``relation`` say what is asked for, so no prompt is parsed; NaN without
``objects``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.schema import StrictModel, nearest, validate
from rewards._shapes import Blob, View, view

PAPER = "Ghosh et al. 2023, arXiv:2310.11513"

MAX_CLUTTER = 20.0
"""Largest mean RGB distance from the background colour, beside the objects, of a plain one."""
POSITION_TOLERANCE = 0.1
"""Part of the summed sizes by which centres must be apart before there is any direction."""
DIRECTIONS = {
    "left of": (-1.0, 0.0),
    "right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}
"""From the second object to the first, x to the right and y downwards."""


class Wanted(StrictModel):
    """One entry of the column ``objects``."""

    shape: Literal["circle", "square", "triangle"] = Field(description="kind of the objects")
    colour: Literal["red", "blue", "green", "yellow", "purple", "black"] | None = Field(
        default=None, description="their colour; null: any"
    )
    count: int = Field(default=1, ge=1, description="how many of them")


class Config(StrictModel):
    """How what is seen is compared with what is asked for."""

    mode: Literal["strict", "soft"] = Field(
        default="soft",
        description="strict: 1 if exactly the objects asked for are there, in their colours and "
        "places, on a plain background, and nothing else, else 0; soft: mean of the sub-scores",
    )


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, images, objects=None, relation=None, **columns) -> [N]`` float32.

    ``objects``: for each sample a list of mappings with the keys of ``Wanted``.  ``relation``: None
    or one of ``DIRECTIONS``, the place of the first entry of two as seen from the second.  The
    call raises ``UserError`` if they say anything else, ``TypeError`` without PIL images.
    """
    score = {"strict": strict_score, "soft": soft_score}[config.mode]

    def reward(
        prompts: Sequence[str],
        outputs: Sequence[Any],
        objects: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
        relation: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> Tensor:
        nothing = [None] * len(prompts)
        rows = zip(outputs, objects or nothing, relation or nothing, strict=True)
        return torch.tensor(
            [
                math.nan if entries is None else score(seen(image), *asked(entries, place))
                for image, entries, place in rows
            ]
        )

    return reward


def asked(
    entries: Sequence[Mapping[str, Any]], relation: str | None
) -> tuple[list[Wanted], str | None]:
    """The columns of one sample, checked; ``UserError`` naming what is wrong."""
    wanted = [validate(Wanted, entry, f"objects[{i}]") for i, entry in enumerate(entries)]
    if not wanted:
        raise UserError("objects: at least one entry is needed, got []")
    if relation is not None and relation not in DIRECTIONS:
        raise UserError(f"relation: unknown {relation!r}; {nearest(relation, list(DIRECTIONS))}")
    if relation is not None and len(wanted) != 2:
        raise UserError(f"relation: {relation!r} needs two entries in objects, not {len(wanted)}")
    return wanted, relation


def seen(image: Any) -> View:
    """What stands in a PIL image."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"composition is judged on PIL images, not {type(image).__name__}")
    return view(np.asarray(image.convert("RGB")))


# --- scores -------------------------------------------------------------------------------------


def strict_score(view: View, wanted: Sequence[Wanted], relation: str | None) -> float:
    """1 if counts, colours and relation are exact, the background is plain and nothing is extra.

    GenEval's strict accuracy allows objects that the prompt does not name; this one does not.
    """
    exact = all(len(matching(view, entry)) == entry.count for entry in wanted)
    nothing_else = len(view.blobs) == sum(entry.count for entry in wanted)
    plain = view.clutter <= MAX_CLUTTER
    return float(exact and nothing_else and plain and holds(view, wanted, relation))


def soft_score(view: View, wanted: Sequence[Wanted], relation: str | None) -> float:
    """Mean over all sub-scores, as GenEval serves as a training reward.

    For each entry with count n, of which m are seen by shape alone: 1 - |n - m| / n; if it has a
    colour, the same with m seen by shape and colour; if there is a relation, 1 if it holds, else 0.
    Sub-scores are not floored (m = 3n gives -1), and objects nobody asked for cost nothing.
    """
    scores = []
    for entry in wanted:
        scores.append(_count_score(entry.count, len(matching(view, entry, colour=False))))
        if entry.colour is not None:
            scores.append(_count_score(entry.count, len(matching(view, entry))))
    if relation is not None:
        scores.append(float(holds(view, wanted, relation)))
    return sum(scores) / len(scores)


def _count_score(wanted: int, found: int) -> float:
    return 1.0 - abs(wanted - found) / wanted


def matching(view: View, entry: Wanted, *, colour: bool = True) -> list[Blob]:
    """The objects of the entry's shape and, unless it names none or ``colour`` is off, colour."""
    any_colour = entry.colour is None or not colour
    return [
        blob
        for blob in view.blobs
        if blob.shape == entry.shape and (any_colour or blob.colour == entry.colour)
    ]


def holds(view: View, wanted: Sequence[Wanted], relation: str | None) -> bool:
    """Whether every object of the first entry stands so to every one of the second; both exist."""
    if relation is None:
        return True
    firsts, seconds = (matching(view, entry) for entry in wanted)
    pairs = list(product(firsts, seconds))
    return bool(pairs) and all(relation in relations(a, b) for a, b in pairs)


def relations(first: Blob, second: Blob) -> frozenset[str]:
    """How ``first`` stands to ``second``: none if they nearly coincide, two on a diagonal.

    GenEval's rule: centre offsets shrink by a tenth of the summed sizes, and a direction holds
    where the rest is more than half of the distance between the centres.
    """
    a, b = np.reshape(first.box, (2, 2)), np.reshape(second.box, (2, 2))
    offset = a.mean(0) - b.mean(0)
    margin = POSITION_TOLERANCE * (np.ptp(a, 0) + np.ptp(b, 0))
    rest = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0.0)
    distance = np.linalg.norm(offset)
    return frozenset(n for n, axis in DIRECTIONS.items() if rest @ axis > 0.5 * distance)
