"""Images that look like an answer to a composition prompt and are none.

Each function takes the row of a prompt and a random generator and returns a uint8 image of shape
(32, 64, 3), or `None` where there is no such mistake to make.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from assets import shapes, textart
from assets.shapes import Kind, Scene

STRIPE_CONTRASTS = (30, 60, 120)


def wrong_count(row: dict, rng: random.Random) -> np.ndarray | None:
    """One object more or fewer of a kind."""
    kinds = _kinds(row)
    index = rng.randrange(len(kinds))
    change = rng.choice((-1, 1)) if _total(kinds) < shapes.MAX_OBJECTS else -1
    if row["relation"] and change == 1:
        return None  # the place of the additional object would be open
    kinds[index] = replace(kinds[index], count=kinds[index].count + change)
    kinds = [kind for kind in kinds if kind.count]
    return _shown(kinds, row["relation"] if len(kinds) == 2 else None, rng)


def wrong_shape(row: dict, rng: random.Random) -> np.ndarray | None:
    """A kind in a shape that the prompt does not name."""
    kinds = _kinds(row)
    index = rng.randrange(len(kinds))
    others = [shape for shape in shapes.SHAPES if shape not in {kind.shape for kind in kinds}]
    kinds[index] = replace(kinds[index], shape=rng.choice(others))
    return _shown(kinds, row["relation"], rng)


def wrong_colour(row: dict, rng: random.Random) -> np.ndarray | None:
    """A kind in a colour that the prompt does not name."""
    kinds = _kinds(row)
    index = rng.randrange(len(kinds))
    if kinds[index].colour is None:
        return None
    others = [colour for colour in shapes.COLOURS if colour not in {k.colour for k in kinds}]
    kinds[index] = replace(kinds[index], colour=rng.choice(others))
    return _shown(kinds, row["relation"], rng)


def swapped_colours(row: dict, rng: random.Random) -> np.ndarray | None:
    """The right shapes and the right colours, but the other way round."""
    kinds = _kinds(row)
    if len(kinds) < 2 or kinds[0].colour is None:
        return None
    first, second = kinds
    swapped = [replace(first, colour=second.colour), replace(second, colour=first.colour)]
    return _shown(swapped, row["relation"], rng)


def wrong_place(row: dict, rng: random.Random) -> np.ndarray | None:
    """Another relation than the one asked for."""
    if row["relation"] is None:
        return None
    others = [relation for relation in shapes.RELATIONS if relation != row["relation"]]
    return _shown(_kinds(row), rng.choice(others), rng)


def extra_object(row: dict, rng: random.Random) -> np.ndarray | None:
    """All that was asked for, and an object of another shape or, if all are named, any."""
    kinds = _kinds(row)
    if _total(kinds) == shapes.MAX_OBJECTS:
        return None
    named = {kind.shape for kind in kinds}
    others = [shape for shape in shapes.SHAPES if shape not in named]
    extra = Kind(shape=rng.choice(others), colour=rng.choice(list(shapes.COLOURS)))
    while True:
        scene = shapes.random_scene([*kinds, extra], None, rng)
        if row["relation"] is None or shapes.stands(*scene.objects[:2], row["relation"]):
            return shapes.render(scene)


def touching(row: dict, rng: random.Random) -> np.ndarray | None:
    """Two objects, or one and a copy of it, that run into each other."""
    scene = shapes.random_scene(_kinds(row), row["relation"], rng)
    first, *others = scene.objects
    second, *rest = others or [first]
    away = 1.3 * first.radius * rng.choice((-1, 1))
    x = first.x + away if 8 <= first.x + away <= shapes.WIDTH - 8 else first.x - away
    merged = (first, replace(second, x=x, y=first.y), *rest)
    return shapes.render(replace(scene, objects=merged))


def blank(row: dict, rng: random.Random) -> np.ndarray | None:
    """Background alone."""
    return shapes.render(Scene(objects=(), background=rng.choice(textart.BACKGROUNDS)))


def noise(row: dict, rng: random.Random) -> np.ndarray | None:
    """Independent uniform pixels."""
    pixels = np.random.default_rng(rng.getrandbits(32))
    return pixels.integers(0, 256, (shapes.HEIGHT, shapes.WIDTH, 3), dtype=np.uint8)


def text_sign(row: dict, rng: random.Random) -> np.ndarray | None:
    """A sign of the other task, in a colour that was asked for."""
    text = rng.choice(textart.NUMBERS + textart.WORDS)
    colours = [kind.colour for kind in _kinds(row) if kind.colour in textart.COLOURS]
    colour = rng.choice(colours or list(textart.COLOURS))
    return textart.render(text, colour, textart.random_layout(rng))


def striped(row: dict, rng: random.Random) -> np.ndarray | None:
    """The right objects on stripes."""
    image = shapes.render(replace(_scene(row, rng), background=(255, 255, 255)))
    axis, period = rng.choice(((0, 4), (0, 8), (1, 4), (1, 8)))
    dark = np.arange(image.shape[axis]) % period < period // 2
    stripes = np.where(dark, 255 - rng.choice(STRIPE_CONTRASTS), 255)
    stripes = stripes.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    return np.minimum(image, stripes).astype(np.uint8)


DISTRACTORS = (
    wrong_count,
    wrong_shape,
    wrong_colour,
    swapped_colours,
    wrong_place,
    extra_object,
    touching,
    blank,
    noise,
    text_sign,
    striped,
)


def _kinds(row: dict) -> list[Kind]:
    return [Kind(**entry) for entry in row["objects"]]


def _total(kinds: Sequence[Kind]) -> int:
    return sum(kind.count for kind in kinds)


def _scene(row: dict, rng: random.Random) -> Scene:
    return shapes.random_scene(_kinds(row), row["relation"], rng)


def _shown(kinds: Sequence[Kind], relation: str | None, rng: random.Random) -> np.ndarray:
    """A random scene; blank where nothing is left to show."""
    if not kinds:
        return shapes.render(Scene(objects=()))
    return shapes.render(shapes.random_scene(kinds, relation, rng))
