"""The Hugging Face model card that is written next to exported weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from mmrl.errors import UserError
from mmrl.report import number
from mmrl.resolve import backend_module, entries
from mmrl.run_folder import Change, RunFolder, before_after, read_run

# Sections of a configuration that hold named parts, with the kind each belongs to.
_PARTS = {
    "backend": "backends",
    "objective": "objectives",
    "advantage": "advantages",
    "prompts.sampler": "samplers",
    "prompts.budget": "budgets",
    "modulators": "modulators",
    "selection": "selection",
    "regularisers": "regularisers",
    "correction": "corrections",
    "rewards": "rewards",
}


def model_card(run: Path) -> str:
    """Markdown with YAML front matter for the weights of a run.

    Raises ``UserError`` if ``run`` is not a run folder.
    """
    folder = read_run(run)
    parts = [
        _front_matter(folder.config),
        f"# {folder.name}\n",
        _introduction(folder),
        _usage_section(usage(folder.config)),
        _results(before_after(folder.metrics)),
        _sources(folder.config),
        _versions(folder.environment),
    ]
    return "\n".join(part for part in parts if part)


def _usage_section(source: str) -> str:
    return f"## How to use it\n\n```python\n{source}```\n" if source else ""


def usage(config: Mapping[str, Any]) -> str:
    """Python code that loads the exported weights and samples the way the run did.

    Empty where the backend has none to show.
    """
    card = _backend_card(config)
    return card.usage(config["backend"]) if card else ""


def _backend_card(config: Mapping[str, Any]) -> ModuleType | None:
    """What a backend says about its weights: ``LIBRARY``, ``PIPELINE_TAG`` and ``usage``."""
    name = (config.get("backend") or {}).get("name")
    try:
        return backend_module(name, "card") if name else None
    except UserError:
        return None


def _front_matter(config: Mapping[str, Any]) -> str:
    model = config.get("backend", {}).get("model", {})
    kind = "full-fine-tuning" if model.get("lora") is None else "lora"
    card = _backend_card(config)
    library, tag = (card.LIBRARY, card.PIPELINE_TAG) if card else (None, None)
    tags = ["mmrl", "reinforcement-learning", tag, library, kind]
    data = {
        "base_model": model.get("path"),
        "library_name": library,
        "pipeline_tag": tag,
        "license": "other",
        "tags": [name for name in tags if name],
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
    value: Any = config
    for key in section.split("."):
        value = (value or {}).get(key)
    return value if isinstance(value, list) else [value] if value else []


def _versions(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions") or {}
    lines = [f"* {name} {version}" for name, version in versions.items()]
    if environment.get("commit"):
        lines.append(f"* commit `{environment['commit']}`")
    return "## Versions\n\n" + "\n".join(lines) + "\n" if lines else ""
