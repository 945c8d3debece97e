"""Numbers on which published trainers agree, and identities stated in the papers."""

from __future__ import annotations

import pytest
import torch
from core_oracles import F_ADVANTAGES, F_MASK, fixture_f, float64, reduced

from mmrl import divergences, reduction
from mmrl.advantages import group, leave_one_out
from mmrl.objectives import cispo, grpo, sapo
from mmrl.regularisers import kl_reference
from mmrl.types import Scores

ONES = torch.ones(3, dtype=torch.float64)


def six_digits(actual, expected) -> None:
    """The published values are printed with six decimals."""
    torch.testing.assert_close(torch.as_tensor(actual), float64(expected), rtol=0, atol=6e-7)


def objective(aggregation: str, horizon: int | None = None, **options):
    terms, batch = fixture_f()
    config = grpo.Config(clip_low=0.2, clip_high=0.28, **options)
    loss = grpo.loss(terms, batch, config).loss
    return reduced(reduction, loss, F_MASK, ONES, aggregation, horizon), terms, batch


@pytest.mark.parametrize(
    ("aggregation", "horizon", "importance", "value"),
    [
        ("decision_mean", None, "decision", -0.356931),
        ("sample_mean_of_means", None, "decision", -0.103052),
        ("sample_sum_over_horizon", 8, "decision", -0.133849),
        ("sample_mean_of_means", None, "sample", -0.185831),
    ],
)
def test_clipped_objective(aggregation, horizon, importance, value):
    six_digits(objective(aggregation, horizon, importance=importance)[0].detach(), value)


@pytest.mark.parametrize("option", ["delta", "dual_clip"])
def test_two_sided_clipping(option):
    """Published for delta 1.5; a dual clip above 1 + clip_high bounds the same ratios."""
    six_digits(objective("decision_mean", **{option: 1.5})[0].detach(), -0.373456)


@pytest.mark.parametrize(
    ("module", "options", "aggregation", "value"),
    [
        (sapo, {}, "sample_mean_of_means", -0.379646),
        (cispo, {"low": 0.2, "high": 0.28}, "decision_mean", 0.348003),
        (cispo, {"low": 0.2, "high": 0.28}, "sample_mean_of_means", 0.142972),
        (cispo, {"bounds": "absolute", "low": 0.8, "high": 1.28}, "decision_mean", 0.348003),
    ],
)
def test_other_weightings_of_the_policy_gradient(module, options, aggregation, value):
    terms, batch = fixture_f()
    loss = module.loss(terms, batch, module.Config(**options)).loss
    six_digits(reduced(reduction, loss, F_MASK, ONES, aggregation).detach(), value)


def test_gradient_of_the_clipped_token_mean():
    value, terms, _ = objective("decision_mean")
    (gradient,) = torch.autograd.grad(value, terms.logp)
    expected = [
        [-0.13571, -0.08231, -0.11111, 0],
        [0, 0.18319, 0, 0],
        [-0.05285, 0, -0.0337, 0],
    ]
    # Published with five decimals.
    torch.testing.assert_close(gradient, float64(expected), rtol=0, atol=6e-6)


def test_clipped_token_mean_with_k3_penalty():
    value, terms, batch = objective("decision_mean")
    penalty = kl_reference.loss(terms, batch, kl_reference.Config(coef=0.04, estimator="k3"))
    kl = reduced(reduction, penalty.loss, F_MASK, ONES, "decision_mean")
    six_digits((value + 0.04 * kl).detach(), -0.353245)
    total, count = penalty.metrics["kl_reference"]
    assert total / count == pytest.approx(0.09216, abs=6e-6)


REWARDS = (1, 0, 0, 1, 0.5, 0.25, 1, 0.25)


def scores(rewards=REWARDS, size: int = 4) -> Scores:
    return Scores(
        combined=float64(rewards),
        group=torch.arange(len(rewards)) // size,
        valid=torch.ones(len(rewards), dtype=torch.bool),
    )


