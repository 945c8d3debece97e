"""Teaches a vision tower to see small pictures before a language model learns to talk about them.

A linear reader, thrown away afterwards, must name the object in each cell of a scene, and the cell
itself, from the one token that covers it, and the characters of a sign from all tokens together.
Without it the loss of a language model takes hours to reach the tower of so small a model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from assets import shapes, textart
from assets.picture_tasks import cell_of, random_scene, random_sign

BATCH, LEARNING_RATE, SIGNS = 96, 3e-3, 0.6
"""Pictures of a step, its rate at most, and the share of them that are signs."""
CELLS = (textart.WIDTH // shapes.CELL) * (textart.HEIGHT // shapes.CELL)
KINDS = [None, *((shape, colour) for shape in shapes.SHAPES for colour in shapes.COLOURS)]
"""What may be in a cell."""
LETTERS = " " + "".join(sorted({*"0123456789", *"".join(textart.WORDS)}))
LENGTH = max(map(len, (*textart.WORDS, *textart.NUMBERS)))
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A picture, the kind in each of its ``cells``, the ``letters`` on it; `IGNORED` elsewhere."""

    image: np.ndarray
    cells: list[int]
    letters: list[int]


def labelled(rng: random.Random) -> Labelled:
    """A random sign or scene."""
    if rng.random() < SIGNS:
        text, image = random_sign(rng)
        letters = [LETTERS.index(letter) for letter in text.ljust(LENGTH)]
        return Labelled(image=image, cells=[IGNORED] * CELLS, letters=letters)
    scene = random_scene(rng)
    cells = [0] * CELLS
    for item in scene.objects:
        column, row = cell_of(item)
        cells[row * (textart.WIDTH // shapes.CELL) + column] = KINDS.index(
            (item.shape, item.colour)
        )
    return Labelled(image=shapes.render(scene), cells=cells, letters=[IGNORED] * LENGTH)


class Reader(nn.Module):
    """Logits of what is in cells [B, C, kinds], of where they are [B, C, C], of letters [B, L, Z].

    All of tokens [B, C, D].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.Linear(width, len(KINDS))
        self.place = nn.Linear(width, CELLS)
        self.text = nn.Linear(CELLS * width, LENGTH * len(LETTERS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All at once."""
        text = self.text(tokens.flatten(1)).unflatten(1, (LENGTH, -1))
        return self.cell(tokens), self.place(tokens), text


def warm_up(
    tower: Any, processor: Any, *, steps: int, seed: int, log: Callable[[str], None]
) -> None:
    """Train the tower, of which a token covers a cell, for so many batches of random pictures."""
    rng = random.Random(seed)
    reader = Reader(tower.config.out_hidden_size)
    parameters = [*tower.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    for i in range(steps):
        pictures = [labelled(rng) for _ in range(BATCH)]
        images = [Image.fromarray(picture.image) for picture in pictures]
        found = processor.image_processor(images, return_tensors="pt")
        out = tower(found["pixel_values"], grid_thw=found["image_grid_thw"])
        logits = reader(out.pooler_output.unflatten(0, (BATCH, CELLS)))
        places = [list(range(CELLS))] * BATCH
        targets = [[p.cells for p in pictures], places, [p.letters for p in pictures]]
        loss = sum(
            cross_entropy(x.flatten(0, 1), torch.tensor(y).flatten(), ignore_index=IGNORED)
            for x, y in zip(logits, targets, strict=True)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (i + 1) % 50 == 0:
            right = [share(x, y) for x, y in zip(logits, targets, strict=True)]
            log(f"tower, step {i + 1}: right: cells {right[0]:.3f}, letters {right[2]:.3f}")


def share(logits: Tensor, targets: list[list[int]]) -> float:
    """Of the labels that are not ignored, those that are likeliest."""
    labels = torch.tensor(targets)
    return float((logits.argmax(-1) == labels)[labels != IGNORED].float().mean())
