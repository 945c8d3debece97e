"""Verifiers of reasoning-gym."""

from __future__ import annotations

import math
import sys

import pytest

from mmrl.errors import UserError
from mmrl.resolve import optional
from rewards import reasoning_gym


@pytest.fixture(scope="module")
def gym():
    try:
        return optional("reasoning_gym", "mmrl[gym]", "test")
    except UserError:
        pytest.skip("reasoning-gym is not installed")


def columns(entry, **changes):
    row = {
        "answer": entry["answer"],
        "metadata": entry["metadata"],
        "source_dataset": entry["metadata"]["source_dataset"],
    }
    return {name: [value] for name, value in {**row, **changes}.items()}


@pytest.mark.parametrize("task", ["leg_counting", "basic_arithmetic", "countdown", "sokoban"])
def test_right_and_wrong_answers(gym, task):
    entry = gym.create_dataset(task, size=1, seed=3)[0]
    reward = reasoning_gym.build(reasoning_gym.Config(where="tag"))
    right, wrong = f"<answer>{entry['answer']}</answer>", "<answer>?</answer>"
    assert reward([entry["question"]], [right], **columns(entry)).item() == 1
    assert reward([entry["question"]], [wrong], **columns(entry)).item() < 0.2
    assert reward([entry["question"]], ["nothing"], **columns(entry)).item() < 0.2


@pytest.mark.parametrize("name", reasoning_gym.COLUMNS)
def test_a_missing_column_is_no_zero(gym, name):
    entry = gym.create_dataset("leg_counting", size=1, seed=3)[0]
    reward = reasoning_gym.build(reasoning_gym.Config())
    assert math.isnan(reward(["p"], ["4"], **columns(entry, **{name: None})).item())
    left = {key: value for key, value in columns(entry).items() if key != name}
    assert math.isnan(reward(["p"], ["4"], **left).item())


def test_an_unknown_task(gym):
    entry = gym.create_dataset("leg_counting", size=1, seed=3)[0]
    reward = reasoning_gym.build(reasoning_gym.Config())
    with pytest.raises(UserError, match="'leg_countin'; did you mean 'leg_counting'"):
        reward(["p"], ["4"], **columns(entry, source_dataset="leg_countin"))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"'reasoning_gym' needs.*pip install 'mmrl\[gym\]'"):
        reasoning_gym.build(reasoning_gym.Config())
