"""The two bounds of ``grpo`` for negative advantages: dual clip and two-sided clipping."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, close, float64, random_case
from pydantic import ValidationError

from mmrl.errors import UserError
from mmrl.objectives import grpo
from mmrl.schema import validate
from mmrl.types import PolicyTerms

RATIOS = (0.1, 0.9, 1.15, 2.9, 3.1, 50.0)


def losses(advantage: float, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient in logp at ``RATIOS``."""
    logp = float64([RATIOS]).log().requires_grad_()
    mask = torch.ones(1, len(RATIOS), dtype=torch.bool)
    batch = batch_of(mask, float64([advantage]), logp_old=torch.zeros_like(logp.detach()))
    loss = grpo.loss(PolicyTerms(logp=logp), batch, grpo.Config(**options)).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), logp)[0]


@pytest.mark.parametrize("option", ["dual_clip", "delta"])
def test_a_negative_advantage_costs_at_most_the_bound_and_is_silent_beyond(option):
    loss, gradient = losses(-2.0, **{option: 3.0})
    close(loss, [[1.6, 1.8, 2.3, 5.8, 6.0, 6.0]])
    close(gradient, [[0, 1.8, 2.3, 5.8, 0, 0]])


@pytest.mark.parametrize("option", ["dual_clip", "delta"])
def test_a_positive_advantage_is_not_touched(option):
    for found, expected in zip(losses(2.0, **{option: 3.0}), losses(2.0), strict=True):
        assert torch.equal(found, expected)


def test_a_dual_clip_may_lie_inside_the_clip_range():
    """There the two differ: the loss of ratio 1.15 is bounded as well."""
    loss, _ = losses(-2.0, dual_clip=1.1)
    close(loss, [[1.6, 1.8, 2.2, 2.2, 2.2, 2.2]])


def test_both_bounds_together_are_the_lower():
    both, _ = losses(-2.0, dual_clip=3.0, delta=40.0)
    assert torch.equal(both, losses(-2.0, dual_clip=3.0)[0])


@pytest.mark.parametrize("importance", ["decision", "sample"])
def test_far_away_bounds_change_no_bit(importance):
    terms, batch = random_case()
    plain = grpo.loss(terms, batch, grpo.Config(importance=importance))
    far = grpo.Config(importance=importance, dual_clip=1e9, delta=1e9)
    bounded = grpo.loss(terms, batch, far)
    assert torch.equal(plain.loss, bounded.loss)
    assert bounded.metrics == plain.metrics | {
        "clip_ratio/capped": (0.0, 13.0 if importance == "decision" else 4.0)
    }
    gradients = [torch.autograd.grad(out.loss.sum(), terms.logp)[0] for out in (plain, bounded)]
    assert torch.equal(*gradients)


def test_masked_infinities_stay_behind_the_mask():
    terms, batch = random_case()
    wild = terms.logp.detach().masked_fill(~batch.mask, math.nan).requires_grad_()
    loss = grpo.loss(replace(terms, logp=wild), batch, grpo.Config(dual_clip=3.0, delta=3.0)).loss
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), wild)[0].isfinite().all()


def test_config():
    assert grpo.Config() == grpo.Config(dual_clip=None, delta=None)
    with pytest.raises(ValidationError):
        grpo.Config(dual_clip=1.0)
    with pytest.raises(
        UserError, match=r"objective.delta: should be greater than 1 \+ clip_high, 1.28"
    ):
        validate(grpo.Config, {"clip_high": 0.28, "delta": 1.28}, "objective")
