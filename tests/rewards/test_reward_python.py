"""Rewards that are any Python callable."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from mmrl.errors import UserError
from rewards import python

pytestmark = pytest.mark.usefixtures("users_module")


@pytest.fixture
def users_module(monkeypatch):
    """A user's module, importable as ``users_rewards``."""
    module = ModuleType("users_rewards")

    def length(prompts, outputs, *, factor=1.0, **columns):
        return [factor * len(output) for output in outputs]

    def seen(prompts, outputs, **columns):
        return [prompts, outputs, columns]

    module.__dict__.update(length=length, seen=seen, number=3)
    monkeypatch.setitem(sys.modules, "users_rewards", module)


def test_calls_with_kwargs():
    config = python.Config(function="users_rewards.length", kwargs={"factor": 2.0})
    assert python.build(config)(["p", "q"], ["a", "abc"], column=[1, 2]) == [2.0, 6.0]


def test_kwargs_take_the_place_of_columns():
    config = python.Config(function="users_rewards:seen", kwargs={"b": 0})
    assert python.build(config)(["p"], ["o"], a=[1], b=[2]) == [["p"], ["o"], {"a": [1], "b": 0}]


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        ("users_rewards.lenght", {}, "no attribute 'lenght'"),
        ("no_such_package.f", {}, "cannot import 'no_such_package'"),
        ("users_rewards.number", {}, "not a callable"),
        ("users_rewards.seen", {"prompts": 1}, "multiple values"),
        ("operator.not_", {}, "cannot be called"),
    ],
)
def test_mistakes(function, kwargs, message):
    with pytest.raises(UserError, match=message):
        python.build(python.Config(function=function, kwargs=kwargs))


def test_builtin_that_hides_its_signature():
    assert python.build(python.Config(function="builtins.max"))([1], [2]) == [2]
