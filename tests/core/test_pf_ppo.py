"""PF-PPO's filters: which ranks are trained, how often, and how strategies are compared."""

from __future__ import annotations

import math

import pytest
import torch
from core_oracles import float64
from pydantic import ValidationError

from mmrl.selection._reliability import reliability
from mmrl.selection.pf_ppo import Config, select, times
from mmrl.types import Advantages, Moment, Scores

REWARDS = float64([0.3, -1.0, 2.0, 0.7, 0.1])
DRAWS = 4000


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def step_of(rewards, group, valid=None):
    valid = torch.ones(len(group), dtype=torch.bool) if valid is None else valid
    combined = torch.as_tensor(rewards, dtype=torch.float64)
    scores = Scores(combined=combined, group=torch.as_tensor(group), valid=valid)
    values = torch.arange(1.0, len(group) + 1).double().where(valid, 0.0)
    return Advantages(values=values, keep=valid), scores


def run(rewards, group, step=0, seed=0, **options):
    given, scores = step_of(rewards, group)
    moment = Moment(step=step, num_steps=9, seed=seed)
    return select(given, scores, moment, Config(**options))


# (f) 3: two of a prompt, the best among them


@pytest.mark.parametrize(
    ("strategy", "size", "sure"), [("bon", 1, {2}), ("bw", 2, {1, 2}), ("br", 2, {2})]
)
@pytest.mark.parametrize("seed", range(6))
def test_3_the_best_is_always_kept(strategy, size, sure, seed):
    found = times(REWARDS, Config(strategy=strategy), draw(seed))
    kept = set(found.nonzero()[:, 0].tolist())
    assert len(kept) == size
    assert sure <= kept
    assert set(found.tolist()) == {0.0, 1.0}


def test_br_takes_every_other_about_equally_often():
    found = sum(times(REWARDS, Config(), draw(seed)) for seed in range(DRAWS)) / DRAWS
    assert float(found[2]) == 1.0
    # Five deviations of a share of 1/4.
    bound = 5 * math.sqrt(0.25 * 0.75 / DRAWS)
    assert found[[0, 1, 3, 4]].tolist() == pytest.approx([0.25] * 4, abs=bound)


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"strategy": "br"}, [0.125, 0.125, 0.5, 0.125, 0.125]),
        ({"strategy": "bw"}, [0, 0.5, 0.5, 0, 0]),
        ({"strategy": "bon"}, [0, 0, 1, 0, 0]),
        ({"strategy": "pow", "power": 1}, [0.3 / 4.1, 1 / 4.1, 2 / 4.1, 0.7 / 4.1, 0.1 / 4.1]),
        ({"strategy": "pow"}, [x * x / 5.59 for x in (0.3, 1, 2, 0.7, 0.1)]),
    ],
)
def test_draws_follow_the_published_weights(options, shares):
    """Of five samples best 0.4 and each other 0.1, so P = 0.5 and 0.125."""
    config = Config(mode="draw", **options)
    found = [times(REWARDS, config, draw(seed)) for seed in range(DRAWS)]
    assert all(float(counts.sum()) == 5 for counts in found)
    mean = (sum(found) / DRAWS / 5).tolist()
    assert mean == pytest.approx(shares, abs=5 * 0.5 / math.sqrt(5 * DRAWS))


# (f) 1


@pytest.mark.parametrize("strategy", ["bw", "br"])
def test_1_of_two_samples_both_are_kept(strategy):
    given, scores = step_of([1.0, 0.0, 3.0, 3.0], [0, 0, 4, 4])
    out = select(given, scores, Moment(step=0, num_steps=1, seed=0), Config(strategy=strategy))
    assert torch.equal(out.keep, given.keep)
    assert torch.equal(out.values, given.values)
    assert out.counts is None


def test_1_equal_weights_are_the_base_method_in_expectation():
    config = Config(strategy="pow", power=0.0, mode="draw")
    found = sum(times(REWARDS, config, draw(seed)) for seed in range(DRAWS)) / DRAWS
    assert found.tolist() == pytest.approx([1.0] * 5, abs=5 * math.sqrt(0.8 / DRAWS))


# (f) 2


