"""A clipped importance weight without gradient, and the two ways to write its bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_oracles import close, entries, random_case, ratios
from pydantic import ValidationError

from mmrl.errors import UserError
from mmrl.objectives import cispo, reinforce
from mmrl.schema import validate

STEP = 1e-6


@pytest.mark.parametrize("low", [None, 0.2])
def test_gradient_matches_finite_differences_of_the_weighted_log_probability(low):
    """The weight is held where it is, as its gradient does not count."""
    terms, batch = random_case()
    loss = cispo.loss(terms, batch, cispo.Config(low=low)).loss
    (gradient,) = torch.autograd.grad(loss.sum(), terms.logp)
    weights = ratios(terms, batch, "decision")

    def value(b: int, k: int, logp: float) -> float:
        weight = min(max(weights[b, k], 0.0 if low is None else 1 - low), 1.28)
        return -batch.advantages[b].item() * weight * logp

    for b, k in entries(batch.mask):
        at = terms.logp[b, k].item()
        slope = (value(b, k, at + STEP) - value(b, k, at - STEP)) / (2 * STEP)
        close(gradient[b, k], slope, 1e-8)
        assert slope * batch.advantages[b].item() < 0, "more of what is good"
    assert not gradient[~batch.mask].any()


def test_a_clipped_decision_keeps_its_gradient():
    terms, batch = random_case()
    loss = cispo.loss(terms, batch, cispo.Config()).loss
    (gradient,) = torch.autograd.grad(loss.sum(), terms.logp)
    assert gradient[batch.mask].abs().min() > 0


def test_without_old_log_probabilities_it_is_the_policy_gradient():
    terms, batch = random_case(on_policy=True)
    plain = reinforce.loss(terms, batch, reinforce.Config()).loss
    assert torch.equal(cispo.loss(terms, batch, cispo.Config()).loss, plain)


def test_both_ways_to_write_the_bounds():
    terms, batch = random_case()
    written = [{"low": 0.25, "high": 0.5}, {"bounds": "absolute", "low": 0.75, "high": 1.5}]
    first, second = (cispo.loss(terms, batch, cispo.Config(**options)) for options in written)
    assert torch.equal(first.loss, second.loss)
    assert first.metrics == second.metrics


def test_masked_infinities_stay_behind_the_mask():
    terms, batch = random_case()
    for filler in (math.nan, -math.inf):
        wild = terms.logp.detach().masked_fill(~batch.mask, filler).requires_grad_()
        loss = cispo.loss(replace(terms, logp=wild), batch, cispo.Config()).loss
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), wild)[0].isfinite().all()


def test_config():
    with pytest.raises(UserError, match=r"objective.high: should not cut off the ratio 1"):
        validate(cispo.Config, {"bounds": "absolute"}, "objective")  # 0.28 is a distance from 1
    for wrong in ({"bounds": "eps"}, {"low": -0.1}, {"high": -0.1}):
        with pytest.raises(ValidationError):
            cispo.Config(**wrong)
