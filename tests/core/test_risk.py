"""The risk interface and its estimator: known values, limits and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from core_oracles import close, float64, random_scores
from estimator_oracles import LAW, risks
from pydantic import ValidationError

from mmrl.advantages import _risk, group, leave_one_out, risk
from mmrl.types import Scores

TEN = float64(range(10))


def scores(*groups: list[float]) -> Scores:
    sizes = torch.tensor([len(each) for each in groups])
    rewards = float64([reward for each in groups for reward in each])
    return Scores(
        combined=rewards,
        group=torch.repeat_interleave(torch.arange(len(groups)), sizes),
        valid=torch.ones(len(rewards), dtype=torch.bool),
    )


def values(given: Scores, **config) -> torch.Tensor:
    return risk.estimate(given, risk.Config(**config), {})[0].values


@pytest.mark.parametrize(
    ("functional", "expected"),
    [
        (_risk.MEAN, 4.5),
        (_risk.cvar(0.2), 0.5),
        (_risk.cvar(1.0), 4.5),
        (_risk.cvar(0.25), (0 + 1 + 0.5 * 2) / 2.5),
        (_risk.rvar(0.2, 0.8), 4.5),
        (_risk.mixed_var(0.2, 0.8, 1.5), (1.5 * 0.5 + 4.5) / 2.5),
        (_risk.Mirrored(_risk.cvar(0.2)), 8.5),
        (_risk.MeanVariance(1.0), 4.5 - 8.25),
    ],
)
def test_values_of_ten_rewards(functional, expected):
    close(functional.value(TEN), expected)


@pytest.mark.parametrize(("rewards", "share"), [([0, 0, 1, 0], 0.25), ([1, 1, 1], 1.0), ([0], 0.0)])
def test_best_of_k_with_binary_rewards(rewards, share):
    close(_risk.Power(3).value(float64(rewards)), 1 - (1 - share) ** 3)


def test_the_best_of_k_is_the_mean_over_draws():
    draws = torch.cartesian_prod(*[float64(LAW)] * 3).amax(1)
    close(_risk.Power(3).value(float64(LAW)), draws.mean().item())


def test_limits_of_the_entropic_functional():
    rewards = float64(LAW)
    close(_risk.Entropic(1e-7).value(rewards), rewards.mean().item(), 1e-6)
    close(_risk.Entropic(-500.0).value(rewards), rewards.min().item(), 1e-2)
    close(_risk.Entropic(500.0).value(rewards), rewards.max().item(), 1e-2)
    assert _risk.Entropic(-500.0).advantage(rewards, rewards).isfinite().all()


@pytest.mark.parametrize("name", risks(_risk))
def test_3_score_form_under_exponential_tilting(name):
    """d rho = E[A(R) d log p] for p_i ~ exp(theta h_i), by autograd through no part of ours."""
    functional, h = risks(_risk)[name], float64([0.4, -0.3, 1.1, 0.2, -0.9])

    def law(theta: float) -> torch.Tensor:
        return (theta * h).softmax(0)

    rewards, p = float64(LAW), law(0.3)
    score = h - (p * h).sum()
    step = 1e-6
    slope = (
        functional.value(rewards, law(0.3 + step)) - functional.value(rewards, law(0.3 - step))
    ) / (2 * step)
    close((p * functional.advantage(rewards, rewards, p) * score).sum(), slope.item(), 1e-6)


@pytest.mark.parametrize("name", ["mean", "cvar", "rvar", "mixed_var", "pass_at_k", "entropic"])
def test_better_rewards_never_earn_less(name):
    found = risks(_risk)[name].advantage(TEN, TEN)
    assert (found.diff() >= 0).all()


@pytest.mark.parametrize("nat", [0.0, 1.0])
def test_4_mixed_var_is_the_released_formula_up_to_a_constant(nat):
    low, high, alpha, beta, omega = 1.0, 3.0, 0.2, 0.8, 1.5
    expected = []
    for s in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0):
        middle = max(s - low, 0) - max(s - high, 0) + (low - high) * nat
        tail = -max(low - s, 0) / alpha
        expected.append((omega * tail + middle / (beta - alpha)) / (omega + 1))
    found = _risk.mixed_var(alpha, beta, omega).at(
        float64([0, 0.5, 1, 2, 3, 4]), float64([low, high])
    )
    gap = found - float64(expected)
    close(gap, [gap[0].item()] * 6)
    assert (gap[0].abs() < 1e-12) == (nat == 1.0)


def test_the_mean_less_its_mean_is_the_group_estimator_bit_for_bit():
    given = random_scores()
    base = group.estimate(given, group.Config(deviation="none"), {})[0]
    found = risk.estimate(given, risk.Config(measure="mean", baseline="mean"), {})[0]
    assert torch.equal(found.values, base.values)
    assert {**base.metrics, "risk/value": found.metrics["risk/value"]} == found.metrics


@pytest.mark.parametrize(
    "neutral",
    [
        {"measure": "pass_at_k", "k": 1},
        {"measure": "entropic", "rate": 0.0},
        {"measure": "mean_variance", "penalty": 0.0},
    ],
)
@pytest.mark.parametrize("baseline", ["none", "mean", "leave_one_out"])
def test_neutral_numbers_are_the_mean_bit_for_bit(neutral, baseline):
    given = random_scores()
    assert torch.equal(
        values(given, baseline=baseline, **neutral),
        values(given, baseline=baseline, measure="mean"),
    )


@pytest.mark.parametrize("baseline", ["none", "mean", "leave_one_out"])
@pytest.mark.parametrize("tail", ["lower", "upper"])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_a_mixture_without_a_tail_is_rvar_bit_for_bit(baseline, tail, scope):
    common = {"baseline": baseline, "tail": tail, "scope": scope}
    mixed, rvar = (
        risk.estimate(random_scores(), risk.Config(measure=name, omega=0.0, **common), {})[0]
        for name in ("mixed_var", "rvar")
    )
    assert torch.equal(mixed.values, rvar.values)
    assert mixed.metrics == rvar.metrics
    assert mixed.values.any()


def test_the_mean_of_the_others_is_rloo():
    given = random_scores()
    expected = leave_one_out.estimate(given, leave_one_out.Config(), {})[0].values
    close(values(given, measure="mean"), expected.tolist())


def test_a_success_earns_what_pass_at_k_gains():
    found = values(scores([1, 0, 0, 0, 1]), measure="pass_at_k", k=3)
    success, failure = 3 * (3 / 4) ** 2, 3 * (2 / 4) ** 2
    # The mean under the others, of which one is a success, or two.
    close(found, [success * 3 / 4, *[-failure / 2] * 3, success * 3 / 4])


def test_equal_rewards_are_exactly_zero():
    for name in ("mean", "cvar", "mixed_var", "pass_at_k", "entropic", "mean_variance"):
        for baseline in ("mean", "leave_one_out"):
            found = values(scores([0.1] * 3, [0.1, 0.7]), measure=name, k=2, baseline=baseline)
            assert found[:3].tolist() == [0, 0, 0], name


def test_the_tail_alone_is_credited():
    found = values(scores([3.0, 1.0, 4.0, 2.0]), measure="cvar", alpha=0.5, baseline="none")
    close(found, [0, -2, 0, 0])
    upper = values(
        scores([3.0, 1.0, 4.0, 2.0]), measure="cvar", alpha=0.5, baseline="none", tail="upper"
    )
    close(upper, [0, 0, 2, 0])


def test_one_law_for_a_whole_step():
    """A group that did worse than expected is where the tail is, once groups are centred."""
    found = values(
        scores([0, 1], [0, 9]), measure="cvar", alpha=0.25, scope="batch", baseline="none"
    )
    close(found, [0, 0, 0, 0])
    found = values(
        scores([0, 1], [0, 9]), measure="cvar", alpha=0.5, scope="batch", baseline="none"
    )
    close(found, [0, 0, -8, 0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0},
        {"alpha": 0.5, "beta": 0.4},
        {"beta": 1},
        {"k": 0},
        {"penalty": -1},
        {"measure": "var"},
        {"tail": "both"},
        {"scope": "step"},
        {"omega": -1},
        {"rate": math.inf},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        risk.Config(**wrong)
