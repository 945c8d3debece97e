"""A tiny run on the toy backend, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from toy.run import toy_config

from mmrl.config import apply_overrides, parse
from mmrl.runner import train


@pytest.fixture(autouse=True)
def _alone():
    """One thread, and no accelerate state left for the next test."""
    torch.set_num_threads(1)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module", autouse=True)
def _reports_without_charts():
    """Drawing them takes longer than a tiny run; ``tests/cli`` and runs of a shell have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmrl.charts.line_chart", lambda *_, **__: "")
        yield


@pytest.fixture
def toy(tmp_path):
    """Train the toy: ``toy("a.b=value", ..., resume=False, folder=...)`` -> run folder."""

    def run(*overrides: str, resume: bool = False, folder: Path = tmp_path) -> Path:
        return train(parse(apply_overrides(toy_config(folder), overrides)), resume=resume)

    return run
