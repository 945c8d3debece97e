"""DiffusionNFT on a real network: its implicit policies, and its kinship with AWM."""

from __future__ import annotations

import pytest
import torch
from tiny_sd3 import make_batch, make_requests

from diffusion.likelihoods import implicit_error
from mmrl.objectives import nft
from mmrl.weights import trainable

NEEDS = frozenset({"implicit_positive", "implicit_negative"})


def backend_of(make, beta=1.0, **ema):
    return make(needs=NEEDS, likelihood={"behaviour": "ema", "implicit_beta": beta, "ema": ema})


def move(backend, scale=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(backend.model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def gradient(backend, loss):
    backend.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainable(backend.model).items()}


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_terms_equal_the_formula_in_x0(make, beta):
    backend = backend_of(make, beta)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups)
    rows = backend._decisions.fold(batch.payload, torch.device("cpu"))
    with torch.no_grad():
        old = backend._policy(rows).double()
        move(backend)
        new = backend._policy(rows).double()
    terms = backend.evaluate(batch, NEEDS)
    x0, x_t, t = rows.detail.x0.double(), rows.states.double(), rows.sigma.double()
    for name, mixed in {
        "implicit_positive": beta * new + (1 - beta) * old,
        "implicit_negative": (1 + beta) * old - beta * new,
    }.items():
        residual = (x_t - t.view(-1, 1, 1, 1) * mixed - x0).flatten(1)
        expected = residual.square().mean(1) / residual.abs().mean(1).clamp(min=1e-5) / beta
        found = getattr(terms, name)
        torch.testing.assert_close(found, rows.unfold(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("optimality", [0.0, 0.3, 0.5, 1.0])
def test_at_the_start_it_is_advantage_weighted_matching(make, optimality, beta):
    """Gradient of the loss at v = v_old: A t / mean |v_old - v*| times that of mean (v - v*)^2."""
    backend = backend_of(make, beta)
    move(backend)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups, [optimality] * 4)
    terms = backend.evaluate(batch, NEEDS)
    loss = nft.loss(terms, batch, nft.Config(adv_scale=5.0)).loss
    found = gradient(backend, loss.mean())
    rows = backend._decisions.fold(batch.payload, torch.device("cpu"))
    velocity = backend._policy(rows).double()
    residual = (velocity - (rows.detail.noise - rows.detail.x0).double()).flatten(1)
    advantage = 5.0 * (2 * optimality - 1)
    weight = advantage * rows.sigma / residual.detach().abs().mean(1)
    expected = gradient(backend, (weight * residual.square().mean(1)).mean())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-6)
    assert any(bool(value.any()) for value in expected.values()) == (optimality != 0.5)


def test_at_the_start_the_value_does_not_depend_on_the_reward(make):
    backend = backend_of(make)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups)
    terms = backend.evaluate(batch, NEEDS)
    torch.testing.assert_close(terms.implicit_positive, terms.implicit_negative)


def test_a_perfect_prediction_is_finite():
    v = torch.randn(3, 2, 4, 4, requires_grad=True)
    target, time = v.detach().double(), torch.tensor([0.0, 0.5, 1.0])
    error = implicit_error(v, v.detach(), target, time, 1.0)
    assert not error.any()
    error.sum().backward()
    assert not v.grad.any()
