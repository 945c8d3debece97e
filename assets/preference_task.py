"""Prompts of the preference task: open ones, of which `preference` judges how they look.

    python assets/preference_task.py --out assets/prompts     # write the files

The reward reads no prompt.  Its model was made to judge pictures of signs and of scenes, so that is
what is asked for: signs that name no colour, and scenes that name no number of objects and often no
colour.  The other tasks always name these, so their prompts are others in kind, and a model can
tell from the prompt alone that it is free to please.  Pre-training saw every word but not these
phrases.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path

# The script is run by its path, which puts its folder on the import path but not the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import ocr_task
from assets.composition_task import write_jsonl
from assets.shapes import COLOURS, SHAPES

NUM_EVAL = 92


def split(seed: int) -> tuple[list[dict], list[dict]]:
    """Training rows and held-out rows."""
    rows = [*signs(seed), *scenes()]
    random.Random(seed + 3).shuffle(rows)
    return rows[NUM_EVAL:], rows[:NUM_EVAL]


def signs(seed: int) -> list[dict]:
    """A row for each text that the OCR task trains on."""
    pretraining, _, _ = ocr_task.split_prompts(seed)
    texts = dict.fromkeys(row["text"] for row in pretraining)
    return [{"prompt": f'a sign "{text}"', "kind": "sign"} for text in texts]


def scenes() -> list[dict]:
    """A row for each shape and each two, in any colours or in none."""
    return [{"prompt": prompt, "kind": "scene"} for prompt in _scene_prompts()]


def _scene_prompts() -> Iterator[str]:
    plurals = [f"{shape}s" for shape in SHAPES]
    yield from plurals
    yield from (f"{colour} {plural}" for colour, plural in product(COLOURS, plurals))
    for first, second in permutations(plurals, 2):
        yield f"{first} and {second}"
        for one, other in product(COLOURS, repeat=2):
            yield f"{one} {first} and {other} {second}"


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
