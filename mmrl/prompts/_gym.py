"""Puzzles of reasoning-gym, made on the spot: ``reasoning_gym:leg_counting?size=500&seed=1``.

Options are those of the task; ``seed`` is 0 unless it is named, so a source always says the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from mmrl.errors import UserError
from mmrl.resolve import optional
from mmrl.schema import nearest

PREFIX = "reasoning_gym:"

BY_HASH = frozenset(
    "isomorphic_strings knight_swap polynomial_multiplication ransom_note word_ladder".split()
)
"""Tasks whose puzzles depend on Python's hash seed too (version 0.1.25)."""

BY_CHANCE = frozenset({"list_functions"})
"""Tasks that do not keep to their seed."""


def gym_rows(source: str, key: str) -> Iterator[dict[str, Any]]:
    """``prompt``, ``answer``, ``metadata`` and ``source_dataset``, which the verifier reads.

    ``UserError`` for an unknown task or option, or a value that the task refuses.
    """
    package = optional("reasoning_gym", "mmrl[gym]", f"{key} = {source!r}")
    task, _, query = source.removeprefix(PREFIX).partition("?")
    known = package.factory.DATASETS
    if task not in known:
        raise UserError(f"{key}: unknown task of reasoning_gym {task!r}; {nearest(task, [*known])}")
    _refuse_unrepeatable(task, f"{key}: {source}")
    options = {"seed": 0, **_options(query, f"{key}: {source}")}
    allowed = [field.name for field in dataclasses.fields(known[task][1])]
    for name in options:
        if name not in allowed:
            raise UserError(f"{key}: {source}: unknown option {name!r}; {nearest(name, allowed)}")
    try:
        rows = list(package.create_dataset(task, **options))
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{key}: {source}: the task refuses {options}: {error}") from error
    for row in rows:
        yield {
            "prompt": row["question"],
            "answer": row["answer"],
            "metadata": row["metadata"],
            "source_dataset": task,
        }


def _refuse_unrepeatable(task: str, where: str) -> None:
    """Two processes, or a run and its continuation, would each have prompts of their own."""
    fixed = os.environ.get("PYTHONHASHSEED", "random") != "random"
    if task in BY_CHANCE or (task in BY_HASH and not fixed):
        way_out = "" if task in BY_CHANCE else "set the environment variable PYTHONHASHSEED=0, or "
        raise UserError(
            f"{where}: this task makes other puzzles in every process, so no run could be resumed; "
            f"{way_out}write its puzzles into a jsonl file once"
        )


def _options(query: str, where: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise UserError(f"{where}: options should read ?name=value&name=value") from None
    return {name: _value(text) for name, text in pairs}


def _value(text: str) -> Any:
    """A number, true, false, null or a list as in JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