def z_scores(a: float, b: float, c: float) -> list[float]:
    return [a, -a, -a, a, 0, -b, c, -b]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"ddof": 1, "eps": 1e-6}, z_scores(0.866024, 0.707105, 1.414209)),
        ({"ddof": 1, "eps": 1e-4}, z_scores(0.865875, 0.706907, 1.413814)),
        # Population deviations are exactly 1/2 and sqrt(3/32).
        ({"ddof": 0, "eps": 1e-4}, z_scores(0.5 / 0.5001, 0.816231, 1.632460)),
        ({"ddof": 0, "eps": 1e-6, "eps_mode": "floor"}, z_scores(1, 0.816497, 1.632993)),
    ],
    ids=["verl", "trl", "flow_grpo", "flow_factory"],
)
def test_group_deviations_of_released_systems(config, expected):
    values = group.estimate(scores(), group.Config(deviation="group", **config), {})[0].values
    torch.testing.assert_close(values, float64(expected), rtol=0, atol=2e-6)


def test_centred_and_leave_one_out():
    centred = group.estimate(scores(), group.Config(deviation="none"), {})[0].values
    six_digits(centred, z_scores(0.5, 0.25, 0.5))
    others = leave_one_out.estimate(scores(), leave_one_out.Config(), {})[0].values
    six_digits(others, z_scores(0.666667, 0.333333, 0.666667))


def test_global_deviation_is_the_default():
    values = group.estimate(scores(), group.Config(), {})[0].values
    deviation = torch.tensor(REWARDS, dtype=torch.float64).std(correction=0)
    six_digits(values, (float64(z_scores(0.5, 0.25, 0.5)) / (deviation + 1e-4)).tolist())


@pytest.mark.parametrize(
    ("aggregation", "value"),
    [
        ("decision_mean", 5.0),
        ("decision_sum", 45.0),
        ("sample_mean_of_sums", 15.0),
        ("sample_mean_of_means", 16 / 3),
        ("sample_sum_over_horizon", 3.75),
    ],
)
def test_aggregations(aggregation, value):
    loss = float64([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]])
    assert reduced(reduction, loss, F_MASK, ONES, aggregation, 4).item() == pytest.approx(value)


def test_divergence_estimators():
    new, ref = float64([-1, -0.5, -2]), float64([-1.2, -0.5, -1])
    six_digits(divergences.k1(new, ref), [0.2, 0, -1])
    six_digits(divergences.k2(new, ref), [0.02, 0, 0.5])
    six_digits(divergences.k3(new, ref), [0.018731, 0, 0.718282])


def test_k1_and_k3_are_unbiased_and_gaussian_kl_is_exact():
    """Under samples of p = N(0, 1), the mean of k1 and k3 is KL(p || N(m, 1)) = m^2 / 2."""
    nodes, mean = torch.linspace(-12, 12, 4001, dtype=torch.float64), 0.7
    p = torch.distributions.Normal(float64(0), float64(1)).log_prob(nodes)
    q = torch.distributions.Normal(float64(mean), float64(1)).log_prob(nodes)
    exact = divergences.gaussian_kl(float64(mean**2), float64(1.0)).item()
    for estimator in (divergences.k1, divergences.k3):
        estimate = torch.trapezoid(p.exp() * estimator(p, q), nodes).item()
        assert estimate == pytest.approx(exact, abs=1e-9)


def test_awm_policy_loss_on_policy_is_minus_the_mean_advantage():
    """AWM, check 1: ratio 1 bitwise for both reductions, so the value is -mean(A)."""
    terms, batch = fixture_f()
    on_policy = type(batch)(
        payload=None, mask=F_MASK, advantages=float64(F_ADVANTAGES), weights=ONES
    )
    for importance in ("decision", "sample"):
        config = grpo.Config(clip_low=1, clip_high=1, importance=importance)
        out = grpo.loss(terms, on_policy, config)
        total, count = out.metrics["ratio/mean"]
        assert total == count
        value = reduced(reduction, out.loss, F_MASK, ONES, "sample_mean_of_means")
        assert value.item() == pytest.approx(-sum(F_ADVANTAGES) / 3, abs=1e-15)
