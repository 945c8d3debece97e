"""The Hugging Face model card that is written next to exported weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmrl.report import number
from mmrl.resolve import entries
from mmrl.run_folder import Change, RunFolder, before_after, read_run

# Sections of a configuration that hold named parts, with the kind each belongs to.
_PARTS = {
    "backend": "backends",
    "objective": "objectives",
    "advantage": "advantages",
    "modulators": "modulators",
    "regularisers": "regularisers",
    "rewards": "rewards",
}
_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_ADAPTER = """\
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(
{base}    dtype=torch.{dtype},
)
pipe.load_lora_weights(".")  # this folder
image = pipe(
{call}).images[0]
"""
_WHOLE_MODEL = """\
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

dtype = torch.{dtype}
transformer = SD3Transformer2DModel.from_pretrained("transformer", dtype=dtype)  # in here
pipe = StableDiffusion3Pipeline.from_pretrained(
{base}    transformer=transformer,
    dtype=dtype,
)
image = pipe(
{call}).images[0]
"""


def model_card(run: Path) -> str:
    """Markdown with YAML front matter for the weights of a run.

    Raises ``UserError`` if ``run`` is not a run folder.
    """
    folder = read_run(run)
    parts = [
        _front_matter(folder.config),
        f"# {folder.name}\n",
        _introduction(folder),
        f"## How to use it\n\n```python\n{usage(folder.config)}```\n",
        _results(before_after(folder.metrics)),
        _sources(folder.config),
        _versions(folder.environment),
    ]
    return "\n".join(part for part in parts if part)


def usage(config: Mapping[str, Any]) -> str:
    """Python code that loads the exported weights and samples the way the run did."""
    backend = config.get("backend", {})
    model = backend.get("model", {})
    template = _WHOLE_MODEL if model.get("lora") is None else _ADAPTER
    path = str(model.get("path", ""))
    base = [json.dumps(path), *(f"{name}=None" for name in _absent_parts(Path(path)))]
    sampling = {"prompt": json.dumps("a prompt"), **_sampling(backend)}
    return template.format(
        base=_lines(base),
        dtype=_TORCH_DTYPES.get(model.get("dtype"), "bfloat16"),
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


def _sampling(backend: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of the pipeline call, as source text; keys that the run left open are absent."""
    changes = {k: v for k, v in (backend.get("evaluation") or {}).items() if v is not None}
    rollout = {**(backend.get("rollout") or {}), **changes}
    keys = {
        "num_inference_steps": "num_steps",
        "guidance_scale": "guidance",
        "height": "height",
        "width": "width",
    }
    found = {key: rollout.get(ours) for key, ours in keys.items()}
    found["max_sequence_length"] = backend.get("model", {}).get("max_sequence_length")
    arguments = {key: repr(value) for key, value in found.items() if value is not None}
    if rollout.get("grid") == "linspace_shifted" and rollout.get("num_steps"):
        # The pipeline's scheduler applies the shift to these itself.
        steps = rollout["num_steps"]
        arguments["sigmas"] = f"[1 - i / {steps} for i in range({steps})]"
    return arguments


def _front_matter(config: Mapping[str, Any]) -> str:
    model = config.get("backend", {}).get("model", {})
    kind = "full-fine-tuning" if model.get("lora") is None else "lora"
    data = {
        "base_model": model.get("path"),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "tags": ["mmrl", "reinforcement-learning", "text-to-image", "diffusers", kind],
    }
    known = {key: value for key, value in data.items() if value is not None}
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n"


def _introduction(folder: RunFolder) -> str:
    config = folder.config
    training = config.get("training", {})
    base = config.get("backend", {}).get("model", {}).get("path", "an unnamed model")
    rewards = ", ".join(
        f"`{part.get('label') or part['name']}`" for part in _parts(config, "rewards")
    )
    samples = (training.get("prompts_per_step") or 0) * (training.get("group_size") or 0)
    steps = max((int(row["step"]) for row in folder.metrics), default=0)
    size = f", {samples} samples a step" if samples else ""
    return (
        f"`{base}` fine-tuned by reinforcement learning for {steps} steps{size}.  \n"
        f"Rewards: {rewards or 'not recorded'}.  \n"
        f"Training prompts: `{config.get('prompts', {}).get('source', 'not recorded')}`.  \n"
        "The licence of the base model applies to these weights.\n"
    )


def _results(changes: Sequence[Change]) -> str:
    if not changes:
        return ""
    rows = "".join(
        f"| {c.name} | {number(c.before)} | {number(c.after)} | {number(c.change, sign=True)} |\n"
        for c in changes
    )
    return (
        "## Results on held-out prompts\n\n"
        "| metric | before | after | change |\n|---|---:|---:|---:|\n" + rows
    )


def _sources(config: Mapping[str, Any]) -> str:
    """The parts the run was made of, each with its paper where it has one."""
    lines = []
    for section, kind in _PARTS.items():
        shipped = {entry.name: entry for entry in entries(kind)}
        for part in _parts(config, section):
            entry = shipped.get(part["name"])
            paper = f" ({entry.paper})" if entry and entry.paper else ""
            lines.append(f"* {section}: `{part['name']}`{paper}")
    unique = list(dict.fromkeys(lines))
    return "## Method\n\n" + "\n".join(unique) + "\n" if unique else ""


def _parts(config: Mapping[str, Any], section: str) -> list[Mapping[str, Any]]:
    """The named parts of a section that holds one of them or a list."""
    value = config.get(section) or []
    return value if isinstance(value, list) else [value]


def _versions(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions") or {}
    lines = [f"* {name} {version}" for name, version in versions.items()]
    if environment.get("commit"):
        lines.append(f"* commit `{environment['commit']}`")
    return "## Versions\n\n" + "\n".join(lines) + "\n" if lines else ""
