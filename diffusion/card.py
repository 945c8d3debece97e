"""How exported weights of an image model are used: a part of the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.resolve import resolve
from mmrl.types import DTYPES

LIBRARY, PIPELINE_TAG = "diffusers", "text-to-image"
_ADAPTER = """\
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(
{base}    dtype={dtype},
)
pipe.load_lora_weights(".")  # this folder
image = pipe(
{call}).images[0]
"""
_WHOLE_MODEL = """\
import torch
from diffusers import {transformer}, {pipeline}

dtype = {dtype}
transformer = {transformer}.from_pretrained("transformer", dtype=dtype)  # in here
pipe = {pipeline}.from_pretrained(
{base}    transformer=transformer,
    dtype=dtype,
)
image = pipe(
{call}).images[0]
"""


def usage(backend: Mapping[str, Any]) -> str:
    """Python code for the section ``backend`` of a run's configuration."""
    model = backend.get("model", {})
    family = resolve("models", model.get("family", "sd3")).load
    template = _WHOLE_MODEL if model.get("lora") is None else _ADAPTER
    path = str(model.get("path", ""))
    base = [json.dumps(path), *(f"{name}=None" for name in _absent_parts(Path(path)))]
    sampling = {"prompt": json.dumps("a prompt"), **_sampling(backend, family)}
    return template.format(
        pipeline=family.PIPELINE,
        transformer=family.TRANSFORMER,
        base=_lines(base),
        dtype=str(DTYPES[model.get("dtype", "bf16")]),
        call=_lines([f"{key}={value}" for key, value in sampling.items()]),
    )


def _lines(arguments: Sequence[str]) -> str:
    return "".join(f"    {argument},\n" for argument in arguments)


def _absent_parts(pipeline: Path) -> list[str]:
    """Encoders and tokenizers that a local pipeline was saved without.

    diffusers refuses to load such a folder unless each is passed as ``None``.
    """
    index = pipeline / "model_index.json"
    if not index.is_file():
        return []
    parts = json.loads(index.read_text(encoding="utf-8"))
    encoders = ("text_encoder", "tokenizer")
    return [
        name for name, source in parts.items() if _is_absent(source) and name.startswith(encoders)
    ]


def _is_absent(source: Any) -> bool:
    return source == [None, None]


def _sampling(backend: Mapping[str, Any], family: Any) -> dict[str, str]:
    """Arguments of the pipeline call, as source text; keys that the run left open are absent."""
    changes = {k: v for k, v in (backend.get("evaluation") or {}).items() if v is not None}
    rollout = {**(backend.get("rollout") or {}), **changes}
    keys = {
        "num_inference_steps": "num_steps",
        family.GUIDANCE_ARGUMENT: "guidance",
        "height": "height",
        "width": "width",
    }
    found = {key: rollout.get(ours) for key, ours in keys.items()}
    found["max_sequence_length"] = backend.get("model", {}).get("max_sequence_length")
    arguments = {key: repr(value) for key, value in found.items() if value is not None}
    if family.GUIDANCE_ARGUMENT == "true_cfg_scale" and rollout.get("guidance", 1.0) > 1.0:
        arguments["negative_prompt"] = '""'  # this pipeline guides only away from something
    if rollout.get("grid") == "linspace_shifted" and rollout.get("num_steps"):
        # The pipeline's scheduler applies the shift to these itself.
        steps = rollout["num_steps"]
        arguments["sigmas"] = f"[1 - i / {steps} for i in range({steps})]"
    return arguments
