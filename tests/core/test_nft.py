"""DiffusionNFT in velocities: what the terms mean, and that its first step is that of AWM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, close, float64, no_scores
from torch import Tensor

from mmrl.modulators import optimality
from mmrl.objectives import grpo, nft
from mmrl.types import Advantages, PolicyTerms, UpdateBatch

ADVANTAGES = (-7.0, -5.0, -1.5, 0.0, 2.0, 5.0)  # -7 is clipped to -5
TIMES = (0.9, 0.5, 0.25, 0.05)
SHAPE = (6, 4, 8)


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, dtype=torch.float64, generator=generator)


X0, NOISE, V_OLD = draw(1), draw(2), draw(3)
TIME = float64(TIMES)[None, :, None]
TARGET = NOISE - X0


def implicit_terms(velocity: Tensor, old: Tensor, beta: float) -> PolicyTerms:
    """The terms as specified: x0-prediction errors of v_old +- beta (v - v_old)."""
    noised = (1 - TIME) * X0 + TIME * NOISE

    def error(implied: Tensor) -> Tensor:
        gap = noised - TIME * implied - X0
        return gap.square().mean(-1) / gap.detach().abs().mean(-1).clamp(min=1e-5) / beta

    positive = error(old + beta * (velocity - old))
    negative = error(old - beta * (velocity - old))
    zeros = torch.zeros(SHAPE[:2]).double()
    return PolicyTerms(logp=zeros, implicit_positive=positive, implicit_negative=negative)


def batch(advantages=ADVANTAGES, **config) -> UpdateBatch:
    given = Advantages(values=float64(advantages), keep=torch.ones(6, dtype=torch.bool))
    mapped = optimality.modulate(given, no_scores(), optimality.Config(**config))
    return batch_of(torch.ones(SHAPE[:2], dtype=torch.bool), mapped.values)


def value_and_gradient(advantages=ADVANTAGES, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    velocity = V_OLD.clone().requires_grad_()
    loss = nft.loss(implicit_terms(velocity, V_OLD, beta), batch(advantages), nft.Config()).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), velocity)[0]


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_first_step_is_advantage_weighted_matching(beta):
    """At v = v_old: A t / mean|v_old - v*| times the gradient of mean (v - v*)^2, for any beta."""
    _, gradient = value_and_gradient(beta=beta)
    error = V_OLD - TARGET
    clipped = float64(ADVANTAGES).clamp(-5, 5)[:, None, None]
    expected = clipped * TIME / error.abs().mean(-1, keepdim=True) * 2 * error / SHAPE[-1]
    close(gradient, expected.tolist())


def test_gradient_equals_that_of_grpo_with_awm_log_probabilities():
    """AWM with the weight t / mean|v_old - v*| (its L1 form) through the clipped objective."""
    velocity = V_OLD.clone().requires_grad_()
    error = velocity - TARGET
    logp = -TIME[..., 0] * error.square().mean(-1) / error.detach().abs().mean(-1)
    given = replace(batch(), advantages=float64(ADVANTAGES).clamp(-5, 5))
    awm = grpo.loss(PolicyTerms(logp=logp), given, grpo.Config()).loss
    expected = torch.autograd.grad(awm.sum(), velocity)[0]
    close(value_and_gradient()[1], expected.tolist())


def test_value_at_v_old_does_not_depend_on_advantages_but_the_gradient_does():
    value, gradient = value_and_gradient()
    other, opposite = value_and_gradient([-a for a in ADVANTAGES])
    close(value, other.tolist())
    close(gradient, (-opposite).tolist())
    assert gradient.abs().sum() > 1


def test_half_is_neutral():
    """A = 0, so r = 1/2: the two implicit policies cancel."""
    assert value_and_gradient([0.0] * 6)[1].abs().max() < 1e-15


@pytest.mark.parametrize(("advantage", "sign"), [(5.0, 1), (-5.0, -1)])
def test_extremes_use_one_policy_only(advantage, sign):
    velocity, beta = draw(4), 0.3
    loss = nft.loss(implicit_terms(velocity, V_OLD, beta), batch([advantage] * 6), nft.Config())
    implied = V_OLD + sign * beta * (velocity - V_OLD)
    error = TIME * (implied - TARGET)
    close(loss.loss, (5 * error.square().mean(-1) / error.abs().mean(-1) / beta).tolist())


def test_a_step_along_the_gradient_moves_towards_good_samples():
    _, gradient = value_and_gradient()
    before = (V_OLD - TARGET).square().mean(-1)
    after = (V_OLD - 1e-3 * gradient - TARGET).square().mean(-1)
    moved = (after - before).sum(1)
    assert [float(x) for x in moved.sign()] == [1, 1, 1, 0, -1, -1]


def test_scale_is_the_bound_of_the_advantages():
    """With adv_scale equal to the bound, the gradient at v_old is A times one thing."""
    gradients = []
    for bound in (5.0, 2.0):
        velocity = V_OLD.clone().requires_grad_()
        terms, given = implicit_terms(velocity, V_OLD, 1.0), batch([1.5] * 6, bound=bound)
        loss = nft.loss(terms, given, nft.Config(adv_scale=bound)).loss
        gradients.append(torch.autograd.grad(loss.sum(), velocity)[0])
    close(gradients[0], gradients[1].tolist())
