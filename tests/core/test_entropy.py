"""The entropy bonus, and the decisions that count."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, close, float64, random_case
from pydantic import ValidationError

from mmrl.regularisers import entropy
from mmrl.types import PolicyTerms


def counted(values, share: float, mask=None) -> list[list[bool]]:
    given = float64(values)
    mask = torch.ones_like(given, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return entropy.highest(given, mask, share).tolist()


def test_descending_the_loss_raises_the_entropy():
    logits = float64([[[2.0, 0.0, -1.0]] * 2]).requires_grad_()
    logp = logits.log_softmax(-1)
    uncertainty = -(logp.exp() * logp).sum(-1)
    batch = batch_of(torch.ones(1, 2, dtype=torch.bool), float64([0]))
    terms = PolicyTerms(logp=logp[..., 0], entropy=uncertainty)
    loss = entropy.loss(terms, batch, entropy.Config()).loss
    assert torch.equal(loss, -uncertainty)
    (step,) = torch.autograd.grad(loss.sum(), logits)
    assert (step[..., 0] > 0).all(), "the likeliest token loses"


def test_the_most_uncertain_of_each_sample_count():
    values = [[0.1, 0.9, 0.5, 0.2, 0.3], [9.0, 8.0, 7.0, 6.0, 5.0]]
    assert counted(values, 0.2) == [[False, True, False, False, False], [True] + [False] * 4]
    assert counted(values, 0.4)[0] == [False, True, True, False, False]
    assert counted(values, 0.41)[1] == [True, True, True, False, False]


def test_equals_count_together():
    assert counted([[1.0, 2.0, 1.0, 1.0]], 0.5) == [[True] * 4]
    assert counted([[0.0, 0.0, 0.0, 3.0]], 0.25) == [[False, False, False, True]]


def test_padding_takes_no_place():
    mask = [[True, True, False, False], [False] * 4]
    values = [[1.0, 2.0, 7.0, math.inf], [1.0, 2.0, 3.0, 4.0]]
    assert counted(values, 0.5, mask) == [[False, True, False, False], [False] * 4]
    assert counted(values, 1.0, mask) == mask


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_masked_nan_reaches_nothing(share):
    terms, batch = random_case()
    assert terms.entropy is not None
    wild = terms.entropy.masked_fill(~batch.mask, math.nan).requires_grad_()
    config = entropy.Config(top_share=share)
    out = entropy.loss(replace(terms, entropy=wild), batch, config)
    assert torch.equal(out.loss, entropy.loss(terms, batch, config).loss)
    assert torch.autograd.grad(out.loss.sum(), wild)[0].isfinite().all()


def test_a_row_does_not_depend_on_its_neighbours():
    terms, batch = random_case()
    assert terms.entropy is not None
    config = entropy.Config(top_share=0.5)
    whole = entropy.loss(terms, batch, config).loss
    for b in range(6):
        row = PolicyTerms(logp=terms.logp[b : b + 1], entropy=terms.entropy[b : b + 1])
        alone = batch_of(batch.mask[b : b + 1], float64([1]))
        close(entropy.loss(row, alone, config).loss[0], whole[b].tolist())


@pytest.mark.parametrize("wrong", [{"top_share": 0}, {"top_share": 1.01}, {"coef": -1}])
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        entropy.Config(**wrong)
