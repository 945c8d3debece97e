"""Supervised cold start of a tiny language model, and what it answers afterwards."""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assets.manifests import Clock, write_manifest
from assets.text_tasks import Item
from assets.tiny_qwen import SPECIAL, make_tokenizer

VOCABULARY = 512
BATCH = 96
IGNORED = -100
EVALUATION_SEEDS = (1000, 1001, 1002, 1003)
PACKAGES = ("torch", "transformers", "tokenizers", "reasoning-gym")

Maker = Callable[..., Item]
"""``(task, rng, slip=False) -> item``."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What differs between the models.

    `name`: its folder; the script is named ``build_`` and that.  `shares`: how often each task is
    drawn, relatively.  `asked`: tasks that there are prompts of.  `counts`: of questions of each of
    them, by prompt set; ``eval`` is held out.
    `learning_rate`: the greatest.
    `slips`: share of demonstrations with a wrong step.
    `pool`: demonstrations that are made once and shown again and again; ``None``: always new ones.
    `processor`: of a tokenizer, what is saved with the model and given to `encode`.
    `write`: stores the prompt sets in a folder.
    `prepare`: what happens to the network before it sees demonstrations, given the processor, a
    seed and somebody to tell.
    """

    name: str
    make: Maker
    shares: Mapping[str, float]
    asked: Sequence[str]
    counts: Mapping[str, int]
    steps: int
    learning_rate: float
    slips: float
    pool: int | None
    network: Callable[[Any], Any]
    processor: Callable[[Any], Any]
    encode: Callable[[Any, Any], Demonstration]
    write: Callable[[Path, Mapping[str, Sequence[Any]]], None]
    prepare: Callable[[Any, Any, int, Callable[[str], None]], None] | None = None


class Demonstration(NamedTuple):
    """Token ids: what the network learns to write after what.

    `pixels` [patches, values] and `grid` [1, 3]: the picture, as its processor gives it.
    """

    prompt: list[int]
    completion: list[int]
    pixels: Tensor | None = None
    grid: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt) + len(self.completion)


def alike(
    rows: Iterable[Demonstration], size: int, rng: random.Random
) -> Iterator[list[Demonstration]]:
    """Batches of rows that are about equally long, so that little is padded."""
    rows = iter(rows)
    while True:
        some = sorted(islice(rows, 8 * size), key=lambda row: row.length)
        starts = list(range(0, len(some), size))
        rng.shuffle(starts)
        for start in starts:
            yield some[start : start + size]


def again(rows: list[Demonstration], rng: random.Random) -> Iterator[Demonstration]:
    """The rows over and over, each time in another order."""
    while True:
        rng.shuffle(rows)
        yield from rows


def padded(rows: Sequence[Demonstration], pad: int) -> dict[str, Tensor]:
    """Ids, mask and labels [B, T], padded on the right; only completions have labels."""
    width = max(row.length for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : row.length] = torch.tensor([*row.prompt, *row.completion])
        mask[i, : row.length] = 1
        labels[i, len(row.prompt) : row.length] = torch.tensor(row.completion)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **pictures(rows, ids)}


def pictures(rows: Sequence[Demonstration], ids: Tensor) -> dict[str, Tensor]:
    """What a vision-language network wants besides ``ids`` [B, T]; nothing without pictures."""
    pixels = [row.pixels for row in rows if row.pixels is not None]
    grids = [row.grid for row in rows if row.grid is not None]
    if not pixels:
        return {}
    return {
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.cat(grids),
        "mm_token_type_ids": (ids == SPECIAL.index("<|image_pad|>")).long(),
    }


