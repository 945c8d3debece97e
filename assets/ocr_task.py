"""Prompts and images of the text task of the tiny SD3 pipeline: signs to be read.

The texts, their colours and what is held out; every sign as an image; and a recogniser that says
which images show their text.
"""

from __future__ import annotations

import random

import cv2
import numpy as np
from rapidocr import RapidOCR
from rapidocr.ch_ppocr_rec import TextRecInput

from assets import textart

UNSEEN_NUMBERS = 6
EVAL_NUMBERS = 66


def split_prompts(seed: int) -> tuple[list[dict], list[dict], list[str]]:
    """Train rows, held-out evaluation rows, and the numbers that are never trained on.

    Every text has one colour it is never trained in; these pairs are the evaluation prompts.
    A few whole numbers are left out in every colour.
    """
    rng = random.Random(seed)
    unseen = sorted(rng.sample(textart.NUMBERS, UNSEEN_NUMBERS))
    colours = list(textart.COLOURS)
    train, held_numbers, held_words, held_unseen = [], [], [], []
    for text in textart.NUMBERS + textart.WORDS:
        held_colour = rng.choice(colours)
        kind = "number" if text in textart.NUMBERS else "word"
        for colour in colours:
            row = {"prompt": textart.prompt_for(text, colour), "text": text, "kind": kind}
            row["colour"] = colour
            if text in unseen:
                if colour == held_colour:
                    held_unseen.append(row | {"held_out": "text"})
            elif colour == held_colour:
                held = held_numbers if kind == "number" else held_words
                held.append(row | {"held_out": "pair"})
            else:
                train.append(row)
    held_numbers = sorted(rng.sample(held_numbers, EVAL_NUMBERS), key=lambda r: r["text"])
    return train, held_numbers + held_unseen + held_words, unseen


def tuning_prompts(train: list[dict], seed: int) -> list[dict]:
    """The training rows that reinforcement learning gets: all words, each number in two colours.

    Words start further from the goal than numbers, so they get more than their share of the pool.
    """
    rng = random.Random(seed + 2)
    kept = []
    for text in dict.fromkeys(row["text"] for row in train):
        rows = [row for row in train if row["text"] == text]
        kept += rows if rows[0]["kind"] == "word" else rng.sample(rows, 2)
    return kept


class Reader:
    """rapidocr's text recogniser without detection, on images upscaled twofold."""

    def __init__(self) -> None:
        engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_det": False,
                "Global.use_cls": False,
                "EngineConfig.onnxruntime.intra_op_num_threads": 2,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                # 48x96 is the shape of a sign; padding to the stock 48x320 costs four times more.
                "Rec.rec_img_shape": [3, 48, 96],
                "Rec.rec_batch_num": 16,
            }
        )
        self.recognise = engine._load_rec_model()

    def __call__(self, images: np.ndarray) -> list[str]:
        """The text read in each uint8 RGB image, lower-case, without spaces."""
        big = [
            cv2.resize(i[:, :, ::-1], None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
            for i in images
        ]
        return [t.lower().replace(" ", "") for t in self.recognise(TextRecInput(img=big)).txts]


def matches(read: list[str], rows: list[dict]) -> np.ndarray:
    """Which texts were read exactly."""
    return np.array([r == row["text"].lower() for r, row in zip(read, rows, strict=True)])


def render_set(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """All layouts of all rows: images (N, 32, 64, 3) and the row number of each."""
    layouts = [
        textart.Layout(font, size, dx, dy, background)
        for font in textart.FONTS
        for size in textart.SIZES
        for dx in textart.OFFSETS_X
        for dy in textart.OFFSETS_Y
        for background in textart.BACKGROUNDS
    ]
    images = np.empty((len(rows) * len(layouts), textart.HEIGHT, textart.WIDTH, 3), dtype=np.uint8)
    owner = np.repeat(np.arange(len(rows)), len(layouts))
    for i, row in enumerate(rows):
        for j, layout in enumerate(layouts):
            images[i * len(layouts) + j] = textart.render(row["text"], row["colour"], layout)
    return images, owner
