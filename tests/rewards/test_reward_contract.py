"""What every shipped reward owes: a documented Config, PAPER, a summary, and a build that works."""

from __future__ import annotations

import importlib.util
import re

import pytest

from mmrl.resolve import entries, names, resolve
from mmrl.schema import StrictModel
from rewards.combine import COMMON_KEYS

REWARDS = names("rewards")
# A callable has no default.
BUILDABLE = [name for name in REWARDS if name != "python"]
EXTRAS = {"math_verify", "reasoning_gym"}
"""Rewards named like the optional package that they need."""


def build(name):
    """The reward with its defaults; the test is skipped without the package it needs."""
    if name in EXTRAS and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    module = resolve("rewards", name)
    return module.build(module.Config())


def test_shipped_rewards():
    assert REWARDS == [
        "box_iou",
        "clip_score",
        "code_tests",
        "composition",
        "edit_distance",
        "exact_match",
        "format_tags",
        "jpeg_compressibility",
        "jpeg_incompressibility",
        "length",
        "math_verify",
        "ocr",
        "preference",
        "python",
        "reasoning_gym",
        "soft_overlong",
    ]


@pytest.mark.parametrize("name", REWARDS)
def test_config_and_paper(name):
    module = resolve("rewards", name)
    assert issubclass(module.Config, StrictModel)
    assert module.PAPER == "" or re.fullmatch(r".+ \d{4}, arXiv:\d{4}\.\d{5}", module.PAPER)
    for key, field in module.Config.model_fields.items():
        assert field.description, f"{name}.{key} is not documented"
        assert key not in COMMON_KEYS
    assert re.search(r"Range.*[Hh]igher is", module.__doc__, re.DOTALL), "range and direction"


@pytest.mark.parametrize("entry", entries("rewards"), ids=lambda entry: entry.name)
def test_summary(entry):
    assert 10 < len(entry.summary) <= 100
    assert entry.summary.endswith((".", "?"))


@pytest.mark.parametrize("name", BUILDABLE)
def test_builds_with_defaults(name):
    assert callable(build(name))


@pytest.mark.parametrize("name", [n for n in BUILDABLE if n != "clip_score"])
def test_empty_batch(name):
    assert build(name)([], []).shape == (0,)
