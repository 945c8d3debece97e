"""What every benchmark writes: tables, spreads, and the machine that the numbers belong to."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from mmrl.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "trl", "xformers",
            "rapidocr", "onnxruntime", "ddddocr")  # fmt: skip
ABSENT = "-"


def script(main: Callable[[], int]) -> NoReturn:
    """Exit with the status of ``main``, or with 1 and the message of its ``UserError``."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, extremes and sample standard deviation (n - 1; NaN for one value) of n numbers."""

    mean: float
    low: float
    high: float
    std: float


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread of the numbers among ``values``; ``None`` if there are none."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    std = statistics.stdev(found) if len(found) > 1 else math.nan
    return Spread(mean=statistics.fmean(found), low=min(found), high=max(found), std=std)


def cell(value: Any, form: str = "") -> str:
    """One number or word of a table; a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ABSENT
    return format(value, form) if not isinstance(value, str) else value


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, first column to the left and the others to the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    for row in rows:
        assert len(row) == len(header), f"{len(row)} cells under {len(header)} titles"
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def machine() -> dict[str, Any]:
    """Processor, accelerator, versions and commit; nothing that names the machine's owner."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def machine_line(about: Mapping[str, Any]) -> str:
    """``machine()`` in one sentence."""
    device = f"{about['accelerator']}, " if about["accelerator"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{device}{about['processor']}, {about['cores']} cores; Python {about['python']}, "
        f"{versions}; commit {about['commit'] or 'unknown'}."
    )


def write_results(folder: Path, name: str, markdown: str, data: Mapping[str, Any]) -> Path:
    """Write ``<date>-<name>.md`` and ``.json``; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.now(timezone.utc).date().isoformat()
    path = folder / f"{today}-{name}.md"
    path.write_text(markdown + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
