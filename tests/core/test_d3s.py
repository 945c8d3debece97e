"""D3S: the subset with the largest variance, the largest keys of all, and the schedule."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from core_oracles import float64
from pydantic import ValidationError

from mmrl.selection._widest import widest
from mmrl.selection.d3s import Config, decision_keys, decision_share, needs, select
from mmrl.types import Advantages, Moment, PolicyTerms, Scores

START = Moment(step=0, num_steps=10, seed=0)


def scores_of(group):
    size = len(group)
    return Scores(
        combined=torch.zeros(size).double(),
        group=torch.tensor(group),
        valid=torch.ones(size, dtype=torch.bool),
    )


def advantages_of(values, keep=None):
    values = float64(values)
    keep = torch.ones(len(values), dtype=torch.bool) if keep is None else torch.tensor(keep)
    return Advantages(values=values.where(keep, 0.0), keep=keep)


def chosen(values, group=None, moment=START, keep=None, **options):
    given = advantages_of(values, keep)
    out = select(given, scores_of(group or [0] * len(values)), moment, Config(**options))
    assert torch.equal(out.values, given.values.where(out.keep, 0.0))
    return out.keep


# (f) 1


def test_1_full_shares_are_the_base_algorithm():
    given = advantages_of([0.3, 0.0, -0.3], [True, True, False])
    config = Config(samples_start=1, decisions_start=1)
    out = select(given, scores_of([0, 0, 1]), START, config)
    assert torch.equal(out.keep, given.keep)
    assert torch.equal(out.values, given.values)
    assert decision_share(START, config) == 1.0
    assert needs(config) == frozenset()
    assert chosen([0.0, 0.0], samples_start=1, decisions_start=1).all(), "even without a signal"


# (f) 2


@pytest.mark.parametrize("seed", range(8))
def test_2_the_solver_is_as_good_as_trying_everything(seed):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(3 + seed, dtype=torch.float64, generator=draw)
    if seed % 2:
        values = values.round()  # with ties
    for count in range(1, len(values) + 1):
        best = max(
            statistics.pvariance(subset)
            for subset in itertools.combinations(values.tolist(), count)
        )
        found = widest(values, count)
        assert int(found.sum()) == count
        assert statistics.pvariance(values[found].tolist()) == pytest.approx(best, abs=1e-12)


def test_by_hand_and_a_large_common_offset_changes_nothing():
    values = float64([1, 0, -3, 0.5, 2])
    assert widest(values, 2).tolist() == [False, False, True, False, True]
    assert torch.equal(widest(values + 1e6, 3), widest(values, 3))


# (f) 3


@pytest.mark.parametrize("seed", range(5))
def test_3_a_standardised_step_keeps_a_variance_of_one(seed):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(24, dtype=torch.float64, generator=draw)
    values = (values - values.mean()) / values.std(unbiased=False)
    for start in (0.1, 0.25, 0.5, 0.9):
        keep = chosen(values.tolist(), samples_start=start)
        assert int(keep.sum()) == max(2, int(start * 24 + 0.5))
        assert float(values[keep].var(unbiased=False)) >= 1 - 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_3_groups_without_a_signal_come_last(seed):
    draw = torch.Generator().manual_seed(seed)
    signal = torch.randn(3, 4, dtype=torch.float64, generator=draw)
    signal = (signal - signal.mean(1, keepdim=True)).flatten().tolist()
    values, group = [*signal, *[0.0] * 8], [i // 4 for i in range(20)]
    for count in range(2, 13):
        keep = chosen(values, group, samples_start=count / 20, samples_end=count / 20)
        assert int(keep.sum()) == count
        assert not keep[12:].any()


def test_without_any_signal_the_step_is_skipped():
    assert not chosen([0.0, 0.0, 0.0, 0.0]).any()
    assert not chosen([0.0, 0.0], samples_start=1, decisions_start=0.5).any()
    assert not chosen([0.0, 0.0], scope="group").any()


def test_each_group_keeps_its_share_whatever_its_size():
    values = [3.0, -1, 0.1, -2, 0.2, -0.2, 1.0, -1, 0.5, -0.5]
    group = [5, 5, 5, 5, 2, 2, 2, 2, 7, 7]
    keep = chosen(values, group, samples_start=0.5, samples_end=0.5, scope="group")
    assert keep.tolist() == [True, False, False, True, False, False, True, True, True, True]
    step = chosen(values, group, samples_start=0.4, samples_end=0.4)
    assert step.nonzero()[:, 0].tolist()[:2] == [0, 1]


def test_samples_left_out_before_are_no_candidates():
    values, keep = [9.0, -9.0, 1.0, -1.0, 0.5], [False, False, True, True, True]
    assert chosen(values, keep=keep, samples_start=0.6).tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_order_plays_no_part():
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(11, dtype=torch.float64, generator=draw)
    order = torch.randperm(11, generator=draw)
    expected = chosen(values.tolist(), samples_start=0.5)
    assert torch.equal(chosen(values[order].tolist(), samples_start=0.5), expected[order])


def test_the_schedule_is_linear_between_its_ends():
    config = Config(decisions_start=0.2, decisions_end=0.7)
    shares = [decision_share(Moment(step=s, num_steps=5, seed=0), config) for s in range(6)]
    assert shares == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    values = [float(i) for i in range(20)]
    sizes = [
        int(chosen(values, moment=Moment(step=s, num_steps=4, seed=0), samples_start=0.2).sum())
        for s in range(5)
    ]
    assert sizes == [4, 8, 12, 16, 20]


def test_keys_are_advantage_times_entropy():
    entropy = torch.tensor([[0.5, 2.0], [1.0, 0.0]])
    terms = PolicyTerms(logp=torch.zeros(2, 2), entropy=entropy)
    keys = decision_keys(float64([-2.0, 0.5]), terms, Config())
    assert keys.tolist() == [[1.0, 4.0], [0.5, 0.0]]
    assert needs(Config()) == {"logp", "entropy"}


def test_shares_outside_their_range_are_named():
    for name in ("samples_start", "samples_end", "decisions_start", "decisions_end"):
        for wrong in (0, 1.1):
            with pytest.raises(ValidationError, match=name):
                Config(**{name: wrong})
    with pytest.raises(ValidationError, match="scope"):
        Config(scope="batch")
