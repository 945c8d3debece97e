"""A corridor for the entropy of each sample."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, float64
from pydantic import ValidationError

from mmrl.errors import UserError
from mmrl.regularisers.entropy_corridor import Bounds, Config, loss
from mmrl.types import PolicyTerms


def case(entropies, mask=None, tasks=()):
    values = float64(entropies).requires_grad_()
    mask = torch.ones(values.shape).bool() if mask is None else torch.tensor(mask)
    batch = replace(batch_of(mask, float64([0.0] * len(values))), tasks=tasks)
    return PolicyTerms(logp=torch.zeros_like(values), entropy=values), batch, values


def penalties(entropies, config=Config(), **changes):  # noqa: B008 - frozen
    terms, batch, _ = case(entropies, **changes)
    return loss(terms, batch, config).loss[:, 0].tolist()


def test_9_within_the_corridor_there_is_neither_loss_nor_gradient():
    terms, batch, values = case([[0.2, 0.2], [0.6, 0.6], [0.1, 0.5], [0.9, 0.1]])
    found = loss(terms, batch, Config()).loss
    assert float(found.detach().abs().max()) < 1e-12
    found.sum().backward()
    inside = values.grad[2:]
    assert bool((inside == 0).all())


def test_outside_it_is_the_distance_and_leads_back():
    terms, batch, values = case([[0.9, 0.7], [0.0, 0.1]])
    found = loss(terms, batch, Config()).loss
    assert found[:, 0].tolist() == pytest.approx([0.8 - 0.6, 0.2 - 0.05])
    found.sum().backward()
    assert values.grad.tolist() == [[0.5, 0.5], [-0.5, -0.5]]


def test_tasks_have_corridors_of_their_own():
    config = Config(tasks={"math": Bounds(low=1.0, high=2.0)})
    assert penalties([[0.5], [0.5], [0.5]], config, tasks=("math", "ocr", "")) == [0.5, 0.0, 0.0]
    assert penalties([[0.5]], config) == [0.0]


def test_the_expected_gradient_is_that_of_the_entropy():
    """Unlike that of sampled -logp, whose expectation over what is sampled is zero."""
    logits = float64([[2.0, 0.0, -1.0]]).requires_grad_()
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad(entropy.sum(), logits, retain_graph=True)
    found = torch.zeros_like(expected)
    for token in range(3):
        terms = PolicyTerms(logp=logp[:, token : token + 1], entropy=entropy)
        batch = batch_of(torch.ones(1, 1).bool(), float64([0.0]))
        penalty = loss(terms, batch, Config(low=0.0, high=0.1)).loss
        (gradient,) = torch.autograd.grad(penalty.sum(), logits, retain_graph=True)
        found += float(logp[0, token].detach().exp()) * gradient
    torch.testing.assert_close(found, expected)
    assert float(expected.abs().max()) > 0.1


def test_masked_values_reach_nothing():
    mask = [[True, False]]
    assert penalties([[0.4, math.nan]], mask=mask) == [0.0]


def test_metrics():
    terms, batch, _ = case([[0.9], [0.4]])
    metrics = loss(terms, batch, Config()).metrics
    assert metrics["entropy/mean"] == (pytest.approx(1.3), 2.0)
    assert metrics["entropy/outside"] == (1.0, 2.0)


def test_bounds_in_the_wrong_order():
    with pytest.raises((UserError, ValidationError), match=r"low = 0\.7 is above high = 0\.6"):
        Config(low=0.7)
