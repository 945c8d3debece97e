"""The reward map of DiffusionNFT: published values and bounds."""

from __future__ import annotations

import pytest
import torch
from core_oracles import float64, no_scores, some_advantages
from pydantic import ValidationError

from mmrl.modulators import optimality
from mmrl.types import Advantages

GIVEN = (-10.0, -5.0, 0.0, 5.0, 10.0, 1.0)


def mapped(**config) -> list[float]:
    given = Advantages(values=float64(GIVEN), keep=torch.ones(6, dtype=torch.bool))
    return optimality.modulate(given, no_scores(), optimality.Config(**config)).values.tolist()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0, 0, 0.5, 1, 1, 0.6]),
        ("positive_only", [0.5, 0.5, 0.5, 1, 1, 0.6]),
        ("negative_only", [0, 0, 0.5, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6, 0.6]),
    ],
)
def test_values_of_the_released_code(mode, expected):
    assert mapped(mode=mode) == pytest.approx(expected, abs=1e-15)


def test_the_default_is_all_within_5():
    assert mapped() == mapped(mode="all", bound=5.0)


def test_small_bounds_stay_probabilities():
    """1 / bound / 2 + 1/2 would be 1.5: clamped."""
    assert mapped(mode="binary", bound=0.5) == [0, 0, 0.5, 1, 1, 1]


def test_what_is_not_kept_stays_zero():
    given = some_advantages()
    out = optimality.modulate(given, no_scores(), optimality.Config())
    assert out.values.tolist() == [0, 0, 0.5, 0.7, 0, 1]
    assert out.keep.tolist() == given.keep.tolist()
    nothing = Advantages(values=torch.zeros(6).double(), keep=torch.zeros(6, dtype=torch.bool))
    empty = optimality.modulate(nothing, no_scores(), optimality.Config())
    assert empty.metrics == {"advantage/clip_ratio": 0.0, "optimality/mean": 0.0}


@pytest.mark.parametrize("wrong", [{"bound": 0}, {"mode": "sign"}, {"mode": True}])
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        optimality.Config(**wrong)
