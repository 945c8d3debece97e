"""Folders with tiny vision-language models and pictures, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_vlm import FAMILIES, save_films, save_model, save_pictures


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: save_model(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    return save_films(tmp_path_factory.mktemp("films"))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
