"""Advantages of several rewards, each normalised alone."""

from __future__ import annotations

import math

import pytest
import torch
from core_oracles import close, float64, random_scores
from pydantic import ValidationError

from mmrl.advantages import group, per_reward
from mmrl.errors import UserError
from mmrl.types import Scores

NAN = math.nan


def scores(rewards: dict[str, list[float]], groups: list[int], valid=None) -> Scores:
    columns = {name: float64(values) for name, values in rewards.items()}
    total = sum(column.nan_to_num() for column in columns.values())
    usable = [True] * len(groups) if valid is None else valid
    return Scores(
        combined=total, group=torch.tensor(groups), valid=torch.tensor(usable), by_name=columns
    )


def values(given: Scores, **config) -> torch.Tensor:
    return per_reward.estimate(given, per_reward.Config(**config), {})[0].values


@pytest.mark.parametrize("deviation", ["group", "global", "none"])
def test_one_reward_is_the_group_estimator(deviation):
    given = random_scores()
    alone = Scores(
        combined=given.combined,
        group=given.group,
        valid=given.valid,
        by_name={"a": given.by_name["a"]},
    )
    expected, _ = group.estimate(given, group.Config(deviation=deviation), {})
    actual, _ = per_reward.estimate(alone, per_reward.Config(deviation=deviation), {})
    close(actual.values, expected.values.tolist())
    assert torch.equal(actual.keep, expected.keep)
    assert actual.metrics == pytest.approx(expected.metrics)


def test_totals_that_the_sum_confuses_stay_apart():
    """Two binary rewards: totals 0, 1 and 0, 2 are the same z-scores; here they are not (GDPO)."""
    given = scores({"x": [0, 1, 0, 1], "y": [0, 0, 0, 1]}, [0, 0, 1, 1])
    sample = {"deviation": "group", "ddof": 1, "eps": 0.0}
    r = math.sqrt(0.5)
    close(values(given, **sample), [-r, r, -2 * r, 2 * r])
    summed, _ = group.estimate(given, group.Config(**sample), {})
    close(summed.values, [-r, r, -r, r])


def test_scale_and_shift_of_one_reward_do_not_matter():
    given = random_scores()
    columns = {"a": given.by_name["a"], "b": 50 * given.by_name["b"] - 3}
    other = Scores(combined=given.combined, group=given.group, valid=given.valid, by_name=columns)
    for deviation in ("group", "global"):
        expected = values(given, deviation=deviation, eps=0.0).tolist()
        close(values(other, deviation=deviation, eps=0.0), expected, 1e-10)


def test_rewards_that_do_not_apply():
    """A sample counts for the rewards it has, in sums and in statistics, and is kept for one."""
    ocr, clip = [1.0, 0.0, NAN, NAN, NAN], [NAN, NAN, 0.2, 0.4, NAN]
    given = scores({"ocr": ocr, "clip": clip}, [0, 0, 1, 1, 1], [False] * 5)
    result, _ = per_reward.estimate(given, per_reward.Config(ddof=0, eps=0.0), {})
    close(result.values, [1, -1, -1, 1, 0])
    assert result.keep.tolist() == [True, True, True, True, False]
    only, _ = per_reward.estimate(given, per_reward.Config(weights={"ocr": 2.0, "clip": 0}), {})
    assert only.keep.tolist() == [True, True, False, False, False]


def test_a_constant_reward_contributes_nothing():
    given = scores({"x": [0.1, 0.1, 0.1], "y": [0, 1, 2]}, [0, 0, 0])
    alone = scores({"y": [0, 1, 2]}, [0, 0, 0])
    assert torch.equal(values(given), values(alone))


def test_weights_are_linear():
    given = random_scores()
    parts = [values(given, weights=w) for w in ({"a": 1, "b": 0}, {"a": 0, "b": 1})]
    both = values(given, weights={"a": 2.5, "b": -0.5})
    close(both, (2.5 * parts[0] - 0.5 * parts[1]).tolist())
    close(values(given), (parts[0] + parts[1]).tolist())


def test_wrong_names_are_refused_before_any_sample():
    config = per_reward.Config(weights={"orc": 1.0, "clip": 1.0})
    with pytest.raises(UserError, match=r"advantage.weights: no reward 'orc'; did you mean 'ocr'"):
        per_reward.reward_weights(config, ["ocr", "clip"])
    with pytest.raises(UserError, match="no weight for reward 'ocr'"):
        per_reward.reward_weights(per_reward.Config(weights={"clip": 1.0}), ["clip", "ocr"])
    with pytest.raises(ValidationError):
        per_reward.Config(weights={"ocr": NAN})
