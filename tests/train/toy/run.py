"""Configurations of toy runs, and what such runs leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmrl.checkpoint import found

NUM_PROMPTS = 6


def toy_config(folder: Path) -> dict:
    """A configuration as YAML would give it."""
    prompts = folder / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": f"go to {i}", "target": 1 + i / NUM_PROMPTS})
        for i in range(NUM_PROMPTS)
    ]
    prompts.write_text("\n".join(lines) + "\n")
    return {
        "name": "toy",
        "output_dir": str(folder / "{name}"),
        "backend": {"name": "toy.gauss"},
        "prompts": {"source": str(prompts)},
        "rewards": [{"name": "toy.rewards.near_target", "label": "near"}],
        "advantage": {"name": "group"},
        "objective": {"name": "grpo"},
        "regularisers": [{"name": "kl_reference", "estimator": "k3", "coef": 0.01}],
        "optimizer": {"learning_rate": 0.05},
        "training": {
            "num_steps": 6,
            "prompts_per_step": 4,
            "group_size": 5,
            "micro_batch_size": 4,
        },
        "evaluation": {"source": str(prompts), "every": 3, "samples_per_prompt": 2},
        "checkpoint": {"every": 2, "keep_last": 2},
        "tracking": {"trackers": []},
    }


def metrics_of(run: Path) -> list[dict]:
    """Metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "step_time")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def column(run: Path, name: str) -> list[float]:
    """Values of one metric, in order."""
    return [line[name] for line in metrics_of(run) if name in line]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Trained parameters, averages and moments of the last checkpoint."""
    last = found(run)[-1]
    moments = torch.load(last / "optimizer.pt", weights_only=True)
    flat = {f"moment/{k}/{m}": x for k, s in moments["state"].items() for m, x in s.items()}
    return {
        **load_file(last / "weights.safetensors"),
        **load_file(last / "auxiliary.safetensors"),
        **flat,
    }
