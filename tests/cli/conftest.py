"""Run folders to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    return write_run(tmp_path / "signs")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Builds further runs: ``make_run(name, config=..., metrics=...)``."""
    return lambda name, **content: write_run(tmp_path / name, **content)
