"""Does the quickstart work for every seed, what does it cost, and what does it do to the pictures?

    python -m benchmarks.quickstart_seeds [--seeds 0 1 2 3 4] [a.b=value ...]

Each seed is trained in a process of its own, one after another.  Then plain diffusers, without any
code of this project, loads the exported LoRA and draws held-out pictures with fixed seeds; judges
that training never saw read them.  Needs ``pip install -e '.[benchmark]'`` for the ddddocr judge.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from PIL import Image

from benchmarks import judges, tables
from benchmarks.runs import metered, train_command

METRIC = "eval/ocr_exact"
TARGET = 0.90
POLL_SECONDS = 0.05
BATCH_PROMPTS = 16
NOISE_SEED = 20_000
GROUND_TRUTH = 500


@dataclass(frozen=True)
class Column:
    """One figure of the table: ``key`` in the data, ``title``, format and meaning."""

    key: str
    title: str
    form: str
    meaning: str


COLUMNS = (
    Column("exact_before", "exact before", ".3f", f"{METRIC} of the run before training"),
    Column("exact_after", "exact after", ".3f", "the same after the last step"),
    Column("exact_best", "exact best", ".3f", "the largest of the run"),
    Column("step", f"step >= {TARGET:.2f}", ".0f", f"first evaluated step at or above {TARGET}"),
    Column("train_seconds", "train s", ".0f", "wall seconds of the training steps up to it"),
    Column("train_cpu", "train CPU-s", ".0f", "CPU-seconds of the training steps up to it"),
    Column("run_seconds", "run s", ".0f", "wall seconds of the whole command"),
    Column("run_cpu", "run CPU-s", ".0f", "CPU-seconds of the whole command"),
    Column("diversity_before", "div. before", ".4f", "diversity of the pictures without LoRA"),
    Column("diversity_after", "div. after", ".4f", "diversity with it"),
    Column("diversity_kept", "div. kept", ".2f", "the latter over the former"),
)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When a run first reached the target: ``step``, and seconds of training until then."""

    step: int
    wall: float
    cpu: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training command: its metrics, the CPU-seconds at each line, and its total cost.

    ``cpu_at_line[i]``: CPU-seconds that the process had used when line i of the metrics appeared.
    """

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    cpu_at_line: Sequence[float]
    wall: float
    cpu: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, draw, judge, print, write."""
    options = _parser().parse_args(arguments)
    readers = judges.available_judges()
    truth = {judge.name: _ground_truth_accuracy(judge) for judge in readers}
    before: dict[str, float] | None = None
    records = []
    for seed in options.seeds:
        run = train(options.config, options.runs, seed, options.overrides)
        before = before or look(run.folder, readers, options.images, lora=False)
        after = look(run.folder, readers, options.images, lora=True)
        records.append({"seed": seed, **figures(run), **compare(before, after)})
        print(json.dumps(records[-1]), flush=True)
    about = tables.machine()
    markdown = report(records, truth, about, options)
    path = tables.write_results(
        options.out,
        "quickstart",
        markdown,
        {
            "machine": about,
            "ground_truth_accuracy": truth,
            "images_per_prompt": options.images,
            "overrides": options.overrides,
            "seeds": records,
        },
    )
    print(f"{markdown}\n\nwritten to {path}")
    return 0


# Training


