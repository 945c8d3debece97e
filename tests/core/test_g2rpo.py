"""Gaussian transport of rewards: the checks of its specification, by number."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from core_oracles import close, float64, random_scores
from pydantic import ValidationError
from text_oracles import quantile, tasked_scores, transported

from mmrl.advantages import g2rpo
from mmrl.types import Scores


def scores(*groups: list[float], task=(), by_name=None) -> Scores:
    sizes = torch.tensor([len(group) for group in groups])
    rewards = float64([reward for group in groups for reward in group])
    return Scores(
        combined=rewards,
        group=torch.repeat_interleave(torch.arange(len(groups)), sizes),
        valid=torch.ones(len(rewards), dtype=torch.bool),
        by_name={} if by_name is None else by_name,
        task=task,
    )


def values(*groups: list[float], task=(), **config) -> torch.Tensor:
    return g2rpo.estimate(scores(*groups, task=task), g2rpo.Config(**config), {})[0].values


def different(size: int, seed: int = 0) -> list[float]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=draw).double().exp().log1p().tolist()


VARIANCES = {2: 0.455, 4: 0.712, 5: 0.767, 8: 0.851, 16: 0.924, 24: 0.949, 32: 0.961, 64: 0.980}


@pytest.mark.parametrize(("size", "variance"), VARIANCES.items())
def test_1_different_rewards_get_all_quantiles(size, variance):
    found = values(different(size))
    expected = [quantile((i + 0.5) / size) for i in range(size)]
    close(found.sort().values, expected)
    assert abs(found.mean()) < 1e-12
    assert found.var(correction=0).item() == pytest.approx(variance, abs=6e-4)


def test_1_the_variance_goes_to_one():
    assert values(different(700)).var(correction=0).item() == pytest.approx(1, abs=3e-3)


def test_2_only_the_order_counts():
    rewards = [0.3, 0.1, 0.1, 0.9, 0.5, 0.3]
    expected = values(rewards).tolist()
    for monotone in (math.exp, lambda r: 5 * r - 7, lambda r: r**3):
        close(values([monotone(r) for r in rewards]), expected)
    close(values([-r for r in rewards]), [-value for value in expected])


def test_3_ties_share_one_value_and_the_mean_stays_zero():
    found = values([0.2, 0.7, 0.2, 0.7, 0.7, -1.0])
    assert len(set(found.tolist())) == 3
    assert found[0] == found[2]
    assert found[1] == found[3] == found[4]
    assert abs(found.mean()) < 1e-12


@pytest.mark.parametrize("group", [[0.7], [0.1] * 3, [0.0, -0.0], [1e300] * 2])
@pytest.mark.parametrize("second_stage", [False, True])
def test_3_equal_rewards_are_exactly_zero(group, second_stage):
    assert values(group, second_stage=second_stage).tolist() == [0.0] * len(group)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 0, 0, 1], [-0.32, -0.32, -0.32, -0.32, 1.28]),
        ([0.1, 0.1, 0.1, 0.2, 1], [-0.60, -0.60, -0.60, 0.52, 1.28]),
        ([0, 0, 1, 1, 1], [-0.90, -0.90, 0.60, 0.60, 0.60]),
        ([0.81, 0.81, 0.82, 0.82, 0.83], [-0.90, -0.90, 0.26, 0.26, 1.28]),
    ],
)
def test_4_published_examples_in_any_order(rewards, expected):
    torch.testing.assert_close(values(rewards), float64(expected), rtol=0, atol=6e-3)
    for order in itertools.permutations(range(5)):
        found = values([rewards[i] for i in order])
        assert torch.equal(found, values(rewards)[list(order)])


@pytest.mark.parametrize("outlier", [1e12, 1e306, -1e306])
def test_5_no_outlier_exceeds_the_last_quantile(outlier):
    for size, highest in ((8, 1.534), (24, 2.037)):
        found = values([*different(size - 1), outlier])
        assert found.abs().max().item() == pytest.approx(quantile(1 - 1 / (2 * size)))
        assert found.abs().max().item() == pytest.approx(highest, abs=6e-4)


def test_6_no_other_pairing_is_nearer():
    rewards = float64([0.4, -1.2, 3.0, 0.1, 0.9, -0.3])
    quantiles = float64([quantile((i + 0.5) / 6) for i in range(6)])
    nearest = min(
        (rewards - quantiles[list(order)]).square().sum().item()
        for order in itertools.permutations(range(6))
    )
    found = values(rewards.tolist())
    assert (rewards - found).square().sum().item() == pytest.approx(nearest, abs=1e-12)


FAILS = [0.0] * 8
MIXED = [1.0] + [0.0] * 7


def test_10_a_flat_group_is_exactly_zero_after_the_second_stage():
    """As published, every sample of the group that failed altogether got +0.80."""
    found = values(MIXED, MIXED, MIXED, FAILS, second_stage=True)
    assert found[24:].tolist() == [0.0] * 8
    close(found[:24], transported(MIXED * 3))
    assert values(MIXED, [1.0] * 8, second_stage=True)[8:].tolist() == [0.0] * 8
    # What would happen if the zeros were ranked with the rest.
    first = values(MIXED, MIXED, MIXED, FAILS)
    trap = transported([round(value, 9) for value in first.tolist()])
    assert trap[24] == pytest.approx(0.80, abs=6e-3)


def test_10_with_one_stage_every_group_sums_to_zero():
    found = values(MIXED, [0.3, 0.1, 0.1], different(7), FAILS)
    groups = scores(MIXED, [0.3, 0.1, 0.1], different(7), FAILS).group
    close(torch.zeros(4).double().index_add(0, groups, found), [0.0] * 4)


def test_the_second_stage_sees_each_task_alone():
    one, other = [MIXED, [0.2, 0.1, 0.4]], [[5.0, 5.0, 7.0], different(4)]
    both = values(*one, *other, task=["a"] * 11 + ["b"] * 7, second_stage=True)
    close(both[:11], values(*one, second_stage=True).tolist())
    close(both[11:], values(*other, second_stage=True).tolist())
    pooled = values(*one, *other, second_stage=True)
    assert not torch.allclose(both, pooled)


def test_equal_patterns_of_groups_stay_equal_in_the_second_stage():
    """Three groups alike: a last bit of difference would split their ties."""
    found = values(MIXED, [0.3] * 7 + [0.9], [-1.0] * 3 + [4.0] + [-1.0] * 4, second_stage=True)
    assert len(set(found.tolist())) == 2


def test_rounding_joins_what_differs_in_the_last_bit():
    noisy = [0.1 + 0.9 * 0.3, 0.1 + 0.9 * 0.3 + 1e-16, 0.37 + 1e-9, 1.0]
    assert len(set(values(noisy).tolist())) == 2
    assert len(set(values(noisy, round_to=0).tolist())) > 2
    close(values([0.11, 0.14, 0.52], round_to=0.1), transported([1, 1, 5]))


def test_a_group_within_the_least_spread_is_flat():
    noise, signal = [0.20, 0.21, 0.23], [0.20, 0.25, 0.26]
    found = values(noise, signal, min_spread=0.05)
    assert found[:3].tolist() == [0, 0, 0]
    close(found[3:], transported(signal))
    # 0.4 - 0.3 is above 0.1 in binary.
    assert not values([0.3, 0.4], min_spread=0.1).any()


def test_rewards_by_themselves_are_ranked_and_added():
    a, b = [0.0, 1.0, 2.0, math.nan], [3.0, math.nan, 1.0, 2.0]
    given = scores([0.0] * 4, by_name={"a": float64(a), "b": float64(b)})
    found, _ = g2rpo.estimate(given, g2rpo.Config(per_reward=True), {})
    high = quantile(5 / 6)
    close(found.values, [0.0, 0.0, 0.0, 0.0])  # -high + high, 0, high - high, 0
    weighted = g2rpo.Config(per_reward=True, weights={"a": 2.0, "b": 1.0})
    close(g2rpo.estimate(given, weighted, {})[0].values, [-high, 0.0, high, 0.0])


def test_rewards_that_cancel_leave_a_flat_group():
    both = {"a": float64([0, 1, 0, 1, 0, 1]), "b": float64([1, 0, 0, 1, 1, 1])}
    given = scores([1.0, 1.0], [0.0, 2.0, 1.0, 2.0], by_name=both)
    config = g2rpo.Config(per_reward=True, second_stage=True)
    found = g2rpo.estimate(given, config, {})[0].values
    assert found[:2].tolist() == [0.0, 0.0]
    assert found[2:].abs().min() > 0.1


@pytest.mark.parametrize("config", [{}, {"second_stage": True}, {"per_reward": True}])
def test_invalid_samples_influence_nothing(config):
    given = tasked_scores()
    result, _ = g2rpo.estimate(given, g2rpo.Config(**config), {})
    kept = given.valid
    without = Scores(
        combined=given.combined[kept],
        group=given.group[kept],
        valid=given.valid[kept],
        by_name={name: column[kept] for name, column in given.by_name.items()},
        task=[task for task, valid in zip(given.task, kept.tolist(), strict=True) if valid],
    )
    close(
        g2rpo.estimate(without, g2rpo.Config(**config), {})[0].values, result.values[kept].tolist()
    )
    assert result.values[~kept].tolist() == [0, 0]
    assert torch.equal(result.keep, kept)


def test_tasks_are_one_for_each_sample():
    given = random_scores()
    with pytest.raises(ValueError, match="2 tasks for 13 samples"):
        Scores(combined=given.combined, group=given.group, valid=given.valid, task=["a", "b"])


@pytest.mark.parametrize("wrong", [{"round_to": -1}, {"min_spread": -0.1}, {"second_stage": 1.5}])
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        g2rpo.Config(**wrong)
