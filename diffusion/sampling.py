"""From noise to clean latents along the probability-flow ODE (or SA-Solver's SDE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion import noise, schedule
from diffusion.config import RolloutConfig
from mmrl.noise import NoiseKey

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Guided velocity of latents [B, ...] at levels [B], for the prompts of one batch."""


def initial_noise(keys: Sequence[NoiseKey], shape: Sequence[int], shared_by: str) -> Tensor:
    """Pure noise [B, *shape] on the CPU; ``shared_by``: "group" gives a prompt's samples one."""
    if shared_by == "group":
        keys = [key.of_group() for key in keys]
    return noise.normal(keys, "initial", shape)


def integrate(
    keys: Sequence[NoiseKey], sampling: RolloutConfig, velocity: Velocity, latents: Tensor
) -> Tensor:
    """Clean latents [B, ...] float32 of initial ones, by the scheduler of ``sampling``."""
    sigmas = sampling.sigmas
    scheduler = schedule.build_scheduler(sampling.scheduler, sigmas, sampling.noise_level)
    generators = [key.generator("sampler") for key in keys]
    for index, sigma in enumerate(sigmas[:-1].tolist()):
        asked = velocity(latents, torch.full((len(latents),), sigma, device=latents.device))
        latents = schedule.step(scheduler, index, asked, latents, generators)
    return latents
