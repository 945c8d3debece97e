"""Tests that need CUDA: they add to the others and never replace them."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(autouse=True)
def _cuda_alone():
    """Skip without CUDA; leave no accelerate state for the next test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.cuda.empty_cache()


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())
