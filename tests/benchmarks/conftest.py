"""One thread, as everywhere in the tests, and no accelerate state left for the next one."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _alone():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