def train(config: Path, runs: Path, seed: int, overrides: Sequence[str]) -> Run:
    """Run ``mmrl train`` and note its CPU time whenever a line of metrics appears."""
    folder = runs / f"{config.stem}-seed{seed}"
    command = train_command(config, folder, [*overrides, f"seed={seed}"])
    with metered() as cost:
        process = subprocess.Popen(command, cwd=tables.ROOT)
        cpu_at_line = _watch(process, folder / "metrics.jsonl")
    if process.returncode:
        raise SystemExit(f"seed {seed}: the training command ended with {process.returncode}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    cpu_at_line += [cost.cpu] * (len(rows) - len(cpu_at_line))
    return Run(folder=folder, rows=rows, cpu_at_line=cpu_at_line, wall=cost.wall, cpu=cost.cpu)


def first_reaching(
    rows: Sequence[Mapping[str, Any]], cpu_at_line: Sequence[float], target: float
) -> Reached | None:
    """The first evaluation at or above ``target``; evaluations themselves cost nothing here."""
    wall = cpu = 0.0
    for index, row in enumerate(rows):
        if "step_time" in row:
            wall += row["step_time"]
            cpu += cpu_at_line[index] - (cpu_at_line[index - 1] if index else 0.0)
        if row.get(METRIC, -1.0) >= target:
            return Reached(step=row["step"], wall=wall, cpu=cpu)
    return None


def figures(run: Run) -> dict[str, float | None]:
    """What the metrics of a run say."""
    exact = [row[METRIC] for row in run.rows if METRIC in row]
    reached = first_reaching(run.rows, run.cpu_at_line, TARGET)
    return {
        "exact_before": exact[0],
        "exact_after": exact[-1],
        "exact_best": max(exact),
        "step": reached and reached.step,
        "train_seconds": reached and reached.wall,
        "train_cpu": reached and reached.cpu,
        "run_seconds": run.wall,
        "run_cpu": run.cpu,
    }


def _watch(process: subprocess.Popen[bytes], metrics: Path) -> list[float]:
    """CPU-seconds of the process when each line of ``metrics`` appeared; waits for the end."""
    watched, cpu_at_line = psutil.Process(process.pid), []
    # An ended child can be asked until poll() has seen its end, so the order matters.
    while process.poll() is None:
        if metrics.is_file():
            used = watched.cpu_times()
            new = metrics.read_bytes().count(b"\n") - len(cpu_at_line)
            cpu_at_line += [used.user + used.system] * new
        time.sleep(POLL_SECONDS)
    return cpu_at_line


# Pictures


def look(
    run: Path, readers: Sequence[judges.Judge], images: int, *, lora: bool
) -> dict[str, float]:
    """Diversity of held-out pictures, and the share that each judge reads exactly."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    lines = (tables.ROOT / config["evaluation"]["source"]).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines if line.strip()]
    groups = list(draw(run, config, [p["prompt"] for p in prompts], images, lora=lora))
    flat = [image for group in groups for image in group]
    texts = [p["text"] for p in prompts for _ in range(images)]
    found = {judge.name: judges.accuracy(judge, flat, texts) for judge in readers}
    return {"diversity": judges.diversity(groups), "pictures": float(len(flat)), **found}


def draw(
    run: Path, config: Mapping[str, Any], prompts: Sequence[str], images: int, *, lora: bool
) -> Iterator[list[Image.Image]]:
    """``images`` pictures of each prompt by plain diffusers, on the noise levels of the rollout."""
    pipeline = _pipeline(tables.ROOT / config["backend"]["model"]["path"])
    if lora:
        pipeline.load_lora_weights(str(run / "final"))
    rollout = config["backend"]["rollout"]
    steps = rollout["num_steps"]
    for start in range(0, len(prompts), BATCH_PROMPTS):
        batch = list(prompts[start : start + BATCH_PROMPTS])
        first = NOISE_SEED + start * images
        seeds = range(first, first + len(batch) * images)
        drawn = pipeline(
            batch,
            num_images_per_prompt=images,
            num_inference_steps=steps,
            # linspace(1, 0); the pipeline's own scheduler shifts it.
            sigmas=[1 - index / steps for index in range(steps)],
            guidance_scale=1.0,
            height=rollout["height"],
            width=rollout["width"],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        yield from (drawn[i : i + images] for i in range(0, len(drawn), images))


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Figures of the pictures without and with the LoRA, side by side."""
    paired = {f"{key}_before": value for key, value in before.items()}
    paired |= {f"{key}_after": value for key, value in after.items()}
    return paired | {"diversity_kept": after["diversity"] / before["diversity"]}


def _pipeline(folder: Path) -> Any:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
        StableDiffusion3Pipeline,
    )

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(folder), **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _ground_truth_accuracy(judge: judges.Judge) -> float:
    return judges.accuracy(judge, *judges.ground_truth(GROUND_TRUTH))


# Report


def judge_columns(names: Sequence[str]) -> list[Column]:
    """Two columns for each judge."""
    return [
        Column(f"{name}_{when}", f"{name} {when}", ".3f", f"share read exactly by {name}, {when}")
        for name in names
        for when in ("before", "after")
    ]


def seed_table(records: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """One row for each seed, then mean, extremes and standard deviation over seeds."""
    rows = [
        [str(record["seed"]), *(tables.cell(record[c.key], c.form) for c in columns)]
        for record in records
    ]
    spreads = [(c, tables.spread([record[c.key] for record in records])) for c in columns]
    for title, field in (("mean", "mean"), ("min", "low"), ("max", "high"), ("std", "std")):
        cells = [tables.cell(s and getattr(s, field), c.form) for c, s in spreads]
        rows.append([f"**{title}**", *cells])
    return tables.markdown_table(["seed", *(c.title for c in columns)], rows)


def report(
    records: Sequence[Mapping[str, Any]],
    truth: Mapping[str, float],
    about: Mapping[str, Any],
    options: argparse.Namespace,
) -> str:
    """The whole result in markdown."""
    columns = [*COLUMNS[:8], *judge_columns(list(truth)), *COLUMNS[8:]]
    reached = sum(record["step"] is not None for record in records)
    trust = ", ".join(f"{name} {share:.3f}" for name, share in truth.items())
    pictures = int(records[0]["pictures_after"])
    changes = f" with {' '.join(options.overrides)}" if options.overrides else ""
    return "\n\n".join(
        [
            f"# {options.config.stem}: {len(records)} seeds",
            f"`mmrl train {options.config}`{changes}. {reached} of {len(records)} seeds reached "
            f"{METRIC} >= {TARGET}.",
            seed_table(records, columns),
            f"The judges and the diversity look at {pictures} held-out pictures "
            f"({options.images} of each prompt, the same noise before and after), drawn by "
            "diffusers' own pipeline from the exported LoRA. Training used rapidocr and none of "
            f"these judges; of {GROUND_TRUTH} rendered signs they read exactly: {trust}. Diversity "
            "is the mean root-mean-square distance, pixels in [0, 1], of two pictures of one "
            "prompt.",
            "\n".join(f"* {c.title}: {c.meaning}" for c in columns),
            f"std is over seeds (n - 1). Machine: {tables.machine_line(about)}",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart_seeds")
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/quickstart.yaml"))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--images", type=int, default=3, help="pictures of each held-out prompt")
    add("--runs", type=Path, default=Path("runs/seeds"), help="where the run folders go")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    add("overrides", nargs="*", help="a.b=value, for every seed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
