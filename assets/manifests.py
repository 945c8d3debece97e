"""What a build script writes beside its model: how it was made, and checksums."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.time(), time.process_time()

    def spent(self) -> dict[str, int]:
        """Wall-clock and CPU seconds."""
        wall, cpu = time.time() - self._wall, time.process_time() - self._cpu
        return {"wall_seconds": round(wall), "cpu_seconds": round(cpu)}

    def log(self, message: str) -> None:
        """Print one progress line."""
        print(f"[{time.time() - self._wall:7.1f}s] {message}", flush=True)


def write_manifest(folder: Path, facts: Mapping[str, Any], packages: Sequence[str]) -> None:
    """The facts, versions of the packages, and SHA-256 and size of every other file."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            data = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    versions = {name: importlib.metadata.version(name) for name in packages}
    text = json.dumps({**facts, "libraries": versions, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
