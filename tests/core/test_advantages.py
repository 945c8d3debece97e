"""Properties of advantage estimators and modulators beyond their formulas."""

from __future__ import annotations

import pytest
import torch
from core_oracles import close, float64, random_scores, some_advantages
from pydantic import ValidationError

from mmrl.advantages import g2rpo, group, leave_one_out
from mmrl.modulators import clip, drop_zero
from mmrl.types import Scores

ESTIMATORS = {
    **{f"group-{kind}": (group, group.Config(deviation=kind)) for kind in ("group", "global")},
    "group-none": (group, group.Config(deviation="none", eps=0)),
    "group-sample-floor": (group, group.Config(ddof=1, eps=0, eps_mode="floor")),
    "leave_one_out": (leave_one_out, leave_one_out.Config()),
    "g2rpo": (g2rpo, g2rpo.Config()),
}
by_estimator = pytest.mark.parametrize(("module", "config"), ESTIMATORS.values(), ids=ESTIMATORS)


def scores(rewards, groups, valid=None) -> Scores:
    valid = [True] * len(rewards) if valid is None else valid
    return Scores(combined=float64(rewards), group=torch.tensor(groups), valid=torch.tensor(valid))


def values(module, config, given: Scores):
    return module.estimate(given, config, {})[0].values


@by_estimator
def test_groups_sum_to_zero_and_order_is_kept(module, config):
    given = random_scores()
    result = values(module, config, given)
    for identity in given.group.unique():
        members = (given.group == identity) & given.valid
        assert result[members].sum().abs() < 1e-12
        if given.combined[members].unique().numel() > 1:
            assert torch.equal(result[members].argsort(), given.combined[members].argsort())


@by_estimator
def test_equal_rewards_are_exactly_zero(module, config):
    """The mean of three 0.1 is not 0.1 in binary; the noise must not become an advantage."""
    result = values(module, config, scores([0.1] * 3 + [0.7, 0.2, 0.3, 0.35], [0] * 3 + [1] * 4))
    assert result[:3].tolist() == [0, 0, 0]
    assert result[3:].abs().min() > 0.01


@by_estimator
def test_invalid_samples_influence_nothing(module, config):
    given = random_scores()
    result, _ = module.estimate(given, config, {})
    other = Scores(
        combined=torch.where(given.valid, given.combined, -5.0),
        group=given.group,
        valid=given.valid,
    )
    assert torch.equal(result.values, values(module, config, other))
    assert result.values[~given.valid].tolist() == [0, 0]
    assert torch.equal(result.keep, given.valid)
    without = Scores(
        combined=given.combined[given.valid],
        group=given.group[given.valid],
        valid=given.valid[given.valid],
    )
    close(values(module, config, without), result.values[given.valid].tolist())


@by_estimator
def test_permutation_of_samples_permutes_advantages(module, config):
    given = random_scores()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    shuffled = Scores(
        combined=given.combined[order], group=given.group[order], valid=given.valid[order]
    )
    expected = values(module, config, given)[order]
    close(values(module, config, shuffled), expected.tolist())


@by_estimator
def test_negated_rewards_negate_advantages(module, config):
    given = random_scores()
    negated = Scores(combined=-given.combined, group=given.group, valid=given.valid)
    close(values(module, config, negated), (-values(module, config, given)).tolist())


@by_estimator
@pytest.mark.parametrize("valid", [[True, False], [False, False]])
def test_groups_without_two_valid_samples_are_zero(module, config, valid):
    result, _ = module.estimate(scores([1.0, 2.0], [0, 0], valid), config, {})
    assert result.values.tolist() == [0, 0]
    assert result.keep.tolist() == valid


@by_estimator
def test_rewards_too_close_to_square_are_finite(module, config):
    assert values(module, config, scores([1e-200, 2e-200], [0, 0])).isfinite().all()


def test_shift_invariance_and_scale_of_z_scores():
    given = random_scores()
    config = group.Config(deviation="group", eps=0)
    scaled = Scores(combined=3 * given.combined + 7, group=given.group, valid=given.valid)
    close(values(group, config, scaled), values(group, config, given).tolist(), 1e-10)


def test_metrics():
    given = scores([1, 0, 0, 1, 0.5, 0.5], [0, 0, 0, 0, 1, 1])
    metrics = group.estimate(given, group.Config(deviation="none"), {})[0].metrics
    assert metrics == {
        "reward_std": 0.25,
        "frac_reward_zero_std": 0.5,
        "advantage/abs_mean": pytest.approx(2 / 6),
        "advantage/max": 0.5,
    }


@pytest.mark.parametrize(
    "wrong", [{"deviation": "batch"}, {"ddof": 2}, {"eps": -1e-4}, {"eps_mode": "max"}, {"std": 1}]
)
def test_group_config_refuses(wrong):
    with pytest.raises(ValidationError):
        group.Config(**wrong)


def test_clip_conventions_of_released_systems():
    given = some_advantages()  # -10, -5, 0, 2, 0 (dropped), 10
    dummy = scores([0.0] * 6, [0] * 6)
    official = clip.modulate(given, dummy, clip.Config())
    assert official.values.tolist() == [-1, -1, 0, 0.4, 0, 1]
    one_sigma = clip.modulate(given, dummy, clip.Config(bound=1, normalize=False))
    assert one_sigma.values.tolist() == [-1, -1, 0, 1, 0, 1]
    for wrong in ({"bound": 0}, {"output_max": 0}):
        with pytest.raises(ValidationError):
            clip.Config(**wrong)


def test_dropping_zeros_twice_changes_nothing_more():
    dummy = scores([0.0] * 6, [0] * 6)
    once = drop_zero.modulate(some_advantages(), dummy, drop_zero.Config())
    twice = drop_zero.modulate(once, dummy, drop_zero.Config())
    assert torch.equal(once.keep, twice.keep)
    assert twice.metrics["advantage/dropped"] == 0
