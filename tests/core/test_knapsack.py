"""Budgets: what samples are worth, that they are spent where they are worth most, what is kept."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch
from pydantic import ValidationError

from mmrl.config import Part
from mmrl.errors import UserError
from mmrl.prompts.budgets.knapsack import (
    Config,
    _useful,
    allocate,
    bounds,
    knapsack,
    learn,
    metrics,
    value,
)
from mmrl.rollouts import allocate as allocate_for
from mmrl.rollouts import idle_work, make_requests
from mmrl.types import Outcome, Prompt

SMALL = Config(max_size=10)


def outcome(prompt_id, rewards, **by_name):
    values = torch.tensor(rewards, dtype=torch.float64)
    named = {name: torch.tensor(value, dtype=torch.float64) for name, value in by_name.items()}
    return Outcome(
        prompt_id=prompt_id, combined=values.nan_to_num(), valid=values.isfinite(), by_name=named
    )


# 3 (f) 2 and 3: what n samples are worth


@pytest.mark.parametrize("rate", [0.01, 0.1, 1 / 3, 0.5, 0.9])
def test_the_value_is_the_probability_of_both_outcomes_times_the_gain(rate):
    for size in range(1, 9):
        both = sum(
            math.prod(rate if x else 1 - rate for x in draws)
            for draws in itertools.product((0, 1), repeat=size)
            if 0 < sum(draws) < size
        )
        assert value(size, rate) == pytest.approx(both * rate * (1 - rate) ** 2, abs=1e-14)
    assert value(1, rate) == pytest.approx(0, abs=1e-15)
    values = [value(size, rate) for size in range(1, 40)]
    gains = [b - a for a, b in itertools.pairwise(values)]
    assert all(gain > -1e-15 for gain in gains)
    assert all(later <= sooner + 1e-15 for sooner, later in itertools.pairwise(gains))


def test_certain_prompts_are_worth_nothing_and_the_gain_peaks_at_a_third():
    assert value(50, 0.0) == value(50, 1.0) == 0
    grid = [i / 300 for i in range(301)]
    assert max(grid, key=lambda p: p * (1 - p) ** 2) == pytest.approx(1 / 3, abs=1e-9)


@pytest.mark.parametrize(("rate", "samples"), [(0.5, 3), (0.1, 21), (0.9, 21), (0.01, 229)])
def test_samples_for_nine_signals_in_ten(rate, samples):
    for largest in (10, 128, 500):
        assert _useful(rate, Config(max_size=largest)) == min(largest, samples)
    for size, probability in ((8, 0.077), (93, 0.607)):
        shown = value(size, 0.01) / (0.01 * 0.99**2)
        assert shown == pytest.approx(probability, abs=5e-4)


# 3 (f) 1: the knapsack


def best_total(rates, start, left, largest):
    """Largest sum of values by trying every way to hand out ``left``; staying put is valued 0."""
    ways = itertools.product(*(range(largest - size + 1) for size in start))
    return max(
        sum(value(s + k, p) if k else 0.0 for s, k, p in zip(start, way, rates, strict=True))
        for way in ways
        if sum(way) == left
    )


@pytest.mark.parametrize("seed", range(12))
def test_greedy_is_as_good_as_trying_everything(seed):
    draw = random.Random(seed)
    config = Config(max_size=draw.choice((6, 9)), confidence=1 - 1e-12)
    rates = [draw.choice((0.03, 0.125, 0.3, 0.5, 0.8, 0.97)) for _ in range(4)]
    mean = draw.choice((3, 4, 5))
    sizes = knapsack(rates, mean, config)
    found = sum(value(n, p) for n, p in zip(sizes, rates, strict=True) if n > 2)
    expected = best_total(rates, [2] * 4, mean * 4 - 8, config.max_size)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_all_is_spent_and_the_bounds_hold(seed):
    draw = random.Random(seed)
    config = Config(min_size_certain=draw.choice((1, 2, 3)), max_size=draw.choice((8, 11, 128)))
    rates = [draw.choice((None, 0.0, 1.0, 0.5, 0.1, 0.96)) for _ in range(draw.randint(1, 9))]
    for mean in (3, 8):
        sizes = knapsack(rates, mean, config)
        assert sum(sizes) == mean * len(rates)
        least, most = bounds(config, mean)
        assert all(least <= size <= most for size in sizes)


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("mean", [8, 61])
def test_equal_prompts_get_equal_shares(rate, mean):
    """Also far out, where more samples add less than the last bit of V."""
    sizes = knapsack([rate] * 5 + [None], mean, Config())
    assert max(sizes[:5]) - min(sizes[:5]) <= 1


def test_without_a_known_prompt_all_are_alike():
    assert knapsack([None] * 4, 8, Config()) == [8] * 4
    assert knapsack([None, 1.0, None], 8, Config()) == [8] * 3, "nothing to be won anywhere"


def test_hard_prompts_get_what_easy_ones_do_not_need():
    sizes = knapsack([0.1, 1.0, 0.9, 0.0], 8, Config())
    assert sizes[1] == 2
    assert sizes[0] > sizes[2] > 2
    # By hand: both prompts can use floor(ln 0.1 / ln 0.9) = 21, so nothing is left to the failing.
    assert sizes[3] == 2
    assert sum(sizes) == 32


def test_what_is_of_no_use_tries_prompts_that_fail():
    """p = 1/2 can use floor(3.3) = 3 more of the 18; the other 15 are the failing ones'."""
    assert knapsack([0.5, 0.0, 0.0, 1.0], 8, Config(min_size_certain=3, max_size=20)) == [
        5, 12, 12, 3,
    ]  # fmt: skip
    # Without one that fails, those that always succeed or are unknown take the rest.
    assert knapsack([0.5, 1.0, 1.0, 1.0], 8, Config()) == [5, 9, 9, 9]
    # Nobody sometimes succeeds: the failing have all.
    assert knapsack([0.0, 1.0, 1.0], 8, Config()) == [20, 2, 2]
    assert knapsack([0.0, 1.0, 1.0], 8, SMALL) == [10, 7, 7], "as far as they may"


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_order_of_prompts_plays_no_part(order):
    rates = [0.1, 0.6, 0.0, None]
    expected = knapsack(rates, 7, SMALL)
    assert knapsack([rates[i] for i in order], 7, SMALL) == [expected[i] for i in order]


