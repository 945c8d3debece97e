"""Build the tiny Qwen3-VL that this repository ships, from nothing.

    python assets/build_tiny_qwen_vl.py --out assets

The script makes questions about small pictures (see picture_tasks.py), learns a tokenizer from
them, teaches the vision tower to see (tower_warm_up.py), and trains the language model on
demonstrations with short reasoning traces; the tower stays as it is, or it would forget colours.
As in build_tiny_qwen.py some demonstrations contain a slip on purpose and training ends early.

Everything is drawn from --seed.  Floating-point sums differ between machines and library versions,
so a rebuild gives an equal model, not the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

# The script is run by its path, which puts its folder on the import path but not the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import picture_tasks
from assets.cold_start import Course, Demonstration, build, parse_args
from assets.picture_tasks import PictureItem
from assets.tiny_qwen import SPECIAL, ids_of_ends, in_chat, text_options
from assets.tower_warm_up import warm_up

WARM_UP_STEPS = 200
PATCH = 8
"""Pixels; four patches make a token."""


def make_processor(tokenizer: Any) -> Qwen3VLProcessor:
    """For pictures of any size that `PATCH` times 2 divides."""
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=PATCH, merge_size=2, temporal_patch_size=2, min_pixels=256
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=PATCH),
        chat_template=tokenizer.chat_template,
    )


def make_network(tokenizer: Any) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of 1.2 million parameters."""
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [8, 4, 4],
        "mrope_interleaved": True,
    }
    text = text_options(tokenizer)
    ids = {
        f"{name}_id": SPECIAL.index(token)
        for name, token in (
            ("vision_start_token", "<|vision_start|>"),
            ("vision_end_token", "<|vision_end|>"),
            ("image_token", "<|image_pad|>"),
            ("video_token", "<|video_pad|>"),
        )
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config={
                "depth": 3,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_heads": 4,
                "patch_size": PATCH,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "out_hidden_size": text["hidden_size"],
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [1],
            },
            tie_word_embeddings=True,
            **ids,
            **ids_of_ends(tokenizer),
        )
    )


def encode(processor: Any, item: PictureItem) -> Demonstration:
    """Token ids of an item in the chat template, and its picture."""
    found = processor(
        text=[in_chat(processor, [{"type": "image"}, {"type": "text", "text": item.prompt}])],
        images=[Image.fromarray(item.image)],
        return_tensors="pt",
    )
    end = [*processor.tokenizer(item.completion).input_ids, processor.tokenizer.eos_token_id]
    return Demonstration(
        found["input_ids"][0].tolist(), end, found["pixel_values"], found["image_grid_thw"]
    )


def write(folder: Path, sets: Mapping[str, Sequence[PictureItem]]) -> None:
    """Parquet files that hold their pictures."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "prompt": Value("string"),
            "answer": Value("string"),
            "task": Value("string"),
            "images": List(ImageFeature()),
        }
    )
    for name, items in sets.items():
        rows = Dataset.from_list([item.row for item in items], features=features)
        rows.to_parquet(folder / f"pictures-{name}.parquet")


def prepare(network: Any, processor: Any, seed: int, log: Callable[[str], None]) -> None:
    """The tower alone, which sees nearly everything after so many steps, and is then left alone."""
    warm_up(network.model.visual, processor, steps=WARM_UP_STEPS, seed=seed, log=log)
    network.model.visual.requires_grad_(False)


COURSE = Course(
    name="tiny-qwen-vl",
    make=picture_tasks.make,
    shares=picture_tasks.SHARES,
    asked=picture_tasks.ASKED,
    counts={"eval": 40, "train": 200},
    steps=1500,
    learning_rate=2e-3,
    slips=0.25,
    # Drawing pictures anew for each batch would take longer than training on them.
    pool=24_000,
    network=make_network,
    processor=make_processor,
    encode=encode,
    write=write,
    prepare=prepare,
)

if __name__ == "__main__":
    build(COURSE, parse_args(str(__doc__).splitlines()[0], COURSE.steps))
