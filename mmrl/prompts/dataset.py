"""Prompt files: jsonl with one object a line, ``prompt`` and any other columns."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from mmrl.errors import UserError
from mmrl.types import TASK, Prompt


def _refuse_other_kinds(value: Any) -> Any:
    """One message where pydantic would list what is wrong with each member of the union."""
    parts = list(value.values()) if isinstance(value, dict) else [value]
    files = [file for part in parts for file in (part if isinstance(part, list) else [part])]
    if not files or not all(isinstance(file, str | Path) and str(file) for file in files):
        raise ValueError("should be a path, a list of paths, or a mapping from tasks to either")
    return value


Source = Annotated[
    Path | list[Path] | dict[str, Path | list[Path]], BeforeValidator(_refuse_other_kinds)
]
"""One file, several one after another, or those of each task by its name."""


def load_prompts(source: Source, key: str) -> list[Prompt]:
    """The prompts of a source in its order, duplicates removed.

    Where it names tasks, each prompt gets the name of its own in the column ``task``.  ``key`` is
    the configuration key that named the source.  Raises ``UserError`` naming the file and the line
    where something is missing, empty or malformed.
    """
    if isinstance(source, dict):
        tasks = {task: load_prompts(files, f"{key}.{task}") for task, files in source.items()}
        prompts = [_of_task(p, task, key) for task, found in tasks.items() for p in found]
    else:
        paths = [source] if isinstance(source, Path) else source
        prompts = [prompt for path in paths for prompt in _load_file(path, key)]
    return list({prompt.id: prompt for prompt in prompts}.values())


def _of_task(prompt: Prompt, task: str, key: str) -> Prompt:
    own = prompt.columns.get(TASK, task)
    if own != task:
        raise UserError(
            f"{key}.{task}: prompt {prompt.text!r} is of the task {own!r} by its column"
        )
    # The same text in two tasks is two prompts, with noise and a teacher of their own.
    columns = {**prompt.columns, TASK: task}
    return Prompt(id=content_id(prompt.text, columns), text=prompt.text, columns=columns)


def _load_file(path: Path, key: str) -> list[Prompt]:
    if not path.is_file():
        raise UserError(f"{key}: prompts file not found: {path}")
    # Not `splitlines`: JSON strings may hold other line separators as they are.
    lines = path.read_bytes().split(b"\n")
    prompts = [
        _parse(line, f"{key}: {path}:{i}") for i, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise UserError(f"{key}: prompts file is empty: {path}")
    return prompts


def _parse(line: bytes, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {record!r:.60}")
    text = record.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: needs a non-empty string under 'prompt', got {text!r}")
    return Prompt(id=content_id(text, record), text=text, columns=record)


def content_id(text: str, columns: dict[str, Any]) -> str:
    """A short name derived from everything the prompt says."""
    content = json.dumps([text, columns], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
