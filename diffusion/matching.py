"""Decisions of matching methods: noise levels drawn for a clean sample (AWM, DiffusionNFT).

A sample is its clean latent x0, whatever sampler drew it.  Levels t and noise eps follow from
(seed, step, prompt, sample), so every evaluation of a sample (policy, reference, averages, later
epochs) sees the same draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion import noise, sampling
from diffusion.config import Config, FlowMatchingConfig
from diffusion.decisions import Drawn, Rows, fold
from diffusion.likelihoods import (
    draw_times,
    implicit_error,
    interpolate,
    mean_square,
    surrogate_logp,
    velocity_error,
)
from diffusion.sampling import Velocity
from mmrl.noise import NoiseKey


@dataclass(frozen=True, kw_only=True)
class CleanLatents:
    """Payload of a group: ``x0`` [G, C, h, w] float32 on the CPU, as sampled."""

    x0: Tensor

    @staticmethod
    def pack(records: Sequence[Tensor]) -> CleanLatents:
        """Of samples' clean latents [C, h, w]."""
        return CleanLatents(x0=torch.stack(list(records)))


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """Payload of a micro-batch: ``x0`` [B, C, h, w], ``times`` and ``noise`` [B, K, ...]."""

    x0: Tensor
    times: Tensor
    noise: Tensor
    keys: tuple[NoiseKey, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two ends of each row's straight path, [R, C, h, w]."""

    x0: Tensor
    noise: Tensor


class FlowMatching:
    """See ``diffusion.decisions.Decisions``."""

    guided = False

    def __init__(self, config: Config, likelihood: FlowMatchingConfig) -> None:
        self._likelihood = likelihood
        self._rollout = config.rollout
        self.num_decisions = likelihood.num_times

    def draw(self, keys: Sequence[NoiseKey], velocity: Velocity, latents: Tensor) -> Drawn:
        """Samples by the rollout's scheduler."""
        clean = sampling.integrate(keys, self._rollout, velocity, latents)
        return Drawn(latents=clean, records=list(clean.cpu()))

    def pack(self, records: Sequence[Any]) -> CleanLatents:
        """``records``: clean latents."""
        return CleanLatents.pack(records)

    def save(self, payload: CleanLatents) -> dict[str, Tensor]:
        """``x0`` [G, C, h, w]."""
        return {"x0": payload.x0}

    def load(self, tensors: Mapping[str, Tensor]) -> CleanLatents:
        """Inverse of ``save``."""
        return CleanLatents(x0=tensors["x0"])

    def collate(self, rows: Sequence[tuple[Any, int, NoiseKey]], decisions: slice) -> FlowBatch:
        """The levels ``decisions`` of samples, with their noise."""
        keys = tuple(key for _, _, key in rows)
        x0 = torch.stack([payload.x0[index] for payload, index, _ in rows])
        # All levels are drawn, whichever are asked for: each has its own place in the stream.
        eps = noise.normal(keys, "likelihood", (self.num_decisions, *x0.shape[1:]))
        times = torch.stack([self.times(key) for key in keys])
        return FlowBatch(x0=x0, times=times[:, decisions], noise=eps[:, decisions], keys=keys)

    def fold(self, payload: FlowBatch, device: torch.device) -> Rows:
        """x_t = (1 - t) x0 + t eps of every level."""
        x0 = payload.x0.to(device).repeat(payload.times.shape[1], 1, 1, 1)
        eps, times = fold(payload.noise).to(device), fold(payload.times).to(device)
        return Rows(
            states=interpolate(x0, eps, times),
            sigma=times,
            keys=payload.keys,
            detail=Pair(x0=x0, noise=eps),
        )

    def terms(
        self, rows: Rows, velocity: Tensor, others: Mapping[str, Tensor], needs: frozenset[str]
    ) -> dict[str, Tensor]:
        """logp = -w(l, t), and the errors of the implicit policies."""
        likelihood, pair = self._likelihood, rows.detail
        error = velocity_error(velocity, pair.x0, pair.noise)
        logp = surrogate_logp(error, rows.sigma, likelihood.weighting, likelihood.ghuber_power)
        found = {"logp": logp, "sigma": rows.sigma}
        for name, sign in (("implicit_positive", 1.0), ("implicit_negative", -1.0)):
            if name in needs:
                beta = sign * likelihood.implicit_beta
                target = pair.noise.double() - pair.x0.double()
                found[name] = implicit_error(velocity, others["ema"], target, rows.sigma, beta)
        for policy in ("reference", "ema"):
            if f"velocity_gap_{policy}" in needs:
                found[f"velocity_gap_{policy}"] = mean_square(velocity, others[policy])
        return found

    def times(self, key: NoiseKey) -> Tensor:
        """Noise levels [K] of a sample, the same for all that share them."""
        likelihood = self._likelihood
        return draw_times(
            likelihood.time_sampler,
            key.shared_generator("times", likelihood.times_shared_by),
            likelihood.num_times,
            grid=self._rollout.sigmas[:-1].tolist(),
            fraction=likelihood.timestep_fraction,
            shift=likelihood.shift,
        )
