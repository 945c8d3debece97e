"""Completions of a language run as parquet, a file for each step that is looked at.

A row is a completion: ``step``, ``prompt``, ``completion``, ``rewards/<label>`` (raw, without the
weights), ``reward`` (their weighted sum), in training ``advantage``, and the columns of the prompt,
unless one is called like these.  pandas reads the files, and ``datasets`` opens their pictures.
Where the samples are no texts nothing is written: pictures are shown in grids.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from mmrl.distributed import gather_items
from mmrl.run_folder import Kind, completion_files
from mmrl.types import RolloutGroup
from rewards.combine import GroupScores

NUMBERS, REWARDS = ("reward", "advantage"), "rewards/"
MAX_PIXELS = 512
"""Larger pictures are reduced until neither side is longer."""


@dataclass(frozen=True, kw_only=True)
class CompletionFiles:
    """Writes the files of a run, with rows of all processes, on the main one.

    ``image_columns``: where prompts have their pictures, if they do: in the first of these that
    they have; the file has them in the very first.  ``max_rows``: of a file; whole groups, spread
    evenly over the step, but at least one.
    """

    folder: Path
    accelerator: Accelerator
    image_columns: Sequence[str]
    max_rows: int

    def write(
        self,
        kind: Kind,
        step: int,
        groups: Sequence[RolloutGroup],
        scores: Sequence[GroupScores],
        advantages: Tensor | None = None,
    ) -> None:
        """``groups`` of this process, each on one process only; ``scores`` of all, in order.

        ``advantages`` [N] as the scores go.  A file of the same step is replaced.
        """
        sizes = [len(score.combined) for score in scores]
        first = {score.index: sum(sizes[:i]) for i, score in enumerate(scores)}
        shown = {score.index: score for score in _spread(scores, self.max_rows)}
        local = []
        for group in groups:
            score = shown.get(group.request.index)
            if score is not None:
                start = first[score.index]
                own = None if advantages is None else advantages[start : start + len(score.valid)]
                local += [(score.index, row) for row in self._rows(step, group, score, own)]
        rows = sorted(gather_items(self.accelerator, local), key=lambda pair: pair[0])
        if rows and self.accelerator.is_main_process:
            path = self.folder / f"{kind}-{step:06d}.parquet"
            kept = [row for _, row in rows[: self.max_rows]]
            write_table(path, kept, next(iter(self.image_columns), None))

    def _rows(
        self, step: int, group: RolloutGroup, scores: GroupScores, advantages: Tensor | None
    ) -> list[dict[str, Any]]:
        if not all(isinstance(output, str) for output in group.outputs):
            return []
        prompt = group.request.prompt
        columns = dict(prompt.columns)
        images = {}
        if self.image_columns:
            first = self.image_columns[0]
            found = next((name for name in self.image_columns if name in columns), first)
            images[first] = pictures(columns.pop(found, None))
        return [
            {
                **columns,
                **images,
                "step": step,
                "prompt": prompt.text,
                "completion": output,
                **{f"{REWARDS}{name}": _number(raw[i]) for name, raw in scores.by_name.items()},
                "reward": _number(scores.combined[i]) if scores.valid[i] else None,
                **({} if advantages is None else {"advantage": _number(advantages[i])}),
            }
            for i, output in enumerate(group.outputs)
        ]


def drop_after(folder: Path, step: int) -> None:
    """Remove the files of later steps: a run that resumes here does them again."""
    kinds: tuple[Kind, ...] = ("step", "eval")
    for number, path in (item for kind in kinds for item in completion_files(folder, kind).items()):
        if number > step:
            path.unlink()


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], image_column: str | None) -> None:
    """Rows as parquet; columns of mixed or nested values hold JSON texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    arrays = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if name == image_column:
            arrays[name] = pa.array(values, pa.list_(picture))
        elif name in NUMBERS or name.startswith(REWARDS):
            arrays[name] = pa.array(values, pa.float64())  # also where none has a number
        else:
            arrays[name] = pa.array(_alike(values))
    table = pa.table(arrays)
    if image_column is not None and image_column in arrays:
        table = table.replace_schema_metadata(_with_pictures(table.schema, image_column))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a kill at this moment must not leave half a file.
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def _with_pictures(schema: Any, column: str) -> Mapping[bytes, bytes]:
    """Metadata in which ``datasets`` finds that a column holds pictures."""
    from datasets import Features, Image, List

    features = Features.from_arrow_schema(schema)
    features[column] = List(Image())
    return features.arrow_schema.metadata


def pictures(value: Any) -> list[dict[str, Any]]:
    """The picture or pictures in a column of a prompt, as ``datasets`` stores them."""
    entries = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [_picture(entry) for entry in entries]


def _picture(entry: Any) -> dict[str, Any]:
    """PNG of a picture, a path, a ``data:`` address, or what ``datasets`` stores."""
    from PIL import Image

    stored = entry if isinstance(entry, Mapping) else {"path": entry}
    path, data = stored.get("path"), stored.get("bytes")
    if isinstance(path, str) and path.startswith("data:"):
        path, data = None, base64.b64decode(path.partition(",")[2])
    is_open = isinstance(path, Image.Image)
    image = path.copy() if is_open else Image.open(io.BytesIO(data) if data else str(path))
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None if is_open else path}


def _spread(scores: Sequence[GroupScores], max_rows: int) -> list[GroupScores]:
    """As many groups as fit, evenly spread, but at least one."""
    for count in range(len(scores), 1, -1):
        chosen = [scores[i * len(scores) // count] for i in range(count)]
        if sum(len(score.combined) for score in chosen) <= max_rows:
            return chosen
    return list(scores[:1])


def _alike(values: Sequence[Any]) -> list[Any]:
    """Texts, truth values or numbers as they are; otherwise each as a JSON text."""
    present = [value for value in values if value is not None]
    if any(all(type(value) is kind for value in present) for kind in (str, bool, float)):
        return list(values)
    if all(type(value) in (int, float) for value in present):
        small = all(type(value) is int and abs(value) < 2**63 for value in present)
        return list(values) if small else [None if v is None else float(v) for v in values]
    return [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values]


def _number(value: Tensor) -> float | None:
    """``None`` where there is none: unlike NaN it counts in no mean of any reader."""
    found = float(value)
    return found if math.isfinite(found) else None
