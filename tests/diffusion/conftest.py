"""Fixtures: a tiny pipeline on disk, and backends built on it."""

from __future__ import annotations

import pytest
import torch
from tiny_sd3 import ALL_TERMS, PROMPTS, make_config, save_pipeline

from diffusion.backend import build


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-sd3")
    save_pipeline(folder)
    return folder


@pytest.fixture
def make(pipeline_folder):
    """Build a backend: ``make(needs=..., rollout={...}, likelihood={...}, **model keys)``."""

    def make(needs=ALL_TERMS, rollout=None, likelihood=None, evaluation=None, seed=0, **model):
        return build(
            make_config(pipeline_folder, rollout, likelihood, evaluation, **model),
            device=torch.device("cpu"),
            prompts=PROMPTS,
            seed=seed,
            needs=frozenset(needs),
        )

    return make
