"""Decisions of stochastic samplers: denoising transitions (Flow-GRPO and its relatives).

A sample keeps the states before and after its trained steps.  A state is rounded to the dtype in
which it is stored before it is scored, so that the score belongs to the stored state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion import noise
from diffusion.config import Config, TransitionConfig
from diffusion.decisions import Drawn, Rows, fold
from diffusion.kernels import Kernel, cps_logp, transition_logp, transition_mean
from diffusion.likelihoods import mean_square
from diffusion.sampling import Velocity
from mmrl.noise import NoiseKey
from mmrl.types import DTYPES


@dataclass(frozen=True, kw_only=True)
class Path:
    """A sample's trained ``steps`` [K], and the states of levels ``levels`` [M], [M, C, h, w]."""

    steps: Tensor
    levels: Tensor
    states: Tensor

    def at(self, levels: Tensor) -> Tensor:
        """States of some kept levels."""
        return self.states[torch.searchsorted(self.levels, levels)]


@dataclass(frozen=True, kw_only=True)
class TransitionBatch:
    """Payload of a micro-batch: states ``before`` and ``after`` [B, K, ...], ``steps`` [B, K]."""

    before: Tensor
    after: Tensor
    steps: Tensor
    keys: tuple[NoiseKey, ...]


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Of each row: the state ``after``, coefficients of the mean, and the step's numbers [R]."""

    after: Tensor
    x: Tensor
    velocity: Tensor
    std: Tensor
    diffusion: Tensor
    step_size: Tensor


