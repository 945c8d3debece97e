"""Functionals of a law of rewards that stand in place of its mean, in one form.

    d rho / d theta = E[ A(R) d log pi / d theta ],      A: influence function of rho at the law

Spectral functionals weigh quantiles, rho = int phi(u) F^-1(u) du with int phi = 1, and have
A'(x) = phi(F(x)).  The entropic one and mean less variance are not spectral; their ``spectrum`` is
A' at the u-quantile of the law, which is what the others' is too.

    mean          phi = 1                                       A = x
    cvar          phi = 1{u < alpha} / alpha                    A = -(q - x)^+ / alpha
    rvar          phi = 1{alpha < u < beta} / (beta - alpha)    A = -((q_b - x)^+ - (q_a - x)^+)
                                                                    / (beta - alpha)
    mixed_var     (omega cvar + rvar) / (omega + 1)             RiskPO's (arXiv:2510.00911)
    pass_at_k     phi = k u^(k - 1)                             mean of the best of k
    entropic      log E exp(c R) / c                            A = exp(c x) / (c E exp(c R))
    mean_variance mu - c var                                    A = x - c (x - mu)^2

A is known up to a constant.  Rewards are [..., M], each row a law with equal weights or ``weights``
[..., M] that sum to 1; everything is float64 and rows are independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from mmrl.advantages._groups import others
from mmrl.schema import StrictModel

Name = Literal["mean", "cvar", "rvar", "mixed_var", "pass_at_k", "entropic", "mean_variance"]

Baseline = Literal["none", "mean", "leave_one_out"]


class Risk(Protocol):
    """A functional of the law of rewards."""

    def value(self, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """[...] rho of each law."""
        ...

    def advantage(self, points: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """[..., n] influence function of each law at ``points`` [..., n], up to a constant."""
        ...

    def spectrum(self, levels: Tensor, rewards: Tensor) -> Tensor:
        """[..., n] slope of the influence function at the quantiles ``levels`` [n] in (0, 1)."""
        ...


@dataclass(frozen=True)
class Piecewise:
    """phi is ``slopes[l]`` between ``levels[l - 1]`` and ``levels[l]``; levels ascend in (0, 1)."""

    levels: tuple[float, ...]
    slopes: tuple[float, ...]

    def value(self, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``."""
        edges = (0.0, *self.levels, 1.0)
        atoms, up_to = _law(rewards, weights)
        share = torch.zeros_like(up_to)
        for slope, low, high in zip(self.slopes, edges[:-1], edges[1:], strict=True):
            share = share + slope * (up_to.clamp(max=high) - low).clamp(min=0)
        return (_steps(share) * atoms).sum(-1)

    def advantage(self, points: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``; 0 at the top where phi is 0 there."""
        levels = torch.tensor(self.levels, dtype=torch.float64)
        return self.at(points, quantiles(levels, rewards, weights))

    def at(self, points: Tensor, thresholds: Tensor) -> Tensor:
        """The influence function of a law with these quantiles [..., L] at ``levels``."""
        found = self.slopes[-1] * points
        for i, (below, above) in enumerate(zip(self.slopes[:-1], self.slopes[1:], strict=True)):
            found = found - (below - above) * (thresholds[..., i, None] - points).clamp(min=0)
        return found

    def spectrum(self, levels: Tensor, rewards: Tensor) -> Tensor:
        """As in ``Risk``."""
        edges = torch.tensor(self.levels, dtype=torch.float64)
        slopes = torch.tensor(self.slopes, dtype=torch.float64)
        found = slopes[torch.bucketize(levels.double(), edges, right=True)]
        return found.expand(*rewards.shape[:-1], -1)


@dataclass(frozen=True)
class Power:
    """phi = k u^(k - 1), k above 1."""

    k: int

    def value(self, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``; of the law that gives the samples equal weights, so above the mean over
        draws of k different ones."""
        atoms, up_to = _law(rewards, weights)
        return (_steps(up_to**self.k) * atoms).sum(-1)

    def advantage(self, points: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``; 0 at the worst reward of the law and below."""
        atoms, up_to = _law(rewards, weights)
        # Between two atoms F is constant: A rises there by phi(F) times the distance.
        slopes = self.k * up_to ** (self.k - 1)
        heights = torch.nn.functional.pad(
            (slopes[..., :-1] * atoms.diff(dim=-1)).cumsum(-1), (1, 0)
        )
        place = torch.searchsorted(atoms, points.contiguous(), right=True) - 1
        base, slope, atom = (x.gather(-1, place.clamp(min=0)) for x in (heights, slopes, atoms))
        return torch.where(place < 0, 0.0, base + slope * (points - atom))

    def spectrum(self, levels: Tensor, rewards: Tensor) -> Tensor:
        """As in ``Risk``."""
        found = self.k * levels.double() ** (self.k - 1)
        return found.expand(*rewards.shape[:-1], -1)


@dataclass(frozen=True)
class Entropic:
    """``rate`` below 0 fears bad rewards, above 0 seeks good ones."""

    rate: float

    def value(self, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``."""
        return self._log_mean(rewards, weights) / self.rate

    def advantage(self, points: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``."""
        scaled = self.rate * points - self._log_mean(rewards, weights)[..., None]
        return scaled.exp() / self.rate

    def spectrum(self, levels: Tensor, rewards: Tensor) -> Tensor:
        """As in ``Risk``."""
        return self.rate * self.advantage(quantiles(levels, rewards), rewards)

    def _log_mean(self, rewards: Tensor, weights: Tensor | None) -> Tensor:
        return (self.rate * rewards + _weights(rewards, weights).log()).logsumexp(-1)


@dataclass(frozen=True)
class MeanVariance:
    """Mean less ``penalty`` times the variance; not monotone in a reward far above the mean."""

    penalty: float

    def value(self, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``."""
        weights = _weights(rewards, weights)
        mean = (weights * rewards).sum(-1)
        return mean - self.penalty * (weights * (rewards - mean[..., None]) ** 2).sum(-1)

    def advantage(self, points: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``."""
        mean = (_weights(rewards, weights) * rewards).sum(-1, keepdim=True)
        return points - self.penalty * (points - mean) ** 2

    def spectrum(self, levels: Tensor, rewards: Tensor) -> Tensor:
        """As in ``Risk``."""
        gap = quantiles(levels, rewards) - rewards.mean(-1, keepdim=True)
        return 1 - 2 * self.penalty * gap


@dataclass(frozen=True)
class Mirrored:
    """-rho(-R): what ``risk`` does to the lower tail is done to the upper one."""

    risk: Risk

    def value(self, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``."""
        return -self.risk.value(-rewards, weights)

    def advantage(self, points: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
        """As in ``Risk``."""
        return -self.risk.advantage(-points, -rewards, weights)

    def spectrum(self, levels: Tensor, rewards: Tensor) -> Tensor:
        """As in ``Risk``."""
        return self.risk.spectrum(1 - levels, -rewards)


MEAN = Piecewise((), (1.0,))


def cvar(alpha: float) -> Piecewise:
    """Mean of the worst ``alpha``."""
    return Piecewise((alpha,), (1 / alpha, 0.0))


def rvar(alpha: float, beta: float) -> Piecewise:
    """Mean between two quantiles."""
    return Piecewise((alpha, beta), (0.0, 1 / (beta - alpha), 0.0))


def mixed_var(alpha: float, beta: float, omega: float) -> Piecewise:
    """(omega CVaR_alpha + RVaR_alpha:beta) / (omega + 1)."""
    parts = (omega / alpha, 1 / (beta - alpha), 0.0)
    return Piecewise((alpha, beta), tuple(part / (omega + 1) for part in parts))


def quantiles(levels: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """[..., n] least reward of each law up to which it has at least ``levels`` [n]."""
    atoms, up_to = _law(rewards, weights)
    wanted = levels.double().expand(*rewards.shape[:-1], -1).contiguous()
    place = torch.searchsorted(up_to, wanted).clamp(max=rewards.shape[-1] - 1)
    return atoms.gather(-1, place)


def tracked(thresholds: Tensor, levels: Tensor, rewards: Tensor, rate: float) -> Tensor:
    """Quantiles [L] one step nearer to those of ``rewards`` [M] at ``levels`` [L].

    q <- q + rate (s - mean 1{R < q})
    """
    below = (rewards < thresholds[:, None]).double().mean(1)
    return thresholds + rate * (levels - below)


def _law(rewards: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards [..., M] in ascending order, and the probability up to each."""
    atoms, order = rewards.sort(-1)
    size = rewards.shape[-1]
    if weights is not None:
        return atoms, weights.gather(-1, order).cumsum(-1)
    # Exact fractions: a sum of 1 / M could fall short of a level that it meets.
    counts = torch.arange(1, size + 1, dtype=torch.float64, device=rewards.device) / size
    return atoms, counts.expand(rewards.shape).contiguous()


def _steps(values: Tensor) -> Tensor:
    """[..., M] by how much each of ``values`` exceeds the one before it, the first 0."""
    return values.diff(dim=-1, prepend=torch.zeros_like(values[..., :1]))


def _weights(rewards: Tensor, weights: Tensor | None) -> Tensor:
    return torch.full_like(rewards, 1 / rewards.shape[-1]) if weights is None else weights


def credit(risk: Risk, rewards: Tensor, baseline: Baseline) -> Tensor:
    """[n] influence of each of n rewards on ``risk``, before a mean is taken off."""
    if baseline != "leave_one_out":
        return risk.advantage(rewards, rewards)
    if len(rewards) < 2 or bool(rewards.min() == rewards.max()):
        return torch.zeros_like(rewards)
    law = others(rewards)
    own = risk.advantage(rewards[:, None], law)[:, 0]
    return own - risk.advantage(law, law).mean(1)


class LevelsConfig(StrictModel):
    """Two levels of the law of rewards, and how much more the tail below the lower one counts."""

    alpha: float = Field(default=0.2, gt=0, lt=1, description="Lower level (RiskPO: 0.2).")
    beta: float = Field(
        default=0.8, gt=0, lt=1, description="Upper level, above alpha (RiskPO: 0.8, also 0.9)."
    )
    omega: float = Field(default=1.5, ge=0, description="Weight of the tail (RiskPO: 1.5).")

    @field_validator("beta")
    @classmethod
    def _above_alpha(cls, value: float, info: ValidationInfo) -> float:
        alpha = info.data.get("alpha", 0.0)
        if not value > alpha:
            raise ValueError(f"should be greater than alpha, {alpha:g}")
        return value

    @property
    def levels(self) -> Tensor:
        """[2] float64."""
        return torch.tensor([self.alpha, self.beta], dtype=torch.float64)


class RiskConfig(LevelsConfig):
    """A functional by its name and numbers."""

    measure: Name = Field(
        default="cvar",
        description="mean. cvar: mean of the worst alpha. rvar: mean between the quantiles alpha "
        "and beta. mixed_var: (omega cvar + rvar) / (omega + 1). pass_at_k: mean of the best of k. "
        "entropic: log E exp(rate R) / rate. mean_variance: mean less penalty times variance.",
    )
    k: int = Field(default=4, ge=1, description="Draws of pass_at_k; 1: the mean.")
    rate: float = Field(
        default=-1.0,
        description="Of entropic, per unit of reward: below 0 it fears bad rewards, above 0 it "
        "seeks good ones; 0: the mean.",
    )
    penalty: float = Field(
        default=0.5, ge=0, description="Of mean_variance, per unit of reward; 0: the mean."
    )
    tail: Literal["lower", "upper"] = Field(
        default="lower", description="upper: -rho(-R), so that cvar is the mean of the best alpha."
    )

    def functional(self) -> Risk:
        """The functional that these settings name."""
        found: dict[str, Risk] = {
            "mean": MEAN,
            "cvar": cvar(self.alpha),
            "rvar": rvar(self.alpha, self.beta),
            "mixed_var": mixed_var(self.alpha, self.beta, self.omega),
            "pass_at_k": Power(self.k) if self.k > 1 else MEAN,
            "entropic": Entropic(self.rate) if self.rate else MEAN,
            "mean_variance": MeanVariance(self.penalty) if self.penalty else MEAN,
        }
        return Mirrored(found[self.measure]) if self.tail == "upper" else found[self.measure]