def cold_start(
    network: Any,
    batches: Iterator[dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    log: Callable[[str], None],
) -> None:
    """Next-token training on demonstrations; the rate grows for 5 % of the steps, then decays."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * 0.5 * (1.02 + 0.98 * math.cos(math.pi * i / steps)),
    )
    network.train()
    total = 0.0
    for i in range(steps):
        loss = network(**next(batches), use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (i + 1) % 100 == 0:
            log(f"step {i + 1}: loss {total / 100:.4f}")
            total = 0.0
    network.eval()


# ---------------------------------------------------------------- questions


def demonstrations(
    make: Maker, shares: Mapping[str, float], slips: float, seed: int, held: set[str]
) -> Iterator[Item]:
    """Endless items that are not held out; a share ``slips`` of them goes wrong somewhere."""
    rng = random.Random(seed)
    while True:
        (task,) = rng.choices(list(shares), list(shares.values()))
        item = make(task, rng, slip=rng.random() < slips)
        if item.key not in held:
            yield item


def prompt_sets(
    make: Maker, tasks: Iterable[str], seed: int, counts: Mapping[str, int]
) -> dict[str, list[Item]]:
    """By name, so many different questions of each task; no question is in two sets."""
    rng, taken = random.Random(seed), set[str]()

    def distinct(task: str) -> Iterator[Item]:
        while True:
            item = make(task, rng)
            if item.key not in taken:
                taken.add(item.key)
                yield item

    tasks = list(tasks)
    return {
        name: [item for task in tasks for item in islice(distinct(task), count)]
        for name, count in counts.items()
    }


def accuracy(
    network: Any, tokenizer: Any, items: Sequence[Item], rows: Sequence[Demonstration]
) -> dict[str, Any]:
    """Share of right answers, by task and in all, sampled at temperature 1; greedy in all."""

    def marks(**how: Any) -> list[bool]:
        texts = sample(network, tokenizer, rows, **how)
        return [item.right(answer_of(t)) for t, item in zip(texts, items, strict=True)]

    sampled = [marks(greedy=False, seed=seed) for seed in EVALUATION_SEEDS]
    tasks = list(dict.fromkeys(item.task for item in items))
    by_task = {
        task: [
            mark
            for found in sampled
            for mark, item in zip(found, items, strict=True)
            if item.task == task
        ]
        for task in tasks
    }
    totals = [share(found) for found in sampled]
    return {
        "overall": round(sum(totals) / len(totals), 4),
        **{task: share(found) for task, found in by_task.items()},
        "greedy": share(marks(greedy=True, seed=0)),
        "questions": len(items),
        "seeds": list(EVALUATION_SEEDS),
        "per_seed": totals,
    }


def share(marks: Sequence[bool]) -> float:
    """Of those that are true."""
    return round(sum(marks) / len(marks), 4)


def answer_of(text: str) -> str | None:
    """What stands between the answer tags."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found and found[1].strip()


def sample(
    network: Any, tokenizer: Any, rows: Sequence[Demonstration], *, greedy: bool, seed: int
) -> list[str]:
    """One completion after each prompt, at temperature 1 or greedy."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=not greedy,
        top_k=0 if not greedy else None,
        max_new_tokens=64,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = []
    torch.manual_seed(seed)
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        width = max(len(row.prompt) for row in part)
        ids = torch.tensor([[pad] * (width - len(row.prompt)) + row.prompt for row in part])
        mask = torch.tensor(
            [[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in part]
        )
        with torch.no_grad():
            out = network.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                **pictures(part, ids),
            )
        texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return texts


# ---------------------------------------------------------------- the whole


def build(course: Course, args: argparse.Namespace) -> None:
    """Write prompt sets, model, processor and manifest."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    clock = Clock()
    sets = prompt_sets(course.make, course.asked, args.seed, course.counts)
    course.write(args.out / "prompts", sets)
    stream = demonstrations(
        course.make, course.shares, course.slips, args.seed + 1, {item.key for item in sets["eval"]}
    )
    corpus = [f"{item.prompt} {item.completion}" for item in islice(stream, 10_000)]
    tokenizer = make_tokenizer(corpus, VOCABULARY)
    processor = course.processor(tokenizer)
    network = course.network(tokenizer)
    parameters = sum(p.numel() for p in network.parameters())
    clock.log(f"{parameters} parameters, {len(tokenizer)} tokens")
    if course.prepare is not None:
        course.prepare(network, processor, args.seed, clock.log)
    rng = random.Random(args.seed)
    encoded = (course.encode(processor, item) for item in stream)
    shown = encoded if course.pool is None else again(list(islice(encoded, course.pool)), rng)
    batches = (padded(rows, tokenizer.pad_token_id) for rows in alike(shown, BATCH, rng))
    cold_start(
        network, batches, steps=args.steps, learning_rate=course.learning_rate, log=clock.log
    )
    spent = clock.spent()
    folder = args.out / course.name
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    rows = [course.encode(processor, item) for item in sets["eval"]]
    found = accuracy(network, tokenizer, sets["eval"], rows)
    clock.log(f"accuracy {found}")
    script = f"assets/build_{course.name.replace('-', '_')}.py"
    facts = {
        "build": f"python {script} --seed {args.seed} --steps {args.steps}",
        "seed": args.seed,
        "steps": args.steps,
        "batch": BATCH,
        "slips": course.slips,
        "time": spent,
        "threads": args.threads,
        "parameters": parameters,
        "accuracy": found,
    }
    write_manifest(folder, facts, PACKAGES)


def parse_args(description: str, steps: int) -> argparse.Namespace:
    """Command line of a build script."""
    parser = argparse.ArgumentParser(description=description)
    here = Path(__file__).resolve().parent
    add = parser.add_argument
    add("--out", type=Path, default=here, help="the assets folder to write")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=steps, help="batches of demonstrations")
    add("--threads", type=int, default=2)
    return parser.parse_args()
