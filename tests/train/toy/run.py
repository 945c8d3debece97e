"""Configurations of small runs, how they are launched, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from mmrl.checkpoint import found
from mmrl.config import apply_overrides, read_yaml

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parents[1]
NUM_PROMPTS = 6
SMALL = (
    "backend.model.dtype=fp32",
    "backend.model.lora.rank=4",
    "backend.rollout.num_steps=3",
    "backend.rollout.batch_size=3",
    "backend.likelihood.num_times=2",
    "training.num_steps=3",
    "training.prompts_per_step=3",
    "training.group_size=3",
    "training.micro_batch_size=4",
    "training.updates_per_epoch=2",
    "evaluation.max_prompts=2",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=2",
    "checkpoint.every=1",
    "tracking.trackers=[]",
)
"""The quickstart at the smallest size that still does everything."""
SMALLER = (
    "backend.likelihood.behaviour=ema",
    "rewards=[{name: jpeg_compressibility}]",
    "evaluation.rewards=[{name: jpeg_compressibility}]",
    "evaluation.max_prompts=1",
    "backend.rollout.num_steps=2",
    "training.group_size=2",
    "training.num_steps=2",
    "training.prompts_per_step=2",
    "training.micro_batch_size=2",
)
"""Beside ``SMALL``, for runs about how weights and optimizer are shared out: a quick reward, and
every copy of the weights that there is."""


def small_config(folder: Path, *overrides: str) -> dict:
    """A run of the shipped tiny model in ``folder / "run"``."""
    absolute = (
        f"output_dir={folder / 'run'}",
        f"backend.model.path={ROOT / 'assets/tiny-sd3'}",
        f"prompts.source={ROOT / 'assets/prompts/ocr-train.jsonl'}",
        f"evaluation.source={ROOT / 'assets/prompts/ocr-eval.jsonl'}",
    )
    data = read_yaml(ROOT / "configs" / "quickstart.yaml")
    return apply_overrides(data, [*absolute, *SMALL, *overrides])


def python(
    *arguments: str | Path, processes: int = 1, launcher: tuple[str, ...] = (), **extra: str
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` where these modules can be imported, with ``extra`` variables.

    Several ``processes`` form a group by torch's launcher; ``launcher``: another one.
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    command = [sys.executable, *(launcher or (torchrun if processes > 1 else ())), *arguments]
    paths = f"{TESTS}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **extra}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


def launch(
    config: dict, path: Path, *words: str, processes: int = 1, **extra: str
) -> subprocess.CompletedProcess[str]:
    """``mmrl train`` on a configuration, written to ``path``, in processes of its own."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return python("-m", "mmrl", "train", path, *words, processes=processes, **extra)


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


def leave_charts_out() -> None:
    """Of all reports of this process: drawing them takes longer than a tiny run."""
    import mmrl.charts

    mmrl.charts.line_chart = lambda *_, **__: ""


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
