"""The soft gate: its slope, its limits, and which temperature counts."""

from __future__ import annotations

import math

import pytest
import torch
from core_oracles import batch_of, close, float64
from pydantic import ValidationError

from mmrl.objectives import sapo
from mmrl.types import PolicyTerms

RATIOS = (1e-3, 0.5, 1.0, 1.5, 3.0, 20.0)


def loss_at(ratios, advantage: float, **config) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient in the ratio."""
    ratio = float64([ratios]).requires_grad_()
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    batch = batch_of(mask, float64([advantage]), logp_old=torch.zeros(1, len(ratios)).double())
    loss = sapo.loss(PolicyTerms(logp=ratio.log()), batch, sapo.Config(**config)).loss
    return loss, torch.autograd.grad(loss.sum(), ratio)[0]


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
def test_the_gradient_in_the_ratio_is_the_gate_weight(advantage, tau):
    """-A sech^2(tau (r - 1) / 2): the weight of the paper in another form."""
    _, gradient = loss_at(RATIOS, advantage)
    close(gradient, [[-advantage / math.cosh(tau * (r - 1) / 2) ** 2 for r in RATIOS]], 1e-11)


def test_only_the_sign_of_the_advantage_chooses_the_temperature():
    steep = {"temperature_positive": 7.0}
    assert torch.equal(loss_at(RATIOS, -1.0)[0], loss_at(RATIOS, -1.0, **steep)[0])
    assert not torch.equal(loss_at(RATIOS, 1.0)[0], loss_at(RATIOS, 1.0, **steep)[0])
    steep = {"temperature_negative": 7.0}
    assert torch.equal(loss_at(RATIOS, 1.0)[0], loss_at(RATIOS, 1.0, **steep)[0])


def test_a_higher_temperature_holds_back_more_on_both_sides():
    for ratio in (0.5, 1.5):
        _, mild = loss_at((ratio,), -1.0, temperature_negative=1.0)
        _, strong = loss_at((ratio,), -1.0, temperature_negative=4.0)
        assert 0 < strong.item() < mild.item() < 1


def test_the_loss_of_a_distant_ratio_is_bounded():
    """At most 4 |A| / tau, and no gradient is left."""
    loss, gradient = loss_at((1e8,), 3.0)
    close(loss, [[-12.0]])
    assert gradient.item() == 0


@pytest.mark.parametrize("wrong", [{"temperature_positive": 0}, {"temperature_negative": -1}])
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        sapo.Config(**wrong)
