"""A finished run, made by hand: two evaluations, three steps, two sample grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

CONFIG = {
    "name": "signs",
    "seed": 3,
    "backend": {
        "name": "diffusion",
        "model": {"path": "assets/tiny-sd3", "dtype": "fp32", "lora": {"rank": 4, "alpha": 8}},
        "rollout": {"num_steps": 5, "guidance": 1.0, "height": 32, "width": 64},
    },
    "prompts": {"source": "train.jsonl"},
    "rewards": [{"name": "ocr", "label": "reading"}],
    "advantage": {"name": "group"},
    "objective": {"name": "grpo"},
    "training": {"num_steps": 3, "prompts_per_step": 2, "group_size": 4},
}
ENVIRONMENT = {
    "versions": {"torch": "9.8.7"},
    "commit": "c0ffee",
    "command": ["mmrl", "train", "a file.yaml"],
    "device": "cpu",
    "processes": 1,
}
METRICS = [
    {"step": 0, "eval/exact": 0.25, "eval/diversity": 0.5},
    {"step": 1, "reward": 0.3, "reward_std": 0.1, "grad_norm": 2.0, "step_time": 20.0},
    {"step": 2, "reward": None, "reward_std": 0.1, "grad_norm": 0.5, "step_time": 40.0},
    {"step": 3, "reward": 0.6, "reward_std": 0.2, "grad_norm": 0.1, "step_time": 10.0},
    {"step": 3, "eval/exact": 0.875, "eval/diversity": 0.375},
]


def write_run(
    folder: Path,
    *,
    config: Mapping[str, Any] = CONFIG,
    metrics: list[dict[str, Any]] = METRICS,
) -> Path:
    """A run folder as the training loop leaves it."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    for step, colour in ((0, "red"), (3, "blue")):
        Image.new("RGB", (20, 10), colour).save(folder / "samples" / f"step-{step:06d}.png")
    return folder
