"""Denoising steps as pure functions: mean, noise and log-density of one transition.

Convention: x_sigma = (1 - sigma) x0 + sigma eps, sigma in [0, 1], 1 = noise; the network predicts
v = eps - x0, so x0_hat = x - sigma v and x1_hat = x + (1 - sigma) v.  A step falls by
h = sigma - sigma' > 0 and draws x' ~ N(mu, S^2 I).  With the score -x1_hat / sigma, every diffusion
coefficient g gives an SDE with the marginals of the probability-flow ODE:

    mu = x - [v + g^2 / (2 sigma) x1_hat] h,    S = g sqrt(h)                                    (1)

``ode``: g = 0, Euler's step.  ``flow_sde``: g = a sqrt(sigma / (1 - sigma)), Flow-GRPO (Liu et al.
2025, arXiv:2505.05470).  ``dance_sde``: g = eta, DanceGRPO (Xue et al. 2025, arXiv:2505.07818).
``cps``: coefficients-preserving sampling (Wang and Yu 2025, arXiv:2509.05952), which splits the
noise that belongs to sigma' into predicted and fresh noise instead of discretising an SDE:

    mu = (1 - sigma') x0_hat + sqrt(sigma'^2 - S^2) x1_hat,    S = sigma' sin(eta pi / 2)

All are linear in x and v, so a kernel is a table of coefficients, one row for each step.  Means of
two policies at one state differ by ``velocity * (v_a - v_b)``, and the divergence of the
transitions is that gap over 2 S^2 (``mmrl.divergences.gaussian_kl``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.likelihoods import mean_square
from mmrl.errors import UserError, require
from mmrl.schema import nearest

Kernel = Literal["ode", "flow_sde", "dance_sde", "cps"]

LARGEST_NOISE: dict[str, float] = {"ode": 0.0, "cps": 1.0}
"""Upper limit of the noise level where a kernel has one."""

MIN_STD = 0.01
"""Steps with less noise than this are not scored.

