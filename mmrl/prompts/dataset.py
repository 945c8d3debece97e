"""Where prompts come from: files, data sets of the hub, puzzles made on the spot.

jsonl has one object a line; json a list of objects; parquet and csv a row for each; each with
``prompt``, a text or a list of messages, and any other columns.  ``id[:subset][@split]`` is a data
set of the hub, ``reasoning_gym:task?size=500`` a task of that package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from mmrl.errors import UserError
from mmrl.prompts._gym import PREFIX, gym_rows
from mmrl.prompts._tables import KINDS, file_rows, hub_rows, is_hub_id
from mmrl.prompts._template import Render, renderer
from mmrl.schema import nearest
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

TEMPLATE = "prompts.template"
Keys = Mapping[str, str]
"""Where a column stands in the files: its name there, or a path with dots into one."""


def load_prompts(
    source: Source, key: str, keys: Keys | None = None, template: str | None = None
) -> list[Prompt]:
    """The prompts of a source in its order, of duplicates the first.

    Where it names tasks, each prompt gets the name of its own in the column ``task``.  ``key`` is
    the configuration key that named the source; columns that ``keys`` names must be there and not
    empty; ``template`` says in Jinja what becomes of a text.  Raises ``UserError`` naming the file
    and the line where something is missing, empty or malformed.
    """
    keys = keys or {}
    if isinstance(source, dict):
        tasks = {
            task: load_prompts(file, f"{key}.{task}", keys, template)
            for task, file in source.items()
        }
        prompts = [_of_task(p, task) for task, found in tasks.items() for p in found]
    else:
        paths = [source] if isinstance(source, Path) else source
        render = renderer(template, TEMPLATE) if template is not None else None
        prompts = [prompt for path in paths for prompt in _load(path, key, keys, render)]
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.id, prompt)
    return list(found.values())


def _of_task(prompt: Prompt, task: str) -> Prompt:
    own = prompt.columns.get(TASK, task)
    if own != task:
        raise UserError(f"{prompt.named} is of the task {own!r} by its column, not {task!r}")
    # The same text in two tasks is two prompts, with noise and a teacher of their own.
    columns = {**prompt.columns, TASK: task}
    name = content_id(prompt.text, columns, prompt.messages)
    return replace(prompt, id=name, columns=columns)


def _load(path: Path, key: str, keys: Keys, render: Render | None) -> list[Prompt]:
    """Of one source; every record with the place that an error names."""
    records = _records(path, key)
    prompts = [_prompt(_renamed(record, keys, where), where, render) for where, record in records]
    if not prompts:
        raise UserError(f"{key}: prompts file is empty: {path}")
    return prompts


def _records(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    name = path.as_posix()
    if name.startswith(PREFIX):
        return _numbered(gym_rows(name, key), f"{key}: {name}")
    if path.is_file():
        tabular = path.suffix in KINDS
        return _numbered(file_rows(path, key), f"{key}: {path}") if tabular else _json(path, key)
    if is_hub_id(path):
        return _numbered(hub_rows(path, key), f"{key}: {name}")
    raise UserError(f"{key}: prompts file not found: {path}")


def _numbered(
    rows: Iterable[Mapping[str, Any]], where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, row in enumerate(rows, 1):
        yield f"{where}: row {i}", dict(row)


def _json(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of objects, or in a file ``.json`` one list of them."""
    content = path.read_bytes()
    if path.suffix == ".json" and content.lstrip().startswith(b"["):
        for i, record in enumerate(_parsed(content, f"{key}: {path}"), 1):
            yield f"{key}: {path}: row {i}", _object(record, f"{key}: {path}: row {i}")
        return
    # Not `splitlines`: JSON strings may hold other line separators as they are.
    for i, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            where = f"{key}: {path}:{i}"
            yield where, _object(_parsed(line, where), where)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, got {record!r:.60}")
    return record


# --- from a record to a prompt ------------------------------------------------------------------


