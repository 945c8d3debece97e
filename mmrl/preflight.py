"""What is refused before training starts, and what `mmrl check` prints."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from mmrl.config import RunConfig
from mmrl.errors import UserError
from mmrl.prompts.dataset import load_prompts
from mmrl.resolve import backend_module
from mmrl.types import Prompt

# Largest |log ratio| of unchanged weights: zero in exact arithmetic.  In half precision two kernels
# (with and without gradients) may round a log-probability of order 1 differently in the last bits.
REPLAY_BUDGET = {"no": 1e-6, "bf16": 1e-2, "fp16": 2e-3}


def refuse_unless_consistent(config: RunConfig) -> None:
    """``UserError`` for combinations of valid options that cannot work together."""
    refuse_missing_terms(config)
    training, name = config.training, config.advantage.name
    minimum = getattr(config.advantage.module, "MIN_GROUP_SIZE", 1)
    if training.group_size < minimum:
        raise UserError(
            f"training.group_size: {training.group_size} is too small for advantage {name!r}, "
            f"which compares the samples of a group; allowed: {minimum} or more"
        )
    needs_horizon = training.aggregation == "sample_sum_over_horizon"
    if needs_horizon != (training.horizon is not None):
        raise UserError(
            f"training.horizon: {training.horizon} with training.aggregation "
            f"{training.aggregation!r}; set it with sample_sum_over_horizon, and only then"
        )
    samples = training.prompts_per_step * training.group_size
    if training.updates_per_epoch > samples:
        raise UserError(
            f"training.updates_per_epoch: {training.updates_per_epoch} is more than the {samples} "
            "samples of a step (training.prompts_per_step x training.group_size)"
        )


def refuse_missing_terms(config: RunConfig) -> None:
    """``UserError`` if a part needs a term that the backend's likelihood does not provide."""
    provided = config.backend.config.provides  # type: ignore[attr-defined]
    for kind, part in [
        ("objective", config.objective),
        *(("regularisers", part) for part in config.regularisers),
    ]:
        missing = part.module.needs(part.config) - provided
        if missing:
            raise UserError(
                f"{kind}: {part.name!r} needs {', '.join(sorted(missing))}, which backend "
                f"{config.backend.name!r} with this likelihood does not provide; "
                f"it provides {', '.join(sorted(provided))}"
            )


def largest_gap(so_far: float, gap: Tensor) -> float:
    """Largest |gap| seen, NaN as soon as there is one."""
    now = float(gap.abs().max()) if gap.numel() else 0.0
    return so_far if math.isnan(so_far) or now <= so_far else now


def refuse_gap(largest: float, mixed_precision: str) -> None:
    """``UserError`` if replayed log-probabilities differ by more than the budget of the dtype."""
    budget = REPLAY_BUDGET[mixed_precision]
    # Written so that NaN is refused as well.
    if not largest <= budget:
        raise UserError(
            f"replaying a rollout at unchanged weights gives a log-ratio of {largest:.3g}, more "
            f"than {budget:.0e}: the ratio would not start at 1, so the update would be wrong; "
            "use dtype fp32, or look for dropout or other randomness in the model"
        )


def load_prompt_sets(config: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts, checked against what the run asks of them."""
    training = load_prompts(config.prompts.source, "prompts.source")
    count = config.training.prompts_per_step
    if count > len(training):
        raise UserError(
            f"training.prompts_per_step: {count} is more than the {len(training)} prompts "
            f"in {config.prompts.source}"
        )
    source = config.evaluation.source
    evaluation = load_prompts(source, "evaluation.source") if source else []
    return training, evaluation[: config.evaluation.max_prompts]


def describe(config: RunConfig) -> list[tuple[str, str]]:
    """Derived counts of a run, as (what, value) lines; loads no weights."""
    refuse_unless_consistent(config)
    training, evaluation = load_prompt_sets(config)
    size = config.training
    samples = size.prompts_per_step * size.group_size
    updates = size.num_epochs * size.updates_per_epoch
    per_update = -(-samples // size.updates_per_epoch)
    judged = len(evaluation) * config.evaluation.samples_per_prompt
    backend = backend_module(config.backend.name, "backend")
    rewards = ", ".join(f"{spec.weight:g} x {spec.label}" for spec in config.rewards)
    memory = _memory(backend.estimate_memory(config.backend.config), size.micro_batch_size)
    return [
        ("run folder", str(config.run_dir)),
        ("prompts", f"{len(training)} for training, {len(evaluation)} held out"),
        ("samples per step", f"{samples} = {size.prompts_per_step} prompts x {size.group_size}"),
        ("micro-batches", f"{-(-per_update // size.micro_batch_size)} per optimizer step"),
        ("optimizer steps", f"{size.num_steps * updates} = {size.num_steps} steps x {updates}"),
        ("samples in all", str(samples * size.num_steps)),
        ("evaluation", f"{judged} samples every {config.evaluation.every} steps"),
        ("rewards", rewards),
        ("objective", _pipeline(config)),
        *(_key_value(line) for line in backend.describe(config.backend.config)),
        *((f"memory: {name}", human_bytes(value)) for name, value in memory.items()),
        ("memory: at most", human_bytes(sum(memory.values()))),
    ]


def _memory(estimate: dict[str, float], micro_batch_size: int) -> dict[str, float]:
    """Bytes by use; what is counted for one sample is held for a whole micro-batch."""
    found = {}
    for name, value in estimate.items():
        per_sample = name.endswith("_per_sample")
        label = name.removesuffix("_per_sample").replace("_", " ")
        found[label] = value * (micro_batch_size if per_sample else 1)
    return found


def _key_value(line: str) -> tuple[str, str]:
    key, _, value = line.partition(": ")
    return key, value


def human_bytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.1f} {unit}"


def refuse_foreign_folder(run: Path, resume: bool) -> None:
    """``UserError`` if the run folder holds something that starting afresh would destroy."""
    if run.exists() and not run.is_dir():
        raise UserError(f"output_dir: {run} is a file")
    ours = (run / "config.yaml").is_file()
    if not run.is_dir() or not any(run.iterdir()) or (resume and ours):
        return
    if resume:
        raise UserError(f"output_dir: {run} holds no run to resume, but other files")
    what = "another run" if ours else "other files"
    raise UserError(
        f"output_dir: {run} holds {what}; continue it with --resume, or choose a new folder with "
        f"output_dir=... or name=..."
    )


def _pipeline(config: RunConfig) -> str:
    parts = [config.advantage, *config.modulators, config.objective, *config.regularisers]
    return " -> ".join(part.name for part in parts)
