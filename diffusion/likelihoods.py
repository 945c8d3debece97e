"""Flow-matching surrogate of the log-likelihood of a clean sample (AWM), as pure functions.

Xue et al. 2025, arXiv:2509.25050.  With x_t = (1-t) x0 + t eps, the target velocity is
v* = eps - x0, the error l = mean (v - v*)^2 over latent dimensions, and logp = -w(l, t).
Times: t in [0, 1], 1 is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from mmrl.errors import UserError

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
TimeSampler = Literal[
    "discrete", "discrete_wo_init", "discrete_with_init", "logit_normal", "uniform"
]

ERROR_FLOOR = 1e-10
"""e in the weightings: keeps sqrt(l) and l^(p-1) finite at l = 0."""

MIN_TIME = 0.01
"""Smallest time that logit_normal returns."""


def interpolate(x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = (1-t) x0 + t eps; ``time`` holds one value for each leading row."""
    t = time.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return (1 - t) * x0 + t * noise


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all but the first dimension of (a - b)^2, in float64: [rows]."""
    return (a.double() - b.double()).square().flatten(1).mean(dim=1)


def velocity_error(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """l = mean (v - (eps - x0))^2 over latent dimensions, float64 [rows]."""
    return mean_square(velocity, noise.double() - x0.double())


def implicit_error(
    velocity: Tensor, old: Tensor, target: Tensor, time: Tensor, beta: float
) -> Tensor:
    """Error of the policy v_b = v_old + beta (v - v_old), over |beta|; float64 [rows].

    In x0-prediction, x_t - t v_b, whose residual is t (v_b - v*): its mean square, divided by its
    detached mean absolute value (at least 1e-5).  beta > 0 is DiffusionNFT's positive policy,
    beta < 0 the negative one (Zheng et al. 2025, arXiv:2509.16117).
    """
    implied = old.double() + beta * (velocity.double() - old.double())
    residual = (time.double().view(-1, *[1] * (implied.ndim - 1)) * (implied - target)).flatten(1)
    normaliser = residual.detach().abs().mean(dim=1).clamp_min(1e-5)
    return residual.square().mean(dim=1) / (normaliser * abs(beta))


def weighted_error(error: Tensor, time: Tensor, weighting: Weighting, power: float) -> Tensor:
    """w(l, t) for l = ``error`` and t = ``time`` of equal shape, in float64.

    uniform: l;  t: t l;  t2: t^2 l;  huber: t (sqrt(l+e) - sqrt(e));
    ghuber: (t/p) ((l+e)^p - e^p) with p = ``power``.
    """
    error, t, e = error.double(), time.double(), ERROR_FLOOR
    if weighting == "uniform":
        return error
    if weighting == "t":
        return t * error
    if weighting == "t2":
        return t.square() * error
    if weighting == "huber":
        return t * ((error + e).sqrt() - e**0.5)
    if weighting == "ghuber":
        return (t / power) * ((error + e) ** power - e**power)
    raise UserError(f"weighting {weighting!r} is unknown; allowed: {get_args(Weighting)}")


def surrogate_logp(error: Tensor, time: Tensor, weighting: Weighting, power: float) -> Tensor:
    """logp = -w(l, t), float64, of the shape of ``error``."""
    return -weighted_error(error, time, weighting, power)


def shifted(time: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s-1) t): moves times towards noise for s > 1 and keeps 0 and 1."""
    return shift * time / (1 + (shift - 1) * time)


def trained_indices(
    sampler: TimeSampler, num_steps: int, fraction: float, num_times: int
) -> list[range]:
    """Ranges of grid indices, one for each time, of which a discrete sampler picks one each.

    The grid has ``num_steps`` positive levels; the leading ``int(num_steps * fraction)`` are in
    use.  Continuous samplers have none: ``[]``.  ``UserError`` if there are more times than levels.
    """
    if sampler not in ("discrete", "discrete_wo_init", "discrete_with_init"):
        return []
    stop = int(num_steps * fraction)
    start = 0 if sampler == "discrete" else 1
    drawn = num_times - (sampler == "discrete_with_init")
    if drawn > stop - start:
        raise UserError(
            f"likelihood.num_times = {num_times} exceeds the grid levels that time_sampler = "
            f"{sampler!r} can use with rollout.num_steps = {num_steps} and timestep_fraction = "
            f"{fraction}; allowed: at most {max(0, stop - start) + num_times - drawn}"
        )
    edges = [start + (stop - start) * i // drawn for i in range(drawn + 1)] if drawn else []
    strata = [range(low, high) for low, high in pairwise(edges)]
    return [range(0, 1), *strata] if drawn < num_times else strata


def draw_times(
    sampler: TimeSampler,
    generator: torch.Generator,
    num_times: int,
    *,
    grid: Sequence[float],
    fraction: float,
    shift: float,
) -> Tensor:
    """Noise levels t [num_times], float32, one for each stratum.

    ``grid``: sigmas of the rollout without the final 0, for the three discrete samplers.
    ``shift``: time shift of the two continuous ones.  ``logit_normal``: sigmoid of a stratified
    normal, shifted, at least 0.01, in random order.  ``uniform``: stratified in [0.2, 1), shifted.
    """
    strata = trained_indices(sampler, len(grid), fraction, num_times)
    if strata:
        return torch.tensor([grid[_pick(stratum, generator)] for stratum in strata])
    unit = torch.rand(num_times, dtype=torch.float64, generator=generator)
    unit = (torch.arange(num_times) + unit) / num_times
    if sampler == "uniform":
        return shifted(0.2 + 0.8 * unit, shift).float()
    unit = unit[torch.randperm(num_times, generator=generator)]
    return logit_normal(unit, shift).float()


def logit_normal(unit: Tensor, shift: float) -> Tensor:
    """Shifted sigmoid of the normal quantile of ``unit`` in [0, 1], clamped to [0.01, 1]."""
    # The quantile of exactly 0 or 1 is infinite; half a float32 step inside it is not.
    inside = unit.double().clamp(2**-25, 1 - 2**-25)
    return shifted(torch.special.ndtri(inside).sigmoid(), shift).clamp(MIN_TIME, 1.0)


def _pick(stratum: range, generator: torch.Generator) -> int:
    return int(torch.randint(stratum.start, stratum.stop, (), generator=generator))
