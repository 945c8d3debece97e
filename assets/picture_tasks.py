"""Questions about small pictures, for the tiny vision-language model.

Pictures are the scenes of shapes.py and the signs of textart.py, 32x64 pixels.  As in text_tasks.py
an item comes with a trace of reasoning, and ``slip`` leads that to a wrong answer.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from assets import shapes, textart
from assets.shapes import Box, Kind, Placed, Scene
from assets.text_tasks import Item
from rewards.box_iou import boxes, matched

QUESTIONS = {
    "count": "How many {} are there?",
    "colour": "What colour is the {}?",
    "compare": "Are there more {} or more {}?",
    "position": "Is the {} left of, right of, above or below the {}?",
    "box": "Where is the {}?",
    "read": "What does the sign say?",
    "describe": "What is in the picture?",
}
ASKED = ("count", "colour", "compare", "position", "box", "read")
"""The tasks that there are prompts of; the other one only teaches to see."""
SHARES: dict[str, float] = {
    "count": 1,
    "colour": 1,
    "compare": 1,
    "position": 1.5,
    "box": 2,
    "read": 2.5,
    "describe": 4,
}
"""How often a task is drawn in the cold start, relatively."""


COLUMNS = textart.WIDTH // shapes.CELL
CELLS = "abcdefgh"
"""Names of the cells of a scene, row by row: each of them a token."""


@dataclass(frozen=True, kw_only=True)
class PictureItem(Item):
    """An item that asks about a picture: ``image`` is uint8 [32, 64, 3]."""

    image: np.ndarray

    @property
    def key(self) -> str:
        """The same may be asked of many pictures."""
        return self.prompt + self.image.tobytes().hex()

    def right(self, answer: str | None) -> bool:
        """Equal, or a box with an IoU of at least a half."""
        if self.task != "box" or answer is None:
            return super().right(answer)
        return matched(boxes(answer, "xyxy"), boxes(self.answer, "xyxy")) >= 0.5

    @property
    def row(self) -> dict[str, Any]:
        """A row of a prompt file; the image as ``datasets`` stores one."""
        return super().row | {"images": [{"bytes": png(self.image), "path": None}]}


def png(image: np.ndarray) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def count(rng: random.Random, slip: bool = False) -> PictureItem:
    """One to four of a shape, often beside another."""
    shape, other = rng.sample(shapes.SHAPES, 2)
    number = rng.randint(1, shapes.MAX_OBJECTS)
    rest = rng.randint(0, shapes.MAX_OBJECTS - number)
    said = _other(number, range(1, shapes.MAX_OBJECTS + 1), rng) if slip else number
    return _item(
        "count",
        _draw([(shape, number), (other, rest)], rng),
        names=[f"{shape}s"],
        steps=[shape] * said,
        answer=str(said),
        rng=rng,
    )


def colour(rng: random.Random, slip: bool = False) -> PictureItem:
    """The colour of one of two shapes."""
    shape, other = rng.sample(shapes.SHAPES, 2)
    mine, theirs = rng.sample(list(shapes.COLOURS), 2)
    kinds = [Kind(shape=shape, colour=mine), Kind(shape=other, colour=theirs)]
    scene = shapes.random_scene(kinds, None, rng)
    said = _other(mine, shapes.COLOURS, rng) if slip else mine
    steps = [f"{shape} {_cell(scene.objects[0])} {said}"]
    return _about("colour", shapes.render(scene), [shape], steps, said)


def compare(rng: random.Random, slip: bool = False) -> PictureItem:
    """Which of two shapes there are more of."""
    shape, other = rng.sample(shapes.SHAPES, 2)
    one, two = rng.choice([(1, 2), (1, 3), (2, 1), (3, 1)])
    kinds = _draw([(shape, one), (other, two)], rng)
    seen = (two, one) if slip else (one, two)
    said = shape if seen[0] > seen[1] else other
    names = [f"{shape}s", f"{other}s"]
    steps = [f"{names[0]} {seen[0]}", f"{names[1]} {seen[1]}"]
    return _item("compare", kinds, names, steps, f"{said}s", rng)


def position(rng: random.Random, slip: bool = False) -> PictureItem:
    """How one shape stands to another."""
    shape, other = rng.sample(shapes.SHAPES, 2)
    relation = rng.choice(shapes.RELATIONS)
    kinds = _draw([(shape, 1), (other, 1)], rng)
    scene = shapes.random_scene(kinds, relation, rng)
    said = _other(relation, shapes.RELATIONS, rng) if slip else relation
    steps = [f"{item.shape} {_cell(item)}" for item in scene.objects]
    image = shapes.render(scene)
    return _about("position", image, [shape, other], steps, said.removesuffix(" of"))


def box(rng: random.Random, slip: bool = False) -> PictureItem:
    """The box of one of up to three different objects: left, top, right, bottom in pixels."""
    names = rng.sample(shapes.SHAPES, rng.randint(1, 3))
    scene = shapes.random_scene(_draw([(name, 1) for name in names], rng), None, rng)
    wanted = scene.objects[0]
    found = wanted.box()
    if slip:
        dx, dy = rng.choice([(5, 0), (-5, 0), (0, 4), (0, -4), (8, 3)])
        found = (found[0] + dx, found[1] + dy, found[2] + dx, found[3] + dy)
    image = shapes.render(scene)
    return _about("box", image, [wanted.shape], [_cell(wanted)], _written(found))


def read(rng: random.Random, slip: bool = False) -> PictureItem:
    """A sign with a number or a short word."""
    text, image = random_sign(rng)
    said = list(text)
    if slip:
        i = rng.randrange(len(said))
        letters = "0123456789" if said[i].isdigit() else "ABCEGHMNPRSTUW"
        said[i] = _other(said[i], letters, rng)
    return _about("read", image, [], said, "".join(said))


def describe(rng: random.Random, slip: bool = False) -> PictureItem:
    """What is in each cell, row by row, and how many things there are; without slips."""
    del slip
    scene = random_scene(rng)
    placed = {_cell(item): f"{item.colour} {item.shape}" for item in scene.objects}
    steps = [f"{cell} {placed.get(cell, 'nothing')}" for cell in CELLS]
    return _about("describe", shapes.render(scene), [], steps, str(len(placed)))


def random_scene(rng: random.Random) -> Scene:
    """Up to four objects of any shapes and colours."""
    kinds = [
        Kind(shape=shape, colour=rng.choice(list(shapes.COLOURS)))
        for shape in rng.choices(shapes.SHAPES, k=rng.randint(1, shapes.MAX_OBJECTS))
    ]
    return shapes.random_scene(kinds, None, rng)


def random_sign(rng: random.Random) -> tuple[str, np.ndarray]:
    """A number or a short word, and its picture."""
    text = rng.choice(rng.choice((textart.NUMBERS, textart.WORDS)))
    ink = rng.choice(list(textart.COLOURS))
    return text, textart.render(text, ink, textart.random_layout(rng))


def cell_of(item: Placed) -> tuple[int, int]:
    """Column and row of the cell that the object stands in."""
    return int(item.x) // shapes.CELL, int(item.y) // shapes.CELL


def _draw(counts: list[tuple[str, int]], rng: random.Random) -> list[Kind]:
    """Kinds in different colours, those there are none of left out."""
    colours = rng.sample(list(shapes.COLOURS), len(counts))
    return [
        Kind(shape=shape, colour=name, count=number)
        for (shape, number), name in zip(counts, colours, strict=True)
        if number
    ]


def _item(
    task: str,
    kinds: list[Kind],
    names: list[str],
    steps: list[str],
    answer: str,
    rng: random.Random,
) -> PictureItem:
    """An item about a scene with these kinds."""
    return _about(task, shapes.render(shapes.random_scene(kinds, None, rng)), names, steps, answer)


def _about(
    task: str, image: np.ndarray, names: list[str], steps: list[str], answer: str
) -> PictureItem:
    prompt = QUESTIONS[task].format(*names)
    return PictureItem(task=task, prompt=prompt, steps=tuple(steps), answer=answer, image=image)


def _other(value: Any, choices: Any, rng: random.Random) -> Any:
    return rng.choice([choice for choice in choices if choice != value])


def _cell(item: Placed) -> str:
    column, row = cell_of(item)
    return CELLS[row * COLUMNS + column]


def _written(found: Box) -> str:
    return f"[{','.join(str(max(0, round(edge))) for edge in found)}]"


_MAKERS: Mapping[str, Callable[..., PictureItem]] = {
    "count": count,
    "colour": colour,
    "compare": compare,
    "position": position,
    "box": box,
    "read": read,
    "describe": describe,
}


def make(task: str, rng: random.Random, slip: bool = False) -> PictureItem:
    """A random item of a task."""
    return _MAKERS[task](rng, slip)
