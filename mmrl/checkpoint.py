"""Checkpoints that survive a kill at any moment and resume to the bit.

A checkpoint is written to a hidden folder, each file flushed to disk, then renamed: a folder with a
final name is whole.  A manifest of SHA-256 sums is verified before anything is loaded.  Tensors are
safetensors, or ``torch.save`` files that are read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mmrl.errors import UserError
from mmrl.sharding import trainable, whole, write
from mmrl.stale import Stale
from mmrl.zero import load_zero_moments, uses_zero, zero_moments

MANIFEST = "manifest.json"
SCALER = "scaler.pt"  # fp16 only
_NAME = re.compile(r"^checkpoint-(\d+)$")
_OPTIONS = StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
)  # of the optimizer


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. ``step``: finished steps; ``updates``: optimizer steps made.

    ``bad_updates``: skipped ones in total; ``bad_in_a_row``: the current streak.  ``num_tokens``:
    tokens of all rollouts, prompts included.  ``sampler``, ``budget`` and ``advantage``: JSON-able
    states of those parts; ``modulators``: of each by its place in the list; ``losses``: of the
    objective and the regularisers that have one, by key.
    """

    step: int = 0
    updates: int = 0
    bad_updates: int = 0
    bad_in_a_row: int = 0
    num_tokens: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    advantage: dict[str, Any] = field(default_factory=dict)
    modulators: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The live objects whose state a checkpoint holds besides ``Progress``.

    ``stale``: groups kept for later steps, where there are any.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    auxiliary: Mapping[str, Tensor]
    stale: Stale | None = None


def save(
    run: Path, accelerator: Accelerator, trained: Trained, progress: Progress, keep_last: int
) -> Path:
    """Write ``run/checkpoint-<step>`` and remove the oldest beyond ``keep_last``."""
    final = run / f"checkpoint-{progress.step}"
    temporary = run / f".{final.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # Collective for split models, so every process asks; the main one alone keeps the answer.
    main = accelerator.is_main_process
    weights = whole(trainable(accelerator.unwrap_model(trained.model)), keep=main)
    # torch fills an empty state by making a step, which would count as one ever after.
    started = bool(trained.optimizer.state)
    moments = _moments(accelerator, trained) if started else {}
    torch.save(random_state(), temporary / f"random-{accelerator.process_index}.pt")
    if trained.stale is not None:
        trained.stale.save(temporary)
    accelerator.wait_for_everyone()
    if main:
        save_file(weights, temporary / "weights.safetensors")
        save_file(_contiguous(trained.auxiliary), temporary / "auxiliary.safetensors")
        torch.save(moments, temporary / "optimizer.pt")
        torch.save(trained.scheduler.state_dict(), temporary / "scheduler.pt")
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), temporary / SCALER)
        (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=1))
        seal(temporary, final)
        for old in found(run)[:-keep_last]:
            # Renamed first: a folder with a final name is always whole.
            shutil.rmtree(old.rename(run / f".{old.name}.tmp"))
    accelerator.wait_for_everyone()
    return final


def load(folder: Path, accelerator: Accelerator, trained: Trained) -> tuple[Progress, dict]:
    """Restore everything; returns the progress and the auxiliary tensors."""
    auxiliary = load_weights(folder, accelerator, trained.model)
    moments = torch.load(folder / "optimizer.pt", weights_only=True)
    if uses_zero(accelerator):
        trained.optimizer.refresh_fp32_params()  # type: ignore[attr-defined]  # its own copy
    if moments:
        _load_moments(accelerator, trained, moments)
    trained.scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
    if accelerator.scaler is not None and (folder / SCALER).is_file():
        accelerator.scaler.load_state_dict(torch.load(folder / SCALER, weights_only=True))
    if trained.stale is not None:
        trained.stale.load(folder)
    states = folder / f"random-{accelerator.process_index}.pt"
    # A larger world than the saved one has new processes; all training noise is derived from
    # seeds, so they only lose the position of library-internal generators.
    if states.is_file():
        set_random_state(torch.load(states, weights_only=True))
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    return progress, auxiliary


def load_weights(
    folder: Path, accelerator: Accelerator, model: torch.nn.Module
) -> dict[str, Tensor]:
    """Verify a checkpoint and restore the trained parameters; returns the auxiliary tensors."""
    verify(folder)
    weights = load_file(folder / "weights.safetensors")
    # Frozen parameters and buffers come from the base model.
    parameters = trainable(accelerator.unwrap_model(model))
    missing = parameters.keys() - weights.keys()
    if missing:
        raise UserError(f"checkpoint {folder} lacks the trained parameters {sorted(missing)[:3]}")
    write(parameters, weights)
    return load_file(folder / "auxiliary.safetensors")


def _moments(accelerator: Accelerator, trained: Trained) -> dict[str, Any]:
    """State of the optimizer by parameter name, gathered; the same under every launcher."""
    if uses_zero(accelerator):
        network, main = accelerator.unwrap_model(trained.model), accelerator.is_main_process
        return zero_moments(network, trained.optimizer, keep=main)
    return get_optimizer_state_dict(trained.model, trained.optimizer, options=_OPTIONS)


def _load_moments(accelerator: Accelerator, trained: Trained, moments: dict[str, Any]) -> None:
    if uses_zero(accelerator):
        network = accelerator.unwrap_model(trained.model)
        load_zero_moments(network, trained.optimizer, moments)
    else:
        set_optimizer_state_dict(trained.model, trained.optimizer, moments, options=_OPTIONS)


def found(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    named = [(int(m.group(1)), p) for p in run.iterdir() if (m := _NAME.match(p.name))]
    return [path for _, path in sorted(named)]


def seal(temporary: Path, final: Path) -> None:
    """Add the manifest, flush everything to disk and give the folder its final name."""
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    sums = {str(p.relative_to(temporary)): sha256(p) for p in files}
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps(sums, indent=1))
    for path in [*files, manifest, temporary]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _flush(final.parent)


def verify(folder: Path) -> None:
    """``UserError`` naming the first file that is missing or differs from the manifest."""
    manifest = folder / MANIFEST
    hint = "; remove this folder to resume from the checkpoint before it"
    try:
        sums = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"corrupt checkpoint {folder}: {MANIFEST}: {error}{hint}") from None
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"corrupt checkpoint {folder}: {name} is missing{hint}")
        if sha256(path) != expected:
            raise UserError(f"corrupt checkpoint {folder}: {name} fails its checksum{hint}")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch, in types safe to load."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Inverse of ``random_state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _contiguous(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
