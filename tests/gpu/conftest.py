"""Tests that need CUDA: they add to the others and never replace them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _cuda_alone(monkeypatch):
    """Skip without CUDA; run in the repository; leave no accelerate state for the next test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.chdir(ROOT)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.cuda.empty_cache()


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())