@pytest.mark.parametrize("strategy", ["bon", "bw"])
def test_2_order_plays_no_part(strategy):
    order = torch.tensor([3, 1, 4, 0, 2])
    config = Config(strategy=strategy)
    expected = times(REWARDS, config, draw())
    assert torch.equal(times(REWARDS[order], config, draw()), expected[order])


@pytest.mark.parametrize("mode", ["keep", "draw"])
@pytest.mark.parametrize("strategy", ["bon", "bw", "br"])
def test_2_ranks_alone_matter(strategy, mode):
    config = Config(strategy=strategy, mode=mode)
    for seed in range(5):
        expected = times(REWARDS, config, draw(seed))
        for map_ in (torch.exp, lambda r: 3 * r - 7, torch.atan):
            assert torch.equal(times(map_(REWARDS), config, draw(seed)), expected)
    power = Config(strategy="pow", mode="draw")
    changed = [times(REWARDS.exp(), power, draw(s)) for s in range(5)]
    assert any(not torch.equal(x, times(REWARDS, power, draw(s))) for s, x in enumerate(changed))


def test_equal_rewards_are_ranked_at_random():
    best = [
        int(times(torch.zeros(4).double(), Config(strategy="bon"), draw(s)).argmax())
        for s in range(60)
    ]
    assert set(best) == {0, 1, 2, 3}


def test_groups_may_differ_in_size_and_are_drawn_apart():
    rewards, group = [0.0, 5.0, 1.0, 2.0, 9.0, 4.0], [7, 2, 7, 7, 2, 9]
    out = run(rewards, group, strategy="bw")
    assert out.keep.tolist() == [True, True, False, True, True, True]
    assert out.values.tolist() == [1, 2, 0, 4, 5, 6]
    drawn = run(rewards, group, strategy="br", mode="draw")
    assert [float(drawn.counts[torch.tensor(group) == g].sum()) for g in (7, 2, 9)] == [3, 2, 1]
    assert torch.equal(drawn.keep, drawn.counts > 0)


def test_the_seed_and_the_step_choose():
    rewards, group = torch.arange(40.0), [i // 8 for i in range(40)]
    first, again = (run(rewards, group).keep for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, run(rewards, group, step=1).keep)
    assert not torch.equal(first, run(rewards, group, seed=1).keep)


def test_samples_without_a_reward_have_no_rank():
    valid = torch.tensor([True, False, True, True])
    given, scores = step_of([1.0, 0.0, 2.0, 3.0], [0, 0, 0, 0], valid)
    out = select(given, scores, Moment(step=0, num_steps=1, seed=0), Config(strategy="bw"))
    assert out.keep.tolist() == [True, False, False, True]


def test_counts_of_two_draws_are_multiplied():
    given, scores = step_of([1.0, 0.0, 2.0], [0, 0, 0])
    moment = Moment(step=0, num_steps=1, seed=0)
    config = Config(strategy="bw", mode="draw")
    once = select(given, scores, moment, config)
    twice = select(once, scores, moment, Config(strategy="bw"))
    assert torch.equal(twice.counts[twice.keep], once.counts[twice.keep])


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="allowed: draw"):
        Config(strategy="pow")
    with pytest.raises(ValidationError, match="power"):
        Config(strategy="pow", mode="draw", power=-1)
    with pytest.raises(ValidationError, match="strategy"):
        Config(strategy="best")


# (f) 3: how strategies are compared


def test_3_a_linear_reward_is_perfectly_reliable_and_none_is_more():
    rewards = torch.randn(100, generator=draw(), dtype=torch.float64)
    assert reliability(rewards, 3 * rewards + 1) == pytest.approx(1.0, abs=1e-12)
    noisy = rewards + torch.randn(100, generator=draw(1), dtype=torch.float64)
    curved = rewards.clamp(-0.5, 0.5)
    for truths in (noisy, curved, rewards.square()):
        assert reliability(rewards, truths) < 1
    # One sample in a bin: the ordinary R^2, by numpy's correlation.
    expected = float(torch.corrcoef(torch.stack([rewards, noisy]))[0, 1]) ** 2
    assert reliability(rewards, noisy, bins=100) == pytest.approx(expected, abs=1e-12)
