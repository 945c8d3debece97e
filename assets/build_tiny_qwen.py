"""Build the tiny Qwen3 that this repository ships, from nothing.

    python assets/build_tiny_qwen.py --out assets

The script makes items of seven tasks (see text_tasks.py), learns a tokenizer from them, and trains
a Qwen3 on demonstrations with short reasoning traces.  Some demonstrations contain a slip on
purpose and training ends early, so the model knows how every task is done and still fails half of
them, which leaves room for a reward to improve it.

Everything is drawn from --seed.  Floating-point sums differ between machines and library versions,
so a rebuild gives an equal model, not the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM

# The script is run by its path, which puts its folder on the import path but not the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import text_tasks
from assets.cold_start import Course, Demonstration, build, parse_args
from assets.composition_task import write_jsonl
from assets.text_tasks import Item
from assets.tiny_qwen import in_chat, text_options


def make_network(tokenizer: Any) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.85 million parameters."""
    return Qwen3ForCausalLM(Qwen3Config(**text_options(tokenizer)))


def encode(tokenizer: Any, item: Item) -> Demonstration:
    """Token ids of an item in the chat template."""
    prompt = tokenizer(in_chat(tokenizer, item.prompt)).input_ids
    return Demonstration(prompt, [*tokenizer(item.completion).input_ids, tokenizer.eos_token_id])


def write(folder: Path, sets: Mapping[str, Sequence[Item]]) -> None:
    """All questions, and those of arithmetic by themselves."""
    for name, items in sets.items():
        rows = [item.row for item in items]
        write_jsonl(folder / f"text-{name}.jsonl", rows)
        sums = [row for row in rows if row["task"] in text_tasks.ARITHMETIC]
        write_jsonl(folder / f"arithmetic-{name}.jsonl", sums)


COURSE = Course(
    name="tiny-qwen",
    make=text_tasks.make,
    shares=text_tasks.SHARES,
    asked=tuple(text_tasks.SHARES),
    counts={"eval": 40, "train": 400},
    steps=1200,
    learning_rate=3e-3,
    slips=0.4,
    pool=None,
    network=make_network,
    processor=lambda tokenizer: tokenizer,
    encode=encode,
    write=write,
)

if __name__ == "__main__":
    build(COURSE, parse_args(str(__doc__).splitlines()[0], COURSE.steps))
