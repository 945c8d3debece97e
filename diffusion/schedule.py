"""Sigma grids by name, and diffusers' own integrators fed with them.

A grid has N+1 decreasing levels: N at which the network is asked, and a final 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.likelihoods import shifted

Grid = Literal["diffusers_default", "linspace_shifted", "awm"]
Scheduler = Literal["euler", "dpmpp_2m", "sa_solver"]

NUM_TRAIN_TIMESTEPS = 1000
NOISY_RANGE = (0.3, 0.9)
"""Noise levels between which sa_solver adds noise (AWM)."""


def sigma_grid(name: Grid, num_steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """Noise levels [num_steps + 1], float32, decreasing to 0.

    ``diffusers_default``: what ``StableDiffusion3Pipeline`` uses; its scheduler shifts the end
    points of the linspace once more than the levels.  ``linspace_shifted``: linspace(1, 0) shifted
    once, as the pipelines of FLUX and Qwen-Image do.  ``awm``: the first, started at 1 - 1e-3, and
    its last level moved to half the one before it, so that the last two steps both do work
    (official AWM code).

    ``terminal``: the level above 0 at which the first two end; ``None``: wherever the shift puts
    it.
    """
    if name == "linspace_shifted":
        levels = shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)
    else:
        levels = _diffusers_default(num_steps, shift)
    if terminal is not None:
        assert name != "awm", "the configuration refuses this"
        levels = _stretched(levels, terminal)
    if name == "awm":
        assert num_steps >= 2, "the configuration refuses this"
        levels[0] = 1 - 1e-3
        levels[-2] = levels[-3] / 2
    return levels.float()


def _diffusers_default(num_steps: int, shift: float) -> Tensor:
    lowest = torch.tensor(1 / NUM_TRAIN_TIMESTEPS, dtype=torch.float32)
    lowest = float(shifted(lowest, shift))
    ramp = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
    return torch.cat([shifted(ramp, shift), torch.zeros(1, dtype=torch.float64)])


def _stretched(levels: Tensor, terminal: float) -> Tensor:
    """``levels`` stretched about 1 until the last one above 0 is ``terminal``."""
    if len(levels) == 2:
        return levels  # it is 1, which stays where it is
    above = 1 - (1 - levels[:-1]) * (1 - terminal) / (1 - levels[-2])
    return torch.cat([above, levels[-1:]])


def build_scheduler(name: Scheduler, sigmas: Tensor, noise_level: float = 0.0) -> Any:
    """A diffusers scheduler that visits exactly ``sigmas`` [N + 1]; use with ``step``.

    ``set_timesteps`` of the multistep schedulers only makes grids of its own, so a fresh scheduler
    is given ours directly; ``euler`` is built with shift 1 because it would shift ours again.
    """
    scheduler = _CONSTRUCTORS[name](noise_level)
    if name == "euler":
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    else:
        scheduler.num_inference_steps = len(sigmas) - 1
        scheduler.sigmas = sigmas.float().cpu()
        scheduler.timesteps = scheduler.sigmas[:-1] * NUM_TRAIN_TIMESTEPS
    scheduler.set_begin_index(0)
    return scheduler


def step(
    scheduler: Any,
    index: int,
    velocity: Tensor,
    latents: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Latents at level ``index + 1`` from those at ``index``; row b draws from ``generators[b]``.

    ``velocity`` and ``latents`` [B, ...] float32.
    """
    sigma = scheduler.sigmas[index]
    is_stochastic = "SASolver" in type(scheduler).__name__
    if is_stochastic and index == len(scheduler.timesteps) - 1:
        # At sigma = 0 its exponents are infinite; their limit is the clean prediction.
        return latents - sigma * velocity
    extra = {"generator": list(generators)} if is_stochastic else {}
    timestep = scheduler.timesteps[index]
    return scheduler.step(velocity, timestep, latents, return_dict=False, **extra)[0]


def _euler(noise_level: float) -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    return FlowMatchEulerDiscreteScheduler(NUM_TRAIN_TIMESTEPS, shift=1.0)


def _dpmpp_2m(noise_level: float) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        NUM_TRAIN_TIMESTEPS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
    )


def _sa_solver(noise_level: float) -> Any:
    from diffusers.schedulers.scheduling_sasolver import SASolverScheduler

    low, high = (NUM_TRAIN_TIMESTEPS * level for level in NOISY_RANGE)
    return SASolverScheduler(
        NUM_TRAIN_TIMESTEPS,
        predictor_order=2,
        corrector_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        tau_func=lambda timestep: noise_level if low <= float(timestep) <= high else 0.0,
    )


_CONSTRUCTORS: dict[str, Callable[[float], Any]] = {
    "euler": _euler,
    "dpmpp_2m": _dpmpp_2m,
    "sa_solver": _sa_solver,
}
