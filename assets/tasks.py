"""The tasks that the tiny SD3 pipeline is pre-trained on, each behind one record."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from assets import composition_task, ocr_task, textart

Rows = Sequence[dict]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What pre-training needs to know of a task; a row is a prompt with its columns.

    `pretraining`: every row that may be trained on; `tuning`: those that reinforcement learning
    gets; `held`: evaluation rows.  `share`: how often each pre-training row is drawn, relatively.
    `pool`: renders images (N, 32, 64, 3) of the pre-training rows, with the row number of each.
    `render`: one random image of a row.  `correct`: which images show what their rows ask for.
    `criterion`: what `correct` means, in words.  `groups`: part of the held-out rows by name.
    `facts`: what is held out, for the manifest.
    """

    pretraining: Rows
    tuning: Rows
    held: Rows
    share: np.ndarray
    pool: Callable[[], tuple[np.ndarray, np.ndarray]]
    render: Callable[[dict, random.Random], np.ndarray]
    correct: Callable[[np.ndarray, Rows], np.ndarray]
    groups: Mapping[str, np.ndarray]
    criterion: str
    facts: Mapping[str, object]


def ocr(seed: int) -> Task:
    """Signs with one short text."""
    train, held, unseen = ocr_task.split_prompts(seed)
    reader = ocr_task.Reader()
    return Task(
        pretraining=train,
        tuning=ocr_task.tuning_prompts(train, seed),
        held=held,
        # Words are fewer and harder than numbers (more glyphs, less shared), so they are drawn more
        # often: about every second sign is a word.
        share=np.array([5.0 if row["kind"] == "word" else 1.0 for row in train]),
        pool=lambda: ocr_task.render_set(train),
        render=lambda row, rng: textart.render(
            row["text"], row["colour"], textart.random_layout(rng)
        ),
        correct=lambda images, rows: ocr_task.matches(reader(images), rows),
        criterion="exact match by rapidocr",
        groups={
            "number": _where(held, kind="number"),
            "word": _where(held, kind="word"),
            "unseen_number": _where(held, held_out="text"),
        },
        facts={
            "pairs": "every text has one colour it is never trained in (prompts/ocr-eval.jsonl)",
            "numbers_never_trained": unseen,
        },
    )


def composition(seed: int) -> Task:
    """Scenes of flat shapes."""
    rows = composition_task.split(seed)
    return Task(
        pretraining=rows.pretraining,
        tuning=rows.tuning,
        held=rows.evaluation,
        share=np.array(rows.share),
        pool=lambda: composition_task.render_pool(rows.pretraining, rows.share, seed),
        render=composition_task.render_row,
        correct=lambda images, rows: composition_task.judge(images, rows) == 1,
        criterion="strict by the reward composition",
        groups={
            tag: _where(rows.evaluation, tag=tag)
            for tag in dict.fromkeys(row["tag"] for row in rows.evaluation)
        },
        facts={
            "compositions": "prompts/composition-eval.jsonl, and all that ask for the same image",
        },
    )


def _where(rows: Rows, **column: str) -> np.ndarray:
    """Which rows hold the value in the column."""
    ((name, value),) = column.items()
    return np.array([row[name] == value for row in rows])


TASKS: dict[str, Callable[[int], Task]] = {"ocr": ocr, "composition": composition}
