"""Prompts of the preference task: signs and scenes, of which `preference` judges how they look.

    python assets/preference_task.py --out assets/prompts     # write the files

The reward reads no prompt.  Its model was made to judge pictures of signs and of scenes, as many of
each, so that is what is asked for; place, size and background are never named, nor is the shade of
a colour.  All prompts are of pre-training: no prompt of another task's files is among them, and no
scene that one of those asks for in other words.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

# The script is run by its path, which puts its folder on the import path but not the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import composition_task, ocr_task
from assets.composition_task import content_of, write_jsonl

NUM_TRAIN, NUM_EVAL = 268, 92
SCENES = ("counting", "position")
"""Sorts of scenes, with equal parts: those of which the composition task leaves enough."""


def split(seed: int) -> tuple[list[dict], list[dict]]:
    """Training rows and held-out rows, half of each signs."""
    rng = random.Random(seed + 3)
    train, held = [], []
    free = [free_signs(seed), *(free_scenes(seed, tag) for tag in SCENES)]
    for rows, part in zip(free, (2, 4, 4), strict=True):
        drawn = rng.sample(rows, (NUM_TRAIN + NUM_EVAL) // part)
        train += drawn[NUM_EVAL // part :]
        held += drawn[: NUM_EVAL // part]
    return train, held


def free_signs(seed: int) -> list[dict]:
    """Rows of pre-training that are not in the files of the OCR task."""
    pretraining, _, _ = ocr_task.split_prompts(seed)
    tuning = ocr_task.tuning_prompts(pretraining, seed)
    return [row for row in pretraining if row not in tuning]


def free_scenes(seed: int, tag: str) -> list[dict]:
    """A row for each content of this sort that is not in the files of the composition task."""
    rows = composition_task.split(seed)
    tuning = {content_of(row) for row in rows.tuning}
    wordings = [row for row in rows.pretraining if row["tag"] == tag]
    random.Random(seed + 4).shuffle(wordings)
    found = {content_of(row): row for row in wordings}
    return [row for content, row in found.items() if content not in tuning]


def main() -> None:
    """Write the two prompt files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, held = split(args.seed)
    write_jsonl(args.out / "preference-train.jsonl", train)
    write_jsonl(args.out / "preference-eval.jsonl", held)


if __name__ == "__main__":
    main()
