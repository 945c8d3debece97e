"""Folders with tiny language models, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_text import ARCHITECTURES, save_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: save_model(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}
