"""Rows of parquet and csv files and of data sets of the hub, through ``datasets``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmrl.errors import UserError
from mmrl.resolve import optional

KINDS = {".parquet": "parquet", ".csv": "csv"}

_NAME, _PART = r"[A-Za-z0-9][\w.-]*", r"[\w.+%\[\]:-]+"
_HUB = re.compile(
    rf"(?P<id>{_NAME}/{_NAME}|{_NAME}(?=@|:[^@]*@))(?::(?P<name>[\w.-]+))?(?:@(?P<split>{_PART}))?"
)
_FILE_LIKE = (".jsonl", ".json", ".txt", *KINDS)


def is_hub_id(path: Path) -> bool:
    """Whether a path that is no file may name a data set of the hub, as ``id[:name][@split]``."""
    local = path.suffix in _FILE_LIKE or (len(path.parts) > 1 and path.parent.is_dir())
    return not local and _HUB.fullmatch(path.as_posix()) is not None


def file_rows(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a file; read as they come, so nothing is cached.  ``UserError`` if it is broken."""
    datasets = _package(key)
    kind = KINDS[path.suffix]
    try:
        yield from datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except Exception as error:  # pyarrow, pandas and datasets each have their own
        raise UserError(f"{key}: {path} cannot be read as {kind}: {_first_line(error)}") from error


def hub_rows(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set of the hub, of its split ``train`` unless another is named.

    Downloaded once, then found offline.  ``UserError`` if there is no such data set, subset or
    split, or no network.
    """
    datasets = _package(key)
    match = _HUB.fullmatch(path.as_posix())
    assert match is not None, "is_hub_id comes first"
    try:
        rows = datasets.load_dataset(match["id"], match["name"], split=match["split"] or "train")
    except Exception as error:  # the network's, the hub's and the builders' own
        raise UserError(
            f"{key}: {path.as_posix()!r} is no file here, and as a data set of the hub "
            f"(id[:subset][@split]) it cannot be loaded: {_first_line(error)}"
        ) from error
    yield from rows


def _package(key: str) -> Any:
    datasets = optional("datasets", "datasets", key)
    datasets.disable_progress_bars()
    return datasets


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".split("\n", 1)[0]
