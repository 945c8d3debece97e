"""Render the small scenes of flat shapes of the composition task.

One scene is 32x64 pixels: up to four circles, squares and triangles on a light background.  The
prompt names shapes, counts, colours and places; size, position and background are left to the
model's noise.  Objects stand upright near the centres of a grid of cells and never touch each other
or the border: a model of two million parameters learns such scenes in minutes on two cores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from assets.textart import BACKGROUNDS, HEIGHT, WIDTH
from assets.textart import COLOURS as INKS

SHAPES = ("circle", "square", "triangle")
COLOURS = {name: INKS[name] for name in ("red", "blue", "green", "purple", "black")} | {
    "yellow": (240, 190, 0)
}
RELATIONS = ("left of", "right of", "above", "below")
NUMERALS = {1: "a", 2: "two", 3: "three", 4: "four"}
MAX_OBJECTS = 4

CELL = 16
"""Width and height of a cell, pixels."""
RADII = (4.8, 5.6)
"""The two sizes: radius of a circle, of a square of its area, of a triangle somewhat smaller."""
OFFSETS = (-0.5, 0.0, 0.5)
"""Where the centre of an object's box may stand beside the centre of its cell, pixels."""
MARGIN = 1.5
"""Least distance in pixels from the border."""
GAP = 2.0
"""Least distance in pixels between the boxes of two objects."""
MAX_SLANT = 0.5
"""Largest offset across a relation's direction, as a part of the offset along it."""
TRIANGLE_SCALE = 1.4
"""Radius of a triangle's corners over ``radius``; equal areas would need 1.56, too high for two."""
SUPERSAMPLING = 8

_POLYGONS = {
    "circle": (48, 1.0, 0.0),
    "square": (4, math.sqrt(math.pi / 2), math.pi / 4),
    "triangle": (3, TRIANGLE_SCALE, -math.pi / 2),
}
"""Number of corners, their distance from the centre over `radius`, angle of the first."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """``count`` objects of one shape and colour (``None``: any colour, the same for all)."""

    shape: str
    colour: str | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One object: centre and size in pixels, angle in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float = 0.0

    def outline(self) -> list[tuple[float, float]]:
        """Corners (x, y) of the object; a circle has many."""
        count, scale, turn = _POLYGONS[self.shape]
        reach = self.radius * scale
        angles = [turn + self.angle + i * (2 * math.pi / count) for i in range(count)]
        return [(self.x + reach * math.cos(a), self.y + reach * math.sin(a)) for a in angles]

    def box(self) -> Box:
        """The least upright rectangle around the object."""
        if self.shape == "circle":
            reach = self.radius
            return self.x - reach, self.y - reach, self.x + reach, self.y + reach
        xs, ys = zip(*self.outline(), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything an image shows."""

    objects: tuple[Placed, ...]
    background: tuple[int, int, int] = BACKGROUNDS[0]


# ---------------------------------------------------------------- words


def prompt_for(kinds: Sequence[Kind], relation: str | None = None) -> str:
    """The prompt of one or two kinds of objects."""
    return f" {relation or 'and'} ".join(map(_phrase, kinds))


def _phrase(kind: Kind) -> str:
    noun = kind.shape if kind.count == 1 else kind.shape + "s"
    return " ".join(filter(None, (NUMERALS[kind.count], kind.colour, noun)))


def words() -> list[str]:
    """Every word that prompts use."""
    plurals = [shape + "s" for shape in SHAPES]
    places = [word for relation in RELATIONS for word in relation.split()]
    return list(dict.fromkeys([*NUMERALS.values(), "and", *COLOURS, *SHAPES, *plurals, *places]))


# ---------------------------------------------------------------- scenes


def random_scene(kinds: Sequence[Kind], relation: str | None, rng: random.Random) -> Scene:
    """Draw everything the prompt leaves open, by rejection."""
    plain = [_painted(kind, rng) for kind in kinds]
    while True:
        objects = _arranged([p for kind in plain for p in kind], rng)
        if objects and (relation is None or stands(*objects, relation)):
            return Scene(objects=objects, background=rng.choice(BACKGROUNDS))


def _painted(kind: Kind, rng: random.Random) -> list[Placed]:
    """The objects of a kind, not yet placed."""
    colour = kind.colour or rng.choice(list(COLOURS))
    return [Placed(shape=kind.shape, colour=colour, x=0, y=0, radius=1)] * kind.count


def _arranged(objects: Sequence[Placed], rng: random.Random) -> tuple[Placed, ...] | None:
    """The objects one after the other at random free places; ``None`` when it becomes too full."""
    placed: list[Placed] = []
    for item in objects:
        for _ in range(20):
            drawn = _drawn(item, rng)
            if fits(drawn, placed):
                placed.append(drawn)
                break
        else:
            return None
    return tuple(placed)


def _drawn(item: Placed, rng: random.Random) -> Placed:
    """The object in a size, at a cell, with its box (not its centre of mass) in the middle."""
    sized = replace(item, x=0.0, y=0.0, radius=rng.choice(RADII))
    left, top, right, bottom = sized.box()
    return replace(
        sized,
        x=_cell_centre(WIDTH, rng) + rng.choice(OFFSETS) - (left + right) / 2,
        y=_cell_centre(HEIGHT, rng) + rng.choice(OFFSETS) - (top + bottom) / 2,
    )


def _cell_centre(length: int, rng: random.Random) -> float:
    return CELL * (rng.randrange(length // CELL) + 0.5)


def fits(item: Placed, others: Sequence[Placed]) -> bool:
    """Whether an object keeps its distance from the border and from all others."""
    left, top, right, bottom = box = item.box()
    inside = min(left, top, WIDTH - right, HEIGHT - bottom) >= MARGIN
    return inside and all(max(_gaps(box, other.box())) >= GAP for other in others)


def _gaps(a: Box, b: Box) -> tuple[float, float]:
    """Free pixels between two boxes along x and along y; negative where they overlap."""
    return max(a[0] - b[2], b[0] - a[2]), max(a[1] - b[3], b[1] - a[3])


def stands(first: Placed, second: Placed, relation: str) -> bool:
    """Whether ``first`` stands unmistakably ``relation`` ``second``."""
    axis = 0 if relation in ("left of", "right of") else 1
    sign = -1 if relation in ("left of", "above") else 1
    offset = (first.x - second.x, first.y - second.y)
    along, across = sign * offset[axis], abs(offset[1 - axis])
    clear = _gaps(first.box(), second.box())[axis] >= GAP
    return clear and along > 0 and across <= MAX_SLANT * along


# ---------------------------------------------------------------- pixels


def render(scene: Scene) -> np.ndarray:
    """One scene as an anti-aliased uint8 array of shape (32, 64, 3)."""
    canvas = np.empty((HEIGHT * SUPERSAMPLING, WIDTH * SUPERSAMPLING, 3), np.uint8)
    canvas[:] = scene.background
    for item in scene.objects:
        # Pixel edges are whole numbers here; OpenCV puts whole numbers at pixel centres.
        points = np.round(np.array(item.outline()) * SUPERSAMPLING - 0.5).astype(np.int32)
        cv2.fillPoly(canvas, [points], COLOURS[item.colour])
    return cv2.resize(canvas, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
