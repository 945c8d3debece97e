"""Maximum likelihood of the samples that were kept."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from core_oracles import F_MASK, fixture_f, random_case, reduced

from mmrl import reduction
from mmrl.objectives import sft


def test_advantages_and_old_log_probabilities_play_no_part():
    terms, batch = random_case()
    expected = sft.loss(terms, batch, sft.Config())
    other = replace(batch, advantages=-7 * batch.advantages, logp_old=None)
    found = sft.loss(terms, other, sft.Config())
    assert torch.equal(found.loss, expected.loss)
    assert found.metrics == expected.metrics


def test_the_token_mean_is_the_cross_entropy_of_the_sampled_tokens():
    terms, batch = fixture_f()
    out = sft.loss(terms, batch, sft.Config())
    value = reduced(reduction, out.loss, F_MASK, batch.weights, "decision_mean")
    total, count = out.metrics["nll"]
    assert value.item() == total / count
    (gradient,) = torch.autograd.grad(value, terms.logp)
    assert torch.equal(gradient, F_MASK.double() / -9), "each token becomes likelier"


def test_masked_infinities_stay_behind_the_mask():
    terms, batch = random_case()
    for filler in (math.nan, -math.inf):
        wild = terms.logp.detach().masked_fill(~batch.mask, filler).requires_grad_()
        loss = sft.loss(replace(terms, logp=wild), batch, sft.Config()).loss
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), wild)[0].isfinite().all()