def _renamed(record: dict[str, Any], keys: Keys, where: str) -> dict[str, Any]:
    """The record with the columns that ``keys`` names beside its own; the prompt moves."""
    if not keys:
        return record
    named = {column: _at(record, path, where, column) for column, path in keys.items()}
    return {k: v for k, v in record.items() if k != keys.get("prompt")} | named


def _at(record: Mapping[str, Any], path: str, where: str, column: str) -> Any:
    found: Any = record
    for name in [path] if path in record else path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            allowed = sorted(map(str, found)) if isinstance(found, Mapping) else [repr(found)]
            hint = nearest(name, allowed)
            raise UserError(f"{where}: no column {path!r} (keys.{column}): no {name!r}; {hint}")
        found = found[name]
    if found is None or found == [] or (isinstance(found, str) and not found.strip()):
        raise UserError(f"{where}: the column {path!r} (keys.{column}) is empty")
    return found


def _prompt(record: dict[str, Any], where: str, render: Render | None) -> Prompt:
    columns = dict(record)
    said = columns.pop("prompt", None)
    messages = _conversation(said, where) if isinstance(said, list) else ()
    text = _last_words(messages) if messages else said
    if not isinstance(text, str) or not text.strip():
        known = f"; its columns: {', '.join(columns)} (see `keys`)" if said is None else ""
        what = "a user's message with text" if messages else "a non-empty string"
        raise UserError(f"{where}: needs {what} under 'prompt', got {said!r:.200}{known}")
    if render is not None:
        text = _rendered(text, columns, messages, where, render)
    try:
        name = content_id(text, columns, messages)
    except TypeError as error:
        raise UserError(f"{where}: a column is of a kind that has no content: {error}") from None
    return Prompt(id=name, text=text, columns=columns, messages=messages, where=where)


def _rendered(
    text: str, columns: Mapping[str, Any], messages: Any, where: str, render: Render
) -> str:
    if messages:
        raise UserError(
            f"{where}: {TEMPLATE} is for prompts that are a text, and this has messages"
        )
    try:
        found = render(text, columns)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not found.strip():
        raise UserError(f"{where}: {TEMPLATE} makes an empty text of it")
    return found


def _conversation(messages: list[Any], where: str) -> tuple[dict[str, Any], ...]:
    """Messages with ``role`` and ``content``, a text or a list of typed parts, and no empty keys.

    Tables give every message the keys of all.
    """
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [{}]
        right = isinstance(content, str | list) and all(isinstance(p, Mapping) for p in parts)
        if not right or not isinstance(message.get("role"), str):
            raise UserError(
                f"{where}: prompt[{i}] should be a message with a `role` and a `content` that is a "
                f"text or a list of parts, got {message!r:.60}"
            )
    return tuple({k: _without_none(v) for k, v in m.items() if v is not None} for m in messages)


def _without_none(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [{k: v for k, v in part.items() if v is not None} for part in content]


def _last_words(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last message of the user, "" if there is none."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    if not said or isinstance(said[-1], str):
        return said[-1] if said else ""
    return "\n".join(part["text"] for part in said[-1] if isinstance(part.get("text"), str))


def content_id(
    text: str, columns: Mapping[str, Any], messages: Sequence[Mapping[str, Any]] = ()
) -> str:
    """A short name derived from everything the prompt says.

    ``TypeError`` for a column of a kind whose content is not known.
    """
    content = json.dumps(
        [text, columns, *([messages] if messages else [])],
        sort_keys=True,
        ensure_ascii=False,
        default=_content,
    )
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _content(value: Any) -> Any:
    """What JSON cannot say: bytes, images and arrays by their hash; times and decimals as text."""
    if isinstance(value, date | time | Decimal):
        return str(value)
    if hasattr(value, "tobytes"):  # of PIL or numpy
        form = [str(getattr(value, name, "")) for name in ("mode", "size", "dtype", "shape")]
        return [*form, _content(value.tobytes())]
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    raise TypeError(f"{type(value).__name__}")
