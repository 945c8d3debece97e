"""Prompts of the composition task, split into training and evaluation.

    python assets/composition_task.py --out assets/prompts     # write the files
    python assets/composition_task.py --check 1000             # how often the reward errs

A row holds the prompt and the columns that the reward `composition` reads: `objects` (shape, colour
or null, count) and `relation` (of the first entry to the second, or null), and GenEval's `tag`.
Prompts that ask for the same image in other words (`a left of b`, `b right of a`) are held out
together, so an evaluation prompt was never trained in any wording.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path

import numpy as np
from PIL import Image

# The script is run by its path, which puts its folder on the import path but not the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import distractors
from assets.shapes import (
    COLOURS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    Kind,
    prompt_for,
    random_scene,
    render,
)
from rewards import composition

POOL_UNIT = 2250
"""Images that one unit of `share` adds to the pool of pre-training."""
Request = tuple[tuple[Kind, ...], str | None]
"""Kinds of objects, and the relation of the first to the second where there is one."""
OPPOSITE = {"right of": "left of", "below": "above"}


@dataclass(frozen=True)
class Stratum:
    """Prompts of one sort.

    `num_eval`: contents that are held out.
    `num_train`: training prompts that reinforcement learning gets.  `share`: part of pre-training.
    """

    tag: str
    requests: tuple[Request, ...]
    num_eval: int
    num_train: int
    share: int


def strata() -> list[Stratum]:
    """All prompts there are, by sort."""
    shapes, colours = list(permutations(SHAPES, 2)), list(permutations(COLOURS, 2))
    single = [[Kind(shape=s)] for s in SHAPES]
    two = [_kinds(pair, (None, None), n) for pair in shapes for n in _counts(least=2)]
    coloured = [[Kind(shape=s, colour=c)] for s, c in product(SHAPES, COLOURS)]
    several = [
        [Kind(shape=s, colour=c, count=n)]
        for s, c, n in product(SHAPES, COLOURS, range(2, MAX_OBJECTS + 1))
    ]
    mixed = [_kinds(*names, n) for names in product(shapes, colours) for n in _counts(least=3)]
    pairs = [_kinds(*names, (1, 1)) for names in product(shapes, colours)]
    placed = tuple((tuple(pair), relation) for pair in pairs for relation in RELATIONS)
    return [
        Stratum("single_object", _unplaced(single), 1, 2, 1),
        Stratum("two_objects", _unplaced(two), 7, 22, 2),
        Stratum("colours", _unplaced(coloured), 4, 14, 2),
        Stratum("counting", _unplaced(several), 12, 42, 2),
        Stratum("counting", _unplaced(mixed), 12, 48, 2),
        Stratum("position", placed, 36, 110, 4),
        Stratum("colour_attribution", _unplaced(pairs), 20, 60, 3),
    ]


def _kinds(
    shapes: Sequence[str], colours: Sequence[str | None], counts: Sequence[int]
) -> list[Kind]:
    """One kind for each shape, colour and count at the same place."""
    named = zip(shapes, colours, counts, strict=True)
    return [Kind(shape=s, colour=c, count=n) for s, c, n in named]


def _counts(least: int) -> list[tuple[int, int]]:
    """Numbers of objects of two kinds, `least` to `MAX_OBJECTS` in all."""
    return [n for n in product(range(1, MAX_OBJECTS), repeat=2) if least <= sum(n) <= MAX_OBJECTS]


def _unplaced(kinds: Sequence[Sequence[Kind]]) -> tuple[Request, ...]:
    return tuple((tuple(kind), None) for kind in kinds)


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of the prompt files and of pre-training; `share` is the weight of each of the latter."""

    evaluation: list[dict]
    tuning: list[dict]
    pretraining: list[dict]
    share: list[float]


def split(seed: int) -> Split:
    """Every stratum split by content; a held-out content gives one evaluation prompt."""
    rng = random.Random(seed)
    result = Split(evaluation=[], tuning=[], pretraining=[], share=[])
    for stratum in strata():
        contents: dict = {}
        for request in stratum.requests:
            contents.setdefault(_content(*request), []).append(_row(stratum.tag, *request))
        held = rng.sample(list(contents), stratum.num_eval)
        result.evaluation.extend(rng.choice(contents[content]) for content in held)
        rows = [row for content in contents if content not in held for row in contents[content]]
        result.tuning.extend(rng.sample(rows, stratum.num_train))
        result.pretraining.extend(rows)
        result.share.extend([stratum.share / len(rows)] * len(rows))
    return result


def _row(tag: str, kinds: Sequence[Kind], relation: str | None) -> dict:
    objects = [asdict(kind) for kind in kinds]
    prompt = prompt_for(kinds, relation)
    return {"prompt": prompt, "tag": tag, "objects": objects, "relation": relation}


def _content(kinds: Sequence[Kind], relation: str | None) -> tuple:
    """The same for all wordings of one request."""
    if relation in OPPOSITE:
        return _content(kinds[::-1], OPPOSITE[relation])
    return (frozenset(kinds) if relation is None else tuple(kinds), relation)


# ---------------------------------------------------------------- images


def render_row(row: dict, rng: random.Random) -> np.ndarray:
    """A random scene that a row asks for, uint8 [32, 64, 3]."""
    return render(random_scene([Kind(**entry) for entry in row["objects"]], row["relation"], rng))


def render_pool(
    rows: Sequence[dict], share: Sequence[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 64, 3], as many of each row as its share says, and the row number of each."""
    rng = random.Random(seed)
    numbers = [max(1, round(POOL_UNIT * part)) for part in share]
    owner = np.repeat(np.arange(len(rows)), numbers)
    return np.stack([render_row(rows[i], rng) for i in owner]), owner


def judge(images: np.ndarray, rows: Sequence[dict], mode: str = "strict") -> np.ndarray:
    """Scores [N] of uint8 images by the reward `composition`."""
    reward = composition.build(composition.Config.model_validate({"mode": mode}))
    columns = {key: [row[key] for row in rows] for key in ("objects", "relation")}
    prompts = [row["prompt"] for row in rows]
    return reward(prompts, [Image.fromarray(image) for image in images], **columns).numpy()


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check(count: int, rng: random.Random) -> None:
    """Print strict scores: of rendered truth by tag, which should be 1, and of mistakes, 0."""
    rows = split(0)
    every = rows.evaluation + rows.pretraining
    for tag in dict.fromkeys(row["tag"] for row in every):
        asked = rng.choices([row for row in every if row["tag"] == tag], k=count)
        images = np.stack([render_row(row, rng) for row in asked])
        begun = time.perf_counter()
        score = judge(images, asked).mean()
        spent = (time.perf_counter() - begun) / count
        print(f"{tag:20} {score:.4f}   {1000 * spent:.2f} ms an image", flush=True)
    for mistake in distractors.DISTRACTORS:
        pairs = [(mistake(row, rng), row) for row in rng.choices(every, k=count)]
        images, asked = zip(*[pair for pair in pairs if pair[0] is not None], strict=True)
        score = judge(np.stack(images), asked).mean()
        print(f"{mistake.__name__:20} {score:.4f}   of {len(images)}", flush=True)


def main() -> None:
    """Write the two prompt files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, metavar="N", help="judge N images of each sort")
    args = parser.parse_args()
    if args.check:
        check(args.check, random.Random(args.seed + 1))
        return
    rows = split(args.seed)
    write_jsonl(args.out / "composition-train.jsonl", rows.tuning)
    write_jsonl(args.out / "composition-eval.jsonl", rows.evaluation)


if __name__ == "__main__":
    main()