# What is kept


def test_a_rate_is_of_the_latest_step_or_of_the_window():
    config = Config(window=4, min_count=3)
    state = learn([outcome("p", [1.0, 0.0])], config, {})
    assert state == {"rewards": {"p": "10"}, "counts": {"p": 2}}
    prompts = [Prompt(id="p", text=""), Prompt(id="q", text="")]
    assert allocate(prompts, 5, config, state) == [5, 5], "not yet known"
    state = learn([outcome("p", [0.0, math.nan, 0.0, 0.0])], config, state)
    assert state == {"rewards": {"p": "0000"}, "counts": {"p": 5}}
    state = learn([outcome("p", [1.0, 0.0]), outcome("p", [1.0, 0.0, 1.0, 0.0])], config, state)
    assert state["rewards"]["p"] == "101010", "two groups of a step count together"
    assert json.loads(json.dumps(state)) == state
    assert metrics(state) == {"budget/uncertain": 1.0}
    assert metrics({}) == {}
    assert allocate(prompts, 5, config, state) == knapsack([0.5, None], 5, config)


def test_success_is_a_reward_above_a_threshold_of_the_named_one():
    found = outcome("p", [5.0, 5.0, 5.0], right=[-1.0, 0.3, 1.0])
    assert learn([found], Config(), {})["rewards"]["p"] == "111"
    named = Config(reward="right", success_above=0.2)
    assert learn([found], named, {})["rewards"]["p"] == "011"
    with pytest.raises(UserError, match=r"prompts\.budget\.reward.*'rihgt'.*'right'"):
        learn([found], Config(reward="rihgt"), {})


def test_nothing_usable_changes_nothing():
    state = learn([outcome("p", [1.0])], Config(), {})
    assert learn([outcome("p", [math.nan])], Config(), state) == state


def test_parameters_outside_their_range_are_named():
    for wrong in ({"min_size": 0}, {"confidence": 1.0}, {"window": 0}, {"max_size": 0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            Config(**wrong)
    with pytest.raises(ValidationError, match="max_size 4 is less than min_size 5"):
        Config(min_size=5, max_size=4)
    for mean in (1, 129):
        with pytest.raises(UserError, match=rf"training\.group_size: {mean} .* 2 .* to 128"):
            bounds(Config(), mean)


# Groups of unlike sizes


def test_requests_of_unlike_sizes_share_no_noise():
    prompts = [Prompt(id=name, text=name) for name in "aba"]
    requests = make_requests(prompts, [3, 1, 2], 0, 0)
    assert [r.group_size for r in requests] == [3, 1, 2]
    assert [r.first_sample for r in requests] == [0, 0, 3]
    assert [r.first_sample for r in make_requests(prompts, 4, 0, 0)] == [0, 0, 4]


def test_the_largest_groups_are_dealt_first():
    prompts = [Prompt(id=name, text=name) for name in "abcd"]
    state = {"rewards": {"b": "0" * 15 + "1", "d": "01" * 8}, "counts": {"b": 16, "d": 16}}
    budget = Part("budgets", "knapsack", Config())
    chosen, sizes = allocate_for(budget, prompts, 8, state)
    assert [prompt.id for prompt in chosen] == ["b", "a", "c", "d"]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == 32
    assert allocate_for(None, prompts, 8, state) == (prompts, [8] * 4)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_that_share_weights_draw_equally_many(world):
    prompts = [Prompt(id=f"{i}", text="") for i in range(4)]
    requests = make_requests(prompts, [7, 3, 1, 1], 0, 0)
    totals = []
    for rank in range(world):
        mine = requests[rank::world] or [requests[rank % 4]]
        mine += [mine[0]] * (-(-4 // world) - len(mine))
        idle = idle_work(requests, rank, world)
        totals.append(sum(r.group_size for r in [*mine, *idle]))
    assert len(set(totals)) == 1
