"""Which parameters are trained: low-rank adapters, or all."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diffusion.config import ModelConfig, TeacherConfig
from mmrl.adapters import ADAPTER, LoraConfig, adapter_layers, add_lora, leave_dtypes_to_autocast
from mmrl.errors import UserError
from mmrl.noise import generator
from mmrl.weights import trainable

LORA_FILE = "pytorch_lora_weights.safetensors"
_PREFIX = "transformer."


def prepare_weights(
    transformer: Any, model: ModelConfig, default_targets: Sequence[str], seed: int
) -> None:
    """Trained parameters in float32; with LoRA the others are frozen as they are.

    ``seed`` starts the adapter; the global generator is left alone.
    """
    transformer.eval()
    if model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if model.lora is None:
        transformer.float().requires_grad_(True)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, 0, "lora").initial_seed())
        add_lora(transformer, model.lora, default_targets)
    if model.lora.path is not None:
        start_from(transformer, model.lora)
    for parameter in trainable(transformer).values():
        parameter.data = parameter.data.float()


def start_from(transformer: Any, lora: LoraConfig) -> None:
    """Give the adapter the weights in ``lora.path``; ``UserError`` unless they fit it exactly."""
    where = f"model.lora.path = {lora.path!r}"
    about, state = _read_adapter(weights_folder(Path(lora.path or ""), LORA_FILE, where), where)
    # The scale alpha / rank is no part of the weights, so a difference would go unnoticed.
    for name, ours in (("r", lora.rank), ("lora_alpha", lora.alpha)):
        theirs = about[name]
        if theirs != ours:
            raise UserError(f"{where} has {name} = {theirs}, but model.lora says {ours}")
    _fill(transformer, ADAPTER, state, where)


def teacher_folder(teacher: TeacherConfig) -> Path:
    """Where a teacher's adapter or else its network lies; ``UserError`` if neither is there."""
    path, where = Path(teacher.path), f"teachers: path = {teacher.path!r}"
    try:
        return weights_folder(path, LORA_FILE, where)
    except UserError as missing:
        return weights_folder(path, "transformer", f"{missing}, and")


def adapter_size(folder: Path) -> int:
    """Numbers in the adapter in ``folder``, from the head of its file."""
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())


def load_frozen(transformer: Any, folder: Path, name: str, where: str) -> None:
    """Add the adapter in ``folder`` beside the trained one, which stays the active one.

    ``UserError``, which names ``where``, if it does not fit the transformer.
    """
    from peft import LoraConfig as PeftConfig

    about, state = _read_adapter(folder, where)
    trained = trainable(transformer).keys()
    targets = sorted({key.partition(".lora_")[0] for key in state})
    config = PeftConfig(r=about["r"], lora_alpha=about["lora_alpha"], target_modules=targets)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            transformer.add_adapter(config, name)
    except ValueError as error:
        raise UserError(f"{where} does not fit this model: {error}") from error
    leave_dtypes_to_autocast(transformer)
    _fill(transformer, name, state, where)
    for key, parameter in transformer.named_parameters():
        parameter.requires_grad_(key in trained)
        if f".{name}." in key:
            parameter.data = parameter.data.float()
    for layer in adapter_layers(transformer):
        layer._active_adapter = [ADAPTER]


def _read_adapter(folder: Path, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What peft would be told of the adapter, and its weights by module.

    A file that does not say it has alpha = rank, as every reader assumes.  ``UserError`` for
    variants of LoRA that would be computed otherwise.
    """
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        state = {key: file.get_tensor(key) for key in file.keys()}
    about = {key.removeprefix(_PREFIX): value for key, value in about.items()}
    state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if about.get(key):
            raise UserError(f"{where} was made with {key} = {about[key]!r}, which is not supported")
    rank = about.get("r", next(len(x) for key, x in state.items() if "lora_A" in key))
    return {"lora_alpha": rank, **about, "r": rank}, state


def _fill(transformer: Any, name: str, state: dict[str, Tensor], where: str) -> None:
    """Copy weights into the adapter ``name``, of which there must be neither more nor less."""
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(transformer, state, name)
    except RuntimeError as error:
        raise UserError(f"{where} does not fit this adapter: {error}") from error
    missing = [key for key in result.missing_keys if f".{name}." in key]
    odd = [*missing, *result.unexpected_keys]
    if odd:
        raise UserError(f"{where} is an adapter of other modules, e.g. {odd[0]}")


def weights_folder(path: Path, needed: str, where: str) -> Path:
    """``path`` or its ``final``, where a run keeps its weights: the one that holds ``needed``.

    ``UserError``, which names ``where``, if neither does.
    """
    for folder in (path / "final", path):
        if (folder / needed).exists():
            return folder
    raise UserError(f"{where} holds no {needed}, neither itself nor in final/")
