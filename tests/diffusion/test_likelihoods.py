"""Weightings, time samplers and the checks of AWM that need no model.

The numbers in names refer to the list of checks in the specification of the method.
"""

from __future__ import annotations

import math

import pytest
import torch

from diffusion.likelihoods import (
    draw_times,
    interpolate,
    logit_normal,
    mean_square,
    surrogate_logp,
    trained_indices,
    velocity_error,
    weighted_error,
)
from diffusion.schedule import sigma_grid
from mmrl.errors import UserError

FLOOR = 1e-10
WEIGHTINGS = {
    "uniform": lambda e, t, p: e,
    "t": lambda e, t, p: t * e,
    "t2": lambda e, t, p: t * t * e,
    "huber": lambda e, t, p: t * (math.sqrt(e + FLOOR) - 1e-5),
    "ghuber": lambda e, t, p: t / p * ((e + FLOOR) ** p - FLOOR**p),
}
SLOPES = {
    "uniform": lambda e, t, p: 1.0,
    "t": lambda e, t, p: t,
    "t2": lambda e, t, p: t * t,
    "huber": lambda e, t, p: t / (2 * math.sqrt(e + FLOOR)),
    "ghuber": lambda e, t, p: t * (e + FLOOR) ** (p - 1),
}
POINTS = [(0.0, 0.5), (1e-6, 0.9), (1e-3, 0.2), (0.7, 1.0), (40.0, 0.01)]


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_weightings_equal_their_formulas(name, power):
    errors, times = torch.tensor(POINTS, dtype=torch.float64).T
    expected = [-WEIGHTINGS[name](e, t, power) for e, t in POINTS]
    logp = surrogate_logp(errors, times, name, power)
    assert logp.dtype == torch.float64
    torch.testing.assert_close(
        logp, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_3_slopes_of_the_weightings(name):
    errors, times = torch.tensor(POINTS, dtype=torch.float64).T
    errors.requires_grad_(True)
    weighted_error(errors, times, name, 0.25).sum().backward()
    expected = [SLOPES[name](e, t, 0.25) for e, t in POINTS]
    torch.testing.assert_close(errors.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_3_finite_differences_of_the_weightings(name):
    errors = torch.tensor([1e-3, 0.2, 3.0], dtype=torch.float64)
    times = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    h = 1e-6 * errors
    rise = weighted_error(errors + h, times, name, 0.25)
    rise = (rise - weighted_error(errors - h, times, name, 0.25)) / (2 * h)
    expected = [
        SLOPES[name](e, t, 0.25) for e, t in zip(errors.tolist(), times.tolist(), strict=True)
    ]
    torch.testing.assert_close(rise, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_3_ghuber_limits():
    errors = torch.rand(50, dtype=torch.float64) * 5
    times = torch.rand(50, dtype=torch.float64)
    linear = weighted_error(errors, times, "ghuber", 1.0)
    torch.testing.assert_close(linear, weighted_error(errors, times, "t", 1.0), rtol=0, atol=1e-9)
    assert torch.equal(weighted_error(errors * 0, times, "ghuber", 0.25), errors * 0)


def test_errors_are_float64_and_not_rounded_before_the_difference():
    # 1 + 1e-5 in float32: the square of the residual is lost if it is taken in half precision.
    x0, noise = torch.zeros(1, 4), torch.full((1, 4), 1.0)
    velocity = torch.full((1, 4), 1.0 + 2**-17)
    error = velocity_error(velocity, x0, noise)
    assert error.dtype == torch.float64
    assert error.item() == 2.0**-34


def test_interpolation_runs_from_data_to_noise():
    x0, noise = torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), -1.0)
    drawn = interpolate(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert drawn[:, 0, 0, 0].tolist() == [2.0, 1.25, -1.0]


# Time samplers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("discrete", [0, 2, 4, 6, 8, 10, 12]),
        ("discrete_wo_init", [1, 2, 4, 6, 8, 10, 12]),
    ],
)
def test_6_strata_of_fourteen_steps(name, expected):
    strata = trained_indices(name, 14, 0.9, 6)
    assert [stratum.start for stratum in strata] == expected[:-1]
    assert [stratum.stop for stratum in strata] == expected[1:]


def test_6_strata_with_the_initial_level():
    strata = trained_indices("discrete_with_init", 14, 0.9, 6)
    assert strata[0] == range(0, 1)
    assert (strata[1].start, strata[-1].stop) == (1, 12)
    assert sum(len(stratum) for stratum in strata[1:]) == 11


@pytest.mark.parametrize("name", ["discrete", "discrete_wo_init", "discrete_with_init"])
def test_6_each_stratum_gives_one_level_and_all_of_its_levels(name):
    grid = sigma_grid("diffusers_default", 14, 3.0)[:-1].tolist()
    strata = trained_indices(name, 14, 0.9, 6)
    generator = torch.Generator().manual_seed(0)
    seen = [set() for _ in strata]
    for _ in range(60):
        times = draw_times(name, generator, 6, grid=grid, fraction=0.9, shift=3.0)
        assert times.shape == (6,)
        for found, time in zip(seen, times.tolist(), strict=True):
            found.add(min(range(14), key=lambda i: abs(grid[i] - time)))
    assert seen == [set(stratum) for stratum in strata]