class Transition:
    """See ``diffusion.decisions.Decisions``."""

    guided = True

    def __init__(self, config: Config, likelihood: TransitionConfig) -> None:
        self._likelihood = likelihood
        self._sigmas = config.rollout.sigmas
        self._tables = config.step_tables(likelihood)
        self._dtype = DTYPES[likelihood.state_dtype]
        self.num_decisions = likelihood.steps.count(self._tables)

    def draw(self, keys: Sequence[NoiseKey], velocity: Velocity, latents: Tensor) -> Drawn:
        """Samples by the kernel where it adds noise, and by Euler's steps elsewhere."""
        trained = [self.steps(key) for key in keys]
        noisy = [self._likelihood.steps.noisy(self._tables, steps) for steps in trained]
        states = self._rounded(latents)
        path, logp = [states.cpu()], [[] for _ in keys]
        for step, sigma in enumerate(self._sigmas[:-1].tolist()):
            asked = velocity(states, torch.full((len(keys),), sigma, device=states.device))
            chosen = [step in steps for steps in trained]
            mean, std = self._moments(step, states, asked, [step in steps for steps in noisy])
            states = self._rounded(mean + self._noise(step, keys, std, mean))
            path.append(states.cpu())
            rows = [row for row, is_trained in enumerate(chosen) if is_trained]
            if rows:
                scores = _logp(self._tables.kernel, states[rows], mean[rows], std[rows])
                for row, score in zip(rows, scores.cpu(), strict=True):
                    logp[row].append(score)
        records = [self._record(steps, path, row) for row, steps in enumerate(trained)]
        return Drawn(
            latents=states,
            records=records,
            logp=torch.stack([torch.stack(scores) for scores in logp]),
        )

    def pack(self, records: Sequence[Any]) -> tuple[Path, ...]:
        """``records``: paths."""
        return tuple(records)

    def save(self, payload: tuple[Path, ...]) -> dict[str, Tensor]:
        """``steps`` [G, K]; ``levels`` and ``states`` of all paths, M of each in ``counts`` [G]."""
        return {
            "steps": torch.stack([path.steps for path in payload]),
            "counts": torch.tensor([len(path.levels) for path in payload]),
            "levels": torch.cat([path.levels for path in payload]),
            "states": torch.cat([path.states for path in payload]),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> tuple[Path, ...]:
        """Inverse of ``save``."""
        counts = tensors["counts"].tolist()
        levels, states = (tensors[name].split(counts) for name in ("levels", "states"))
        rows = zip(tensors["steps"], levels, states, strict=True)
        return tuple(Path(steps=s, levels=at, states=x) for s, at, x in rows)

    def collate(
        self, rows: Sequence[tuple[Any, int, NoiseKey]], decisions: slice
    ) -> TransitionBatch:
        """The transitions ``decisions`` of samples."""
        paths = [payload[index] for payload, index, _ in rows]
        steps = [path.steps[decisions] for path in paths]
        pairs = list(zip(paths, steps, strict=True))
        return TransitionBatch(
            before=torch.stack([path.at(chosen) for path, chosen in pairs]),
            after=torch.stack([path.at(chosen + 1) for path, chosen in pairs]),
            steps=torch.stack(steps),
            keys=tuple(key for _, _, key in rows),
        )

    def fold(self, payload: TransitionBatch, device: torch.device) -> Rows:
        """States before the transitions, and what they are scored with."""
        steps, table = fold(payload.steps), self._tables.noisy

        def of_steps(values: Tensor) -> Tensor:
            return values[steps].to(device)

        return Rows(
            states=fold(payload.before).to(device).float(),
            sigma=self._sigmas[steps].to(device),
            keys=payload.keys,
            detail=Transitions(
                after=fold(payload.after).to(device).float(),
                x=of_steps(table.x),
                velocity=of_steps(table.velocity),
                std=of_steps(table.std),
                diffusion=of_steps(table.diffusion),
                step_size=of_steps(table.step_size),
            ),
        )

    def terms(
        self, rows: Rows, velocity: Tensor, others: Mapping[str, Tensor], needs: frozenset[str]
    ) -> dict[str, Tensor]:
        """Log-densities, and gaps between means, which are gaps of velocities times a number."""
        detail: Transitions = rows.detail

        def score(of: Tensor) -> Tensor:
            mean = transition_mean(rows.states, of, detail.x, detail.velocity)
            return _logp(self._tables.kernel, detail.after, mean, detail.std)

        found = {
            "logp": score(velocity),
            "sigma": rows.sigma,
            "step_size": detail.step_size,
            "step_std": detail.std,
            "diffusion": detail.diffusion,
        }
        if "logp_ref" in needs:
            found["logp_ref"] = score(others["reference"])
        for policy, other in {"old": velocity.detach(), **others}.items():
            gap = mean_square(velocity, other)
            if f"velocity_gap_{policy}" in needs:
                found[f"velocity_gap_{policy}"] = gap
            if f"mean_gap_{policy}" in needs:
                found[f"mean_gap_{policy}"] = detail.velocity.square() * gap
        return found

    def steps(self, key: NoiseKey) -> list[int]:
        """Trained steps of a sample, the same for all that share them."""
        config = self._likelihood.steps
        return config.draw(self._tables, key.shared_generator("steps", config.shared_by))

    def _moments(
        self, step: int, states: Tensor, velocity: Tensor, noisy: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Mean [B, ...] float32 and deviation [B] of one step."""
        mask = torch.tensor(noisy)

        def of_rows(name: str) -> Tensor:
            with_noise, without = (
                getattr(table, name)[step] for table in (self._tables.noisy, self._tables.ode)
            )
            return torch.where(mask, with_noise, without).to(states.device)

        return transition_mean(states, velocity, of_rows("x"), of_rows("velocity")), of_rows("std")

    def _noise(self, step: int, keys: Sequence[NoiseKey], std: Tensor, like: Tensor) -> Tensor:
        """S z [B, ...]; nothing is drawn for rows without noise."""
        added = torch.zeros_like(like)
        rows = [row for row, level in enumerate(std.tolist()) if level > 0]
        if rows:
            z = noise.normal([keys[row] for row in rows], f"transition {step}", like.shape[1:])
            added[rows] = std[rows].to(like).view(-1, 1, 1, 1) * z.to(like)
        return added

    def _rounded(self, states: Tensor) -> Tensor:
        return states.to(self._dtype).float()

    def _record(self, steps: list[int], path: Sequence[Tensor], row: int) -> Path:
        levels = sorted({level for step in steps for level in (step, step + 1)})
        states = torch.stack([path[level][row] for level in levels])
        return Path(
            steps=torch.tensor(steps), levels=torch.tensor(levels), states=states.to(self._dtype)
        )


def _logp(kernel: Kernel, after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[R] float64; for an ODE, which has no density, minus the squared distance to its step."""
    return cps_logp(after, mean) if kernel == "ode" else transition_logp(kernel, after, mean, std)