A residual is divided by S.  Near 1, bfloat16 samples are 2^-7 = 0.0078 apart, so with a smaller S
the log-density would measure how the sample was rounded.
"""


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """The transitions between the N+1 levels of a grid; each field [N] float64 on the CPU.

    ``sigma``: level at which the network is asked.  ``step_size``: h = -dt > 0.  ``x`` and
    ``velocity``: mu = x * state + velocity * v.  ``std``: S.  ``diffusion``: g with S = g sqrt(h);
    S itself for ``cps``, which has no g; 0 for ``ode``.
    """

    sigma: Tensor
    step_size: Tensor
    x: Tensor
    velocity: Tensor
    std: Tensor
    diffusion: Tensor


def step_table(kernel: Kernel, sigmas: Tensor, noise_level: float) -> StepTable:
    """Coefficients of ``kernel`` for the decreasing levels ``sigmas`` [N + 1] in [0, 1].

    ``noise_level``: a of ``flow_sde``, eta of ``dance_sde`` and ``cps``; every kernel is Euler's
    step at 0.  ``UserError`` for an unknown kernel, or a level that is negative, not finite, above
    1 for ``cps``, other than 0 for ``ode``, or so large on this grid that an SDE step diverges.
    """
    _check_noise(kernel, noise_level)
    grid = sigmas.detach().double().cpu()
    assert grid.ndim == 1, "a grid is a vector"
    assert len(grid) > 1, "a grid has at least two levels"
    assert bool((grid.diff() < 0).all()), "a grid decreases"
    assert 0 <= grid[-1] < grid[0] <= 1, "noise levels lie in [0, 1]"
    if kernel == "cps":
        return _cps_table(grid, noise_level)
    table = _sde_table(grid, _diffusion(kernel, grid, noise_level))
    _check_stable(kernel, table, noise_level)
    return table


def _check_noise(kernel: str, noise_level: float) -> None:
    if kernel not in get_args(Kernel):
        raise UserError(f"kernel {kernel!r} is unknown; {nearest(kernel, get_args(Kernel))}")
    largest = LARGEST_NOISE.get(kernel, math.inf)
    if not (math.isfinite(noise_level) and 0 <= noise_level <= largest):
        limits = f"from 0 to {largest:g}" if largest < math.inf else "0 or more"
        allowed = limits if largest > 0 else "0, because its steps add no noise"
        raise UserError(f"noise_level = {noise_level} with kernel {kernel!r}; allowed: {allowed}")


def _check_stable(kernel: str, table: StepTable, noise_level: float) -> None:
    """Refuse a step that overshoots so far that it amplifies the state: a factor of x below -1.

    It is the stability limit of explicit Euler steps.  ``flow_sde`` passes it on a grid that starts
    just below 1, where g^2 is about a^2 / (1 - sigma).
    """
    factor, step = float(table.x.min()), int(table.x.argmin())
    if factor < -1:
        # 1 - factor grows with the square of the noise level.
        largest = noise_level * math.sqrt(2 / (1 - factor))
        raise UserError(
            f"noise_level = {noise_level} with kernel {kernel!r} is too large for this grid: step "
            f"{step}, from sigma = {float(table.sigma[step]):.4g}, would multiply the state by "
            f"{factor:.3g}; allowed: at most about {largest:.2g}, or a grid that starts at 1"
        )


def _diffusion(kernel: Kernel, grid: Tensor, noise_level: float) -> Tensor:
    """g of every step, [N]."""
    sigma = grid[:-1]
    if kernel != "flow_sde":
        # `ode` has passed the check above, so its level is 0.
        return torch.full_like(sigma, noise_level)
    # 1 - sigma vanishes at pure noise; the official code puts the second level there.
    return noise_level * (sigma / (1 - torch.where(sigma == 1, grid[1], sigma))).sqrt()


def _sde_table(grid: Tensor, diffusion: Tensor) -> StepTable:
    """Equation (1) with the terms of x and of v collected."""
    sigma, h = grid[:-1], -grid.diff()
    drift = diffusion.square() / (2 * sigma)
    return StepTable(
        sigma=sigma,
        step_size=h,
        x=1 - drift * h,
        velocity=-(1 + drift * (1 - sigma)) * h,
        std=diffusion * h.sqrt(),
        diffusion=diffusion,
    )


def _cps_table(grid: Tensor, noise_level: float) -> StepTable:
    """Coefficients of ``cps``, of which no step adds more noise than belongs to its level.

    It discretises no SDE: with eta fixed, more steps do not lead to the marginals of the flow.  x0
    is predicted anew from ever fresher noise, and for Gaussian data the variance of the samples
    tends to (1 + cos(eta pi / 2)) / 2 times that of the data.
    """
    sigma, after = grid[:-1], grid[1:]
    angle = noise_level * math.pi / 2
    # sqrt(sigma'^2 - S^2), without the cancellation of that form.
    predicted, std = after * math.cos(angle), after * math.sin(angle)
    return StepTable(
        sigma=sigma,
        step_size=sigma - after,
        x=1 - after + predicted,
        velocity=predicted * (1 - sigma) - (1 - after) * sigma,
        std=std,
        diffusion=std,
    )


def scorable(table: StepTable) -> list[int]:
    """Steps whose log-density can be trained on: all but those that ``unscorable`` names."""
    excluded = unscorable(table)
    return [step for step in range(len(table.std)) if step not in excluded]


def unscorable(table: StepTable) -> dict[int, str]:
    """Steps that have no usable log-density, each with the reason in words for a person.

    They are those without noise, the one that ends at the clean sample (sigma' = 0), and those with
    0 < S < ``MIN_STD``.
    """
    rows = zip(table.sigma.tolist(), table.step_size.tolist(), table.std.tolist(), strict=True)
    reasons = {step: _why_unscorable(*row) for step, row in enumerate(rows)}
    return {step: reason for step, reason in reasons.items() if reason}


def _why_unscorable(sigma: float, step_size: float, std: float) -> str:
    if std == 0:
        return "adds no noise (S = 0)"
    if sigma == step_size:
        return "ends at sigma = 0"
    return f"adds too little noise (S = {std:.2g} < {MIN_STD})" if std < MIN_STD else ""


def transition_mean(x: Tensor, velocity: Tensor, coef_x: Tensor, coef_v: Tensor) -> Tensor:
    """mu = coef_x x + coef_v v: states and velocities [R, ...], coefficients [R], one for each row.

    Computed and returned in float32, or in float64 if a state or velocity is float64.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, velocity.dtype), torch.float32)
    x, velocity = x.to(dtype), velocity.to(dtype)
    return _per_row(coef_x, x) * x + _per_row(coef_v, velocity) * velocity


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """``values`` [R] shaped to broadcast over the latent dimensions of ``like`` [R, ...]."""
    assert values.shape == like.shape[:1], "one coefficient for each row"
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def transition_logp(kernel: Kernel, sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of the transition in the form published for ``kernel``, [R] float64.

    ``cps_logp`` for ``cps``, ``gaussian_logp`` for the rest.  A clip range belongs to a form: the
    two differ by the factor 2 S^2, so a range tuned for one is not valid for the other.
    """
    return cps_logp(sample, mean) if kernel == "cps" else gaussian_logp(sample, mean, std)


def gaussian_logp(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean over latent dimensions of log N(x'; mu, S^2), [R] float64, in nats per dimension.

        -(x' - mu)^2 / (2 S^2) - log S - log(2 pi) / 2

    ``sample`` x' and ``mean`` [R, ...], ``std`` [R] > 0 (``ValueError`` otherwise).  The sample is
    what was drawn, no function of the policy: no gradient flows through it.
    """
    require(bool((std > 0).all()), "gaussian_logp: std must be positive; this step has no density")
    std = std.to(mean.device, torch.float64)
    residual = mean_square(sample.detach(), mean)
    return -residual / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)


def cps_logp(sample: Tensor, mean: Tensor) -> Tensor:
    """Mean over latent dimensions of -(x' - mu)^2, [R] float64 (arXiv:2509.05952).

    Neither 1 / (2 S^2) nor constants; like ``gaussian_logp``, no gradient through ``sample``.
    """
    return -mean_square(sample.detach(), mean)
