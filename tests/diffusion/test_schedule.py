"""Sigma grids against published values, and integrators on a flow that can be solved by hand."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion.schedule import build_scheduler, sigma_grid, step

DIFFUSERS_10 = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893]
LINSPACE_10 = [1, 0.9643, 0.9231, 0.8750, 0.8182, 0.7500, 0.6667, 0.5625, 0.4286, 0.2500]
DIFFUSERS_14 = [1, 0.97306, 0.94305, 0.90941, 0.87145, 0.82828, 0.77874, 0.72131, 0.65394]
DIFFUSERS_14 += [0.57381, 0.47691, 0.35737, 0.20620, 0.00893]
MEAN, DEVIATION = 1.5, 0.4


@pytest.mark.parametrize(
    ("name", "expected", "digits"),
    [
        ("diffusers_default", DIFFUSERS_10, 5),
        ("diffusers_default", DIFFUSERS_14, 5),
        ("linspace_shifted", LINSPACE_10, 4),
    ],
)
def test_grids_have_the_published_values(name, expected, digits):
    grid = sigma_grid(name, len(expected), shift=3.0)
    rounded = [round(value, digits) for value in grid.tolist()]
    assert rounded == [*expected, 0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
def test_diffusers_default_is_what_the_pipeline_scheduler_makes(num_steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    # One unit in the last place: they shift the lower end in numpy, we in torch.
    torch.testing.assert_close(
        sigma_grid("diffusers_default", num_steps, shift), theirs.sigmas, rtol=0, atol=6e-8
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_a_grid_stretched_to_a_last_level_is_what_its_scheduler_makes(num_steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=0.02)
    theirs.set_timesteps(num_steps)
    ours = sigma_grid("diffusers_default", num_steps, shift, theirs.config.shift_terminal)
    torch.testing.assert_close(ours, theirs.sigmas, rtol=0, atol=3e-7)
    assert (ours - sigma_grid("diffusers_default", num_steps, shift)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["diffusers_default", "linspace_shifted"])
def test_stretching_keeps_the_ends_and_the_proportions(name):
    plain, stretched = (sigma_grid(name, 10, 3.0, terminal) for terminal in (None, 0.02))
    assert stretched[[0, -1]].tolist() == [1, 0]
    assert stretched[-2].item() == pytest.approx(0.02)
    factors = (1 - stretched[1:-1]) / (1 - plain[1:-1])
    torch.testing.assert_close(factors, factors[:1].expand(9))
    assert sigma_grid(name, 1, 3.0, 0.02).tolist() == [1, 0]  # nothing to stretch


def test_awm_grid_changes_exactly_two_levels():
    base, awm = (sigma_grid(name, 14, 3.0) for name in ("diffusers_default", "awm"))
    assert awm[0].item() == pytest.approx(0.999)
    assert awm[-2].item() == pytest.approx(0.20620 / 2, abs=1e-5)
    assert awm[-1].item() == 0
    assert torch.equal(awm[1:-2], base[1:-2])


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "sa_solver"])
def test_schedulers_visit_the_given_levels(name):
    grid = sigma_grid("awm", 6, 3.0)
    scheduler = build_scheduler(name, grid)
    assert torch.equal(scheduler.sigmas, grid)
    torch.testing.assert_close(scheduler.timesteps, 1000 * grid[:-1])


def velocity(x, sigma):
    """E[eps - x0 | x] for x0 ~ N(MEAN, DEVIATION^2): linear in x."""
    signal, noise = (1 - sigma) * DEVIATION**2, sigma
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    return -MEAN + (noise - signal) / variance * (x - (1 - sigma) * MEAN)


def solve(name, grid, start, noise_level=0.0, generators=()):
    scheduler = build_scheduler(name, grid, noise_level)
    x = start
    for index, sigma in enumerate(grid[:-1].tolist()):
        x = step(scheduler, index, velocity(x, sigma), x, generators)
    return x


def exact(start, first):
    """The ODE keeps the standardised position: x_sigma = mean_sigma + std_sigma z."""
    z = (start - (1 - first) * MEAN) / math.hypot((1 - first) * DEVIATION, first)
    return MEAN + DEVIATION * z


def error(name, num_steps):
    start = torch.tensor([[-1.3], [0.2], [1.7]])
    # Equal steps between fixed ends; below them a tiny last step, so that it adds no error.
    grid = torch.cat([torch.linspace(0.95, 1e-3, num_steps + 1), torch.zeros(1)])
    generators = [torch.Generator() for _ in start]
    drawn = solve(name, grid, start, generators=generators)
    return (drawn - exact(start, 0.95)).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpmpp_2m", 2)])
def test_measured_order_of_convergence(name, order):
    coarse, fine = error(name, 40), error(name, 80)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "sa_solver"])
def test_all_integrators_reach_the_ode_solution(name):
    assert error(name, 200) < 0.01
    assert error(name, 25) > 1e-5  # the tolerance above is not met by construction


@pytest.mark.parametrize("noise_level", [0.0, 0.4, 1.0])
def test_sa_solver_keeps_the_marginal(noise_level):
    count, first = 4000, 0.999
    start = torch.randn(1, count, generator=torch.Generator().manual_seed(1))
    grid = torch.cat([torch.linspace(first, 5e-3, 80), torch.zeros(1)])
    drawn = solve("sa_solver", grid, start, noise_level, [torch.Generator().manual_seed(2)])
    # Standard errors: DEVIATION / sqrt(4000) = 0.0063 of the mean, 0.0045 of the deviation.
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.025)
    assert drawn.std().item() == pytest.approx(DEVIATION, abs=0.02)


def test_noise_level_acts_only_between_its_limits():
    scheduler = build_scheduler("sa_solver", sigma_grid("awm", 6, 3.0), 0.4)
    levels = [scheduler.tau_func(1000 * sigma) for sigma in (0.95, 0.9, 0.5, 0.3, 0.25)]
    assert levels == [0.0, 0.4, 0.4, 0.4, 0.0]


def test_sa_solver_noise_is_drawn_row_by_row():
    grid = sigma_grid("awm", 8, 3.0)
    start = torch.zeros(2, 3)

    def run(seeds, rows):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return solve("sa_solver", grid, start[rows], 0.5, generators)

    together = run([1, 2], slice(0, 2))
    torch.testing.assert_close(together[1:], run([2], slice(1, 2)))
    assert not torch.allclose(together[0], together[1])
