"""Prompt files: jsonl with one object a line, ``prompt`` and any other columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrl.errors import UserError
from mmrl.types import Prompt


def load_prompts(source: Path | Sequence[Path], key: str) -> list[Prompt]:
    """The prompts of a file, or of several one after another, duplicates removed.

    ``key`` is the configuration key that named them.  Raises ``UserError`` naming the file and the
    line where something is missing, empty or malformed.
    """
    paths = [source] if isinstance(source, Path) else source
    prompts = [prompt for path in paths for prompt in _load_file(path, key)]
    return list({prompt.id: prompt for prompt in prompts}.values())


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
