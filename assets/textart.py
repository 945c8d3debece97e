"""Render the small text signs that the tiny SD3 pipeline is trained on.

One sign is 32x64 pixels: a light background with one short text (a two-digit number or a
word of two or three capital letters) in one colour.  The prompt names the text and the colour;
font, size, position and background are left to the model's noise.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 32, 64

# The fonts come with matplotlib, so every machine that can build the asset has the same ones.
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
SIZES = (21, 25)
OFFSETS_X = (-4, 4)
OFFSETS_Y = (-2, 2)
COLOURS = {
    "red": (205, 25, 25),
    "blue": (25, 50, 200),
    "green": (10, 120, 40),
    "purple": (125, 25, 150),
    "brown": (115, 65, 20),
    "black": (15, 15, 15),
}
BACKGROUNDS = ((255, 255, 255), (250, 242, 215), (222, 236, 250))

NUMBERS = tuple(str(n) for n in range(10, 100))
WORDS = (
    "CAT", "SUN", "BUS", "MAP", "HAT", "CUP", "PEN", "CAR", "BAG", "NET",
    "ANT", "BEE", "HEN", "TEA", "RAT", "NUT", "BAT", "UP", "ME", "WE",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Everything about a sign that the prompt does not say."""

    font: str
    size: int
    dx: int
    dy: int
    background: tuple[int, int, int]


def prompt_for(text: str, colour: str) -> str:
    """The prompt of one sign; the text to read stands in the double quotes."""
    return f'a {colour} sign "{text}"'


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / name), size)


def random_layout(rng: random.Random) -> Layout:
    """Draw font, size, position and background, each evenly."""
    return Layout(
        font=rng.choice(FONTS),
        size=rng.choice(SIZES),
        dx=rng.choice(OFFSETS_X),
        dy=rng.choice(OFFSETS_Y),
        background=rng.choice(BACKGROUNDS),
    )


def render(text: str, colour: str, layout: Layout) -> np.ndarray:
    """One sign as a uint8 array of shape (32, 64, 3)."""
    image = Image.new("RGB", (WIDTH, HEIGHT), layout.background)
    draw = ImageDraw.Draw(image)
    size = layout.size
    while True:
        left, top, right, bottom = draw.textbbox((0, 0), text, font=_font(layout.font, size))
        if right - left <= WIDTH - 6:
            break
        size -= 1
    # Offsets stop short of the border: a clipped glyph would teach the model unreadable signs.
    room_x, room_y = (WIDTH - (right - left)) // 2 - 2, (HEIGHT - (bottom - top)) // 2 - 2
    dx = max(-room_x, min(room_x, layout.dx))
    dy = max(-room_y, min(room_y, layout.dy))
    x = (WIDTH - (right - left)) // 2 - left + dx
    y = (HEIGHT - (bottom - top)) // 2 - top + dy
    draw.text((x, y), text, font=_font(layout.font, size), fill=COLOURS[colour])
    return np.asarray(image)
