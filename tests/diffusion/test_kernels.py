"""Step kernels: published values, closed forms, the library's Normal, and a flow solved by hand.

Oracles are loops over Python floats written from the formulas; numbers in names refer to the list
of checks in the specification of the methods.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from diffusion.kernels import (
    MIN_STD,
    cps_logp,
    gaussian_logp,
    scorable,
    step_table,
    transition_logp,
    transition_mean,
    unscorable,
)
from diffusion.schedule import sigma_grid
from mmrl.divergences import gaussian_kl
from mmrl.errors import UserError

GRIDS = ("diffusers_default", "linspace_shifted", "awm")
NOISE = {"ode": 0.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
STOCHASTIC = ("flow_sde", "dance_sde", "cps")
SDE = ("ode", "flow_sde", "dance_sde")
DATA_MEAN, DATA_STD = 1.5, 0.4


def sd3_grid(num_steps=10):
    return sigma_grid("diffusers_default", num_steps, 3.0)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mean_of(table, steps, x, velocity):
    return transition_mean(x, velocity, table.x[steps], table.velocity[steps])


def formula_diffusion(kernel, grid, step, level):
    """g, from the table of kernels."""
    if kernel == "flow_sde":
        below = grid[1] if grid[step] == 1 else grid[step]
        return level * math.sqrt(grid[step] / (1 - below))
    return level if kernel == "dance_sde" else 0.0


def formula_step(kernel, grid, step, level, x, v):
    """(mu, S) of one number, from the table of kernels in its expanded forms."""
    sigma, after = grid[step], grid[step + 1]
    dt = after - sigma
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    if kernel == "cps":
        std = after * math.sin(level * math.pi / 2)
        return (1 - after) * x0 + math.sqrt(after**2 - std**2) * x1, std
    g = formula_diffusion(kernel, grid, step, level)
    if kernel == "dance_sde":
        mean = x + v * dt + 0.5 * level**2 * (x - (1 - sigma) * x0) / sigma**2 * dt
    else:
        mean = x * (1 + g**2 * dt / (2 * sigma)) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * math.sqrt(-dt)


@pytest.mark.parametrize(
    ("kernel", "expected", "places"),
    [
        ("flow_sde", [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.006], 3),
        ("cps", [0.913, 0.869, 0.816, 0.752, 0.673, 0.573, 0.442, 0.264, 0.0085, 0], 3),
    ],
)
def test_std_has_the_published_values(kernel, expected, places):
    std = step_table(kernel, sd3_grid(), NOISE[kernel]).std.tolist()
    # The ninth of cps is printed with one more digit.
    assert std == pytest.approx(expected, abs=0.5 * 10**-places)
    assert std[8] == pytest.approx(expected[8], abs=0.5 * 10 ** -(places + (kernel == "cps")))


@pytest.mark.parametrize("kernel", NOISE)
@pytest.mark.parametrize("grid_name", ["diffusers_default", "linspace_shifted"])
def test_tables_equal_the_formulas_step_by_step(kernel, grid_name):
    sigmas = sigma_grid(grid_name, 10, 3.0)
    grid, level = sigmas.double().tolist(), NOISE[kernel]
    table = step_table(kernel, sigmas, level)
    x, v = 0.7, -1.3
    for step in range(10):
        mean, std = formula_step(kernel, grid, step, level, x, v)
        ours = float(table.x[step] * x + table.velocity[step] * v)
        # sqrt(sigma'^2 - S^2) of the formula loses digits that cos does not.
        assert ours == pytest.approx(mean, rel=1e-10, abs=1e-12)
        assert float(table.std[step]) == pytest.approx(std, rel=1e-12, abs=1e-15)
        g = std if kernel == "cps" else formula_diffusion(kernel, grid, step, level)
        assert float(table.diffusion[step]) == pytest.approx(g, rel=1e-12, abs=1e-15)
    assert table.sigma.tolist() == grid[:-1]
    assert table.step_size.tolist() == [a - b for a, b in pairwise(grid)]


@pytest.mark.parametrize("kernel", SDE)
def test_3_equation_1_equals_the_expanded_forms(kernel):
    table = step_table(kernel, sd3_grid(), NOISE[kernel])
    x, v = randn(10, 5, seed=1), randn(10, 5, seed=2)
    sigma, g, dt = (column[:, None] for column in (table.sigma, table.diffusion, -table.step_size))
    x1 = x + (1 - sigma) * v
    expected = x + (v + g**2 / (2 * sigma) * x1) * dt
    torch.testing.assert_close(mean_of(table, range(10), x, v), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(table.std, table.diffusion * table.step_size.sqrt())


@pytest.mark.parametrize("kernel", NOISE)
def test_2_without_noise_every_kernel_is_the_step_of_diffusers(kernel):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    table = step_table(kernel, scheduler.sigmas, 0.0)
    assert table.std.tolist() == [0.0] * 10
    x = randn(2, 4, 3, 3, dtype=torch.float32)
    for step, timestep in enumerate(scheduler.timesteps):
        v = randn(2, 4, 3, 3, seed=step, dtype=torch.float32)
        theirs = scheduler.step(v, timestep, x, return_dict=False)[0]
        ours = mean_of(table, [step, step], x, v)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        x = theirs


def test_every_row_has_its_own_step_and_low_precision_is_computed_in_float32():
    table = step_table("flow_sde", sd3_grid(), 0.7)
    x, v = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    together = mean_of(table, [1, 5, 8], x, v)
    for row, step in enumerate([1, 5, 8]):
        single = mean_of(table, [step], x[row : row + 1], v[row : row + 1])
        assert torch.equal(together[row : row + 1], single)
    half = mean_of(table, [1, 5, 8], x.bfloat16(), v.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, mean_of(table, [1, 5, 8], x.bfloat16().float(), v.bfloat16().float()))
    assert together.dtype == torch.float64


@pytest.mark.parametrize("grid_name", GRIDS)
@pytest.mark.parametrize("level", [0.0, 0.3, 0.8, 1.0])
def test_5_cps_keeps_the_noise_coefficient(grid_name, level):
    sigmas = sigma_grid(grid_name, 12, 3.0)
    table = step_table("cps", sigmas, level)
    predicted_noise = table.x * table.sigma + table.velocity
    torch.testing.assert_close(
        predicted_noise.square() + table.std.square(), sigmas[1:].double().square()
    )
    # The share of x0 is that of the level as well.
    torch.testing.assert_close(table.x - predicted_noise, 1 - sigmas[1:].double())
    assert table.std[-1] == 0


def test_flow_sde_adds_more_noise_than_belongs_to_the_level_and_cps_does_not():
    sigmas = torch.tensor([0.70, 0.55, 0.0], dtype=torch.float64)

    def noise_after(kernel, level):
        table = step_table(kernel, sigmas, level)
        predicted = table.x[0] * table.sigma[0] + table.velocity[0]
        return math.hypot(float(predicted), float(table.std[0]))

    assert noise_after("flow_sde", 0.7) == pytest.approx(0.595, abs=5e-4)
    assert noise_after("cps", 0.8) == pytest.approx(0.55, abs=1e-12)


def mean_difference(kernel, sigma, after, level):
    """mu_a - mu_b for v_a - v_b = 1, from the table of closed forms."""
    dt = after - sigma
    if kernel == "flow_sde":
        return dt if sigma == 1 else (1 + level**2 / 2) * dt
    if kernel == "dance_sde":
        return (1 + level**2 * (1 - sigma) / (2 * sigma)) * dt
    if kernel == "cps":
        std = after * math.sin(level * math.pi / 2)
        return math.sqrt(after**2 - std**2) * (1 - sigma) - (1 - after) * sigma
    return dt


@pytest.mark.parametrize("kernel", NOISE)
def test_means_of_two_policies_differ_by_the_closed_form(kernel):
    sigmas, level = sd3_grid(), NOISE[kernel]
    table = step_table(kernel, sigmas, level)
    grid = sigmas.double().tolist()
    expected = [mean_difference(kernel, grid[j], grid[j + 1], level) for j in range(10)]
    assert table.velocity.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    x, a, b = (randn(10, 6, seed=seed) for seed in range(3))
    gap = mean_of(table, range(10), x, a) - mean_of(table, range(10), x, b)
    torch.testing.assert_close(gap, table.velocity[:, None] * (a - b), rtol=0, atol=1e-12)


def test_4_divergence_of_flow_sde_is_its_closed_form():
    level = NOISE["flow_sde"]
    table = step_table("flow_sde", sd3_grid(), level)
    sigma, h = table.sigma[1:], table.step_size[1:]
    kappa = (1 + level**2 / 2) ** 2 * h * (1 - sigma) / (2 * level**2 * sigma)
    ours = gaussian_kl(table.velocity[1:].square(), table.std[1:])
    torch.testing.assert_close(ours, kappa)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_4_divergence_equals_monte_carlo(kernel):
    table = step_table(kernel, sd3_grid(), NOISE[kernel])
    count, step = 200_000, 5
    coef, std = float(table.velocity[step]), table.std[step]
    gap = 0.5 * float(std)
    x, other = torch.zeros(count, 1, dtype=torch.float64), gap / coef
    mean_a = mean_of(table, [step] * count, x, torch.zeros_like(x))
    mean_b = mean_of(table, [step] * count, x, torch.full_like(x, other))
    drawn = mean_a + std * randn(count, 1)
    log_ratio = gaussian_logp(drawn, mean_a, std) - gaussian_logp(drawn, mean_b, std)
    closed = float(gaussian_kl(table.velocity[step].square() * other**2, std))
    assert closed == pytest.approx(0.125)
    # Standard error of the estimate: 0.5 / sqrt(200 000) = 0.0011.
    assert float(log_ratio.mean()) == pytest.approx(closed, abs=0.004)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_form_equals_the_normal_of_the_library(dtype):
    sample, mean = randn(4, 3, 5, dtype=dtype), randn(4, 3, 5, seed=1, dtype=dtype)
    std = torch.tensor([0.02, 0.3, 0.7, 1.4], dtype=torch.float64)
    normal = torch.distributions.Normal(mean.double(), std[:, None, None])
    expected = normal.log_prob(sample.double()).mean(dim=(1, 2))
    ours = gaussian_logp(sample, mean, std)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_cps_form_is_the_bare_residual_and_each_kernel_gets_its_own():
    sample, mean = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    std = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    rows = zip(sample.flatten(1).tolist(), mean.flatten(1).tolist(), strict=True)
    expected = [-sum((a - b) ** 2 for a, b in zip(*row, strict=True)) / 8 for row in rows]
    assert cps_logp(sample, mean).tolist() == pytest.approx(expected)
    assert torch.equal(transition_logp("cps", sample, mean, std), cps_logp(sample, mean))
    for kernel in ("flow_sde", "dance_sde"):
        ours = transition_logp(kernel, sample, mean, std)
        assert torch.equal(ours, gaussian_logp(sample, mean, std))
    # The two forms differ by the factor 2 S^2 in what depends on the policy.
    gap = gaussian_logp(sample, mean, std) - gaussian_logp(sample, sample, std)
    torch.testing.assert_close(gap * 2 * std.square(), cps_logp(sample, mean))


def test_a_step_without_noise_has_no_density():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="std must be positive"):
        transition_logp("ode", x, x, torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_gradient_with_respect_to_the_velocity(kernel):
    table = step_table(kernel, sd3_grid(), NOISE[kernel])
    steps = [0, 3, 7]
    x, sample = randn(3, 4), randn(3, 4, seed=1)
    std = table.std[steps]

    def logp(velocity, drawn=sample):
        mean = mean_of(table, steps, x, velocity)
        return transition_logp(kernel, drawn, mean, std)

    velocity = randn(3, 4, seed=2).requires_grad_(True)
    assert torch.autograd.gradcheck(logp, (velocity,))
    (ours,) = torch.autograd.grad(logp(velocity).sum(), velocity)
    residual = sample - mean_of(table, steps, x, velocity.detach())
    weight = 2 * torch.ones(3) if kernel == "cps" else 1 / std.square()
    expected = (weight * table.velocity[steps])[:, None] * residual / 4
    torch.testing.assert_close(ours, expected)

    drawn = sample.clone().requires_grad_(True)
    logp(velocity, drawn).sum().backward()
    assert drawn.grad is None


def test_steps_without_a_usable_density_are_named():
    flow = step_table("flow_sde", sd3_grid(), 0.7)
    assert unscorable(flow) == {9: "ends at sigma = 0"}
    assert scorable(flow) == list(range(9))
    cps = step_table("cps", sd3_grid(), 0.8)
    assert unscorable(cps) == {
        8: "adds too little noise (S = 0.0085 < 0.01)",
        9: "adds no noise (S = 0)",
    }
    assert scorable(cps) == list(range(8))
    ode = step_table("ode", sd3_grid(), 0.0)
    assert unscorable(ode) == dict.fromkeys(range(10), "adds no noise (S = 0)")
    assert scorable(ode) == []


def test_a_grid_that_stops_above_zero_keeps_its_last_step():
    table = step_table("flow_sde", torch.tensor([1.0, 0.7, 0.4]), 0.7)
    assert scorable(table) == [0, 1]


@pytest.mark.parametrize("grid_name", GRIDS)
@pytest.mark.parametrize("num_steps", [2, 3, 10, 40, 200])
@pytest.mark.parametrize("kernel", NOISE)
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.4, 1.0])
def test_nothing_is_ever_nan(kernel, share, num_steps, grid_name):
    # On a grid that starts below 1, flow_sde bears little noise (its refusal is tested below).
    level = share * (0.03 if (kernel, grid_name) == ("flow_sde", "awm") else NOISE[kernel])
    table = step_table(kernel, sigma_grid(grid_name, num_steps, 3.0), level)
    for name in ("sigma", "step_size", "x", "velocity", "std", "diffusion"):
        column = getattr(table, name)
        assert column.dtype == torch.float64
        assert column.shape == (num_steps,)
        assert bool(torch.isfinite(column).all()), name
    steps = scorable(table)
    assert num_steps - 1 not in steps
    x = randn(len(steps), 4, dtype=torch.float32)
    mean = mean_of(table, steps, x, -x)
    std = table.std[steps]
    logp = transition_logp(kernel, mean + std[:, None].float() * x, mean, std)
    assert bool(torch.isfinite(logp).all())
    # Of the noise that was drawn: log S and a residual of a few S, whatever the step.
    assert bool((logp.abs() < 10 - math.log(MIN_STD)).all())


def test_a_grid_of_one_step():
    table = step_table("flow_sde", torch.tensor([1.0, 0.0]), 0.7)
    assert table.std.tolist() == [0.7]


@pytest.mark.parametrize(
    ("kernel", "level", "allowed"),
    [
        ("cps", 1.1, "from 0 to 1"),
        ("cps", -0.1, "from 0 to 1"),
        ("flow_sde", -0.7, "0 or more"),
        ("dance_sde", math.inf, "0 or more"),
        ("flow_sde", math.nan, "0 or more"),
        ("ode", 0.7, "allowed: 0,"),
    ],
)
def test_bad_noise_levels_are_refused(kernel, level, allowed):
    with pytest.raises(UserError, match=allowed) as error:
        step_table(kernel, sd3_grid(), level)
    assert f"noise_level = {level}" in str(error.value)
    assert repr(kernel) in str(error.value)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(UserError, match="did you mean 'flow_sde'"):
        step_table("flowsde", sd3_grid(), 0.7)


def test_noise_that_makes_a_step_diverge_is_refused():
    grid = sigma_grid("awm", 10, 3.0)
    with pytest.raises(UserError, match=r"state by -8\.52; allowed: at most about 0\.32,"):
        step_table("flow_sde", grid, 0.7)
    assert float(step_table("flow_sde", grid, 0.32).x[0]) > -1


@pytest.mark.parametrize(
    "sigmas",
    [[0.0, 0.5, 1.0], [1.0, 0.5, 0.5, 0.0], [1.2, 0.5, 0.0], [1.0, -0.1], [1.0]],
)
def test_what_is_no_grid_is_our_own_mistake(sigmas):
    with pytest.raises(AssertionError):
        step_table("ode", torch.tensor(sigmas), 0.0)


def exact_velocity(sigma):
    """(A, B) with E[eps - x0 | x] = A x + B for x0 ~ N(DATA_MEAN, DATA_STD^2)."""
    variance = (1 - sigma) ** 2 * DATA_STD**2 + sigma**2
    slope = (sigma - (1 - sigma) * DATA_STD**2) / variance
    return slope, -DATA_MEAN - slope * (1 - sigma) * DATA_MEAN


def terminal(kernel, level, num_steps):
    """Mean and variance of the samples of ``kernel``: exact, for every step is linear."""
    table = step_table(kernel, sigma_grid("linspace_shifted", num_steps, 3.0), level)
    mean, variance = 0.0, 1.0
    columns = (table.sigma, table.x, table.velocity, table.std)
    for sigma, x, v, std in zip(*(column.tolist() for column in columns), strict=True):
        slope, offset = exact_velocity(sigma)
        mean = x * mean + v * (slope * mean + offset)
        variance = (x + v * slope) ** 2 * variance + std**2
    return mean, variance


@pytest.mark.parametrize("kernel", SDE)
def test_6_samples_converge_to_the_data(kernel):
    results = [terminal(kernel, NOISE[kernel], num_steps) for num_steps in (20, 80, 320)]
    # An affine flow keeps the mean in every step, whatever its length.
    assert [mean for mean, _ in results] == pytest.approx([DATA_MEAN] * 3, abs=1e-5)
    errors = [abs(math.sqrt(variance) - DATA_STD) for _, variance in results]
    assert errors[2] < 0.015 * DATA_STD
    # First order: four times the steps, a quarter of the error.
    orders = [math.log(a / b, 4) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1, 1], abs=0.15)


@pytest.mark.parametrize("level", [0.3, 0.8])
def test_6_cps_loses_variance_for_good(level):
    ratios = [terminal("cps", level, steps)[1] / DATA_STD**2 for steps in (20, 80, 320, 10_000)]
    assert ratios == sorted(ratios)
    limit = (1 + math.cos(level * math.pi / 2)) / 2
    assert ratios[-1] == pytest.approx(limit, abs=0.005)
    assert limit < 0.95


@pytest.mark.parametrize("kernel", NOISE)
def test_6_drawn_samples_have_the_moments_of_the_recursion(kernel):
    count, num_steps = 20_000, 12
    table = step_table(kernel, sigma_grid("linspace_shifted", num_steps, 3.0), NOISE[kernel])
    x = randn(count, 1, seed=3)
    for step in range(num_steps):
        slope, offset = exact_velocity(float(table.sigma[step]))
        mean = mean_of(table, [step] * count, x, slope * x + offset)
        x = mean + table.std[step] * randn(count, 1, seed=100 + step)
    mean, variance = terminal(kernel, NOISE[kernel], num_steps)
    std = math.sqrt(variance)
    # Four standard errors: of the mean std / sqrt(n), of the deviation std / sqrt(2n).
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(count))
    assert float(x.std()) == pytest.approx(std, abs=4 * std / math.sqrt(2 * count))