@pytest.mark.parametrize("name", ["discrete", "discrete_wo_init", "discrete_with_init"])
def test_the_last_levels_are_never_trained(name):
    strata = trained_indices(name, 10, 0.9, 4)
    assert max(stratum.stop for stratum in strata) == 9


@pytest.mark.parametrize("num_times", [1, 4, 7])
def test_6_uniform_times_are_stratified(num_times):
    times = draw("uniform", num_times, shift=1.0)
    position = (times - 0.2) / 0.8 * num_times
    assert position.floor().tolist() == list(range(num_times))


@pytest.mark.parametrize("num_times", [1, 4, 7])
def test_6_logit_normal_times_are_stratified(num_times):
    times = draw("logit_normal", num_times, shift=1.0).double()
    position = torch.special.ndtr(torch.logit(times)) * num_times
    assert sorted(position.floor().int().tolist()) == list(range(num_times))


@pytest.mark.parametrize("name", ["uniform", "logit_normal"])
def test_shift_of_the_continuous_samplers(name):
    plain, shifted = draw(name, 5, shift=1.0), draw(name, 5, shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def draw(name, num_times, shift):
    generator = torch.Generator().manual_seed(3)
    return draw_times(name, generator, num_times, grid=[], fraction=1.0, shift=shift)


def test_logit_normal_survives_the_ends_of_the_unit_interval():
    times = logit_normal(torch.tensor([0.0, 1e-12, 0.5, 1.0]), shift=1.0)
    assert times.isfinite().all()
    assert times[0] == times[1] == 0.01
    assert times[2] == pytest.approx(0.5)
    assert 0.99 < times[3] <= 1


def test_too_many_times_name_the_limit():
    with pytest.raises(UserError, match=r"num_times = 9 .*'discrete_wo_init'.*at most 8"):
        trained_indices("discrete_wo_init", 10, 0.9, 9)
    assert len(trained_indices("discrete_wo_init", 10, 0.9, 8)) == 8
    assert len(trained_indices("discrete_with_init", 10, 0.9, 9)) == 9
    with pytest.raises(UserError, match="at most 9"):
        trained_indices("discrete_with_init", 10, 0.9, 10)


# Checks of the method as a whole


def test_8_a_gaussian_moves_towards_its_reward():
    """2-D Gaussian, reward = first coordinate; the model's velocity field is the exact one of its
    own Gaussian, so the only parameter is the mean of what it samples.
    """
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=0.3)
    for _ in range(20):
        x0 = mean.detach() + torch.randn(256, 2, dtype=torch.float64, generator=generator)
        advantages = x0[:, 0] - x0[:, 0].mean()
        times = torch.rand(256, dtype=torch.float64, generator=generator) * 0.8 + 0.1
        noise = torch.randn(256, 2, dtype=torch.float64, generator=generator)
        x_t = interpolate(x0, noise, times)
        logp = surrogate_logp(
            velocity_error(gaussian_velocity(x_t, times, mean), x0, noise), times, "uniform", 0.25
        )
        optimizer.zero_grad()
        (-advantages * logp).mean().backward()
        optimizer.step()
    assert mean[0].item() > 0.5
    assert abs(mean[1].item()) < 0.25


def gaussian_velocity(x, times, mean):
    """E[eps - x0 | x_t = x] for x0 ~ N(mean, 1)."""
    t = times[:, None]
    return -mean + (t - (1 - t)) / ((1 - t) ** 2 + t**2) * (x - (1 - t) * mean)


@pytest.mark.parametrize("advantage", [1.0, -0.6])
def test_9_gradient_of_negative_aware_fine_tuning(advantage):
    """DiffusionNFT (arXiv:2509.16117) at v = v_old equals ghuber with p = 1/2 once both use the L1
    normaliser: its loss has weights r and 1 - r on implicit positive and negative policies.
    """
    generator = torch.Generator().manual_seed(5)
    old, x0, noise = (
        torch.randn(1, 12, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    time = torch.tensor([0.7], dtype=torch.float64)
    beta, r = 1.0, 0.5 + advantage / 2
    v = old.clone().requires_grad_(True)
    x_t = (1 - time) * x0 + time * noise
    losses = []
    for sign, weight in ((1, r), (-1, 1 - r)):
        implicit = old + sign * beta * (v - old)
        residual = (x_t - time * implicit) - x0
        normaliser = residual.abs().mean().detach()
        losses.append(weight * residual.square().mean() / normaliser)
    sum(losses).backward()
    nft = v.grad

    w = old.clone().requires_grad_(True)
    error = velocity_error(w, x0, noise)
    (-advantage * surrogate_logp(error, time, "ghuber", 0.5)).sum().backward()
    target = noise - x0
    l1 = (old - target).abs().mean()
    ours = w.grad * (mean_square(old, target) + FLOOR).sqrt() / l1
    torch.testing.assert_close(ours, nft, rtol=1e-8, atol=1e-10)
