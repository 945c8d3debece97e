"""The importance ratio on an estimate of the divergence from the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, close, float64, random_case

from mmrl.errors import UserError
from mmrl.regularisers import kl_reference
from mmrl.schema import validate
from mmrl.types import PolicyTerms

BY_LOGP = pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
OLD, NEW, REFERENCE = (
    float64(logits).log_softmax(0) for logits in ([1, 0, -1], [0.3, 0.9, -0.2], [0, -0.5, 0.4])
)
"""Log-probabilities of three outcomes under three policies."""


def expectation(estimator: str, old: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """Mean penalty over all outcomes, each as often as the policy that samples draws it."""
    new = logits.log_softmax(0)
    batch = batch_of(torch.ones(1, 3, dtype=torch.bool), float64([0]))
    batch = replace(batch, logp_old=None if old is None else old[None])
    config = kl_reference.Config(estimator=estimator, ratio_weighted=True)
    terms = PolicyTerms(logp=new[None], logp_ref=REFERENCE[None])
    drawn = (new.detach() if old is None else old).exp()
    return (drawn * kl_reference.loss(terms, batch, config).loss[0]).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("old", [None, OLD], ids=["on_policy", "off_policy"])
def test_value_and_gradient_are_those_of_the_divergence(estimator, old):
    """Samples of whatever policy: sum p (log p - log q), exactly."""
    logits = NEW.clone().requires_grad_()
    estimate = expectation(estimator, old, logits)
    new = logits.log_softmax(0)
    exact = (new.exp() * (new - REFERENCE)).sum()
    close(estimate, exact.item())
    (found,), (expected,) = (torch.autograd.grad(x, logits) for x in (estimate, exact))
    close(found, expected.tolist())
    assert found.abs().min() > 1e-3


@BY_LOGP
def test_on_policy_the_value_is_the_plain_one_bit_for_bit(estimator):
    terms, batch = random_case(on_policy=True)
    plain, weighted = (
        kl_reference.loss(
            terms, batch, kl_reference.Config(estimator=estimator, ratio_weighted=weighted)
        )
        for weighted in (False, True)
    )
    assert torch.equal(plain.loss, weighted.loss)
    assert plain.metrics == weighted.metrics
    gradients = [torch.autograd.grad(x.loss.sum(), terms.logp)[0] for x in (plain, weighted)]
    # The product rule: the ratio, 1 in value, adds the estimate itself.
    close(gradients[1], (gradients[0] + plain.loss.detach()).tolist())


@BY_LOGP
def test_masked_infinities_stay_behind_the_mask(estimator):
    terms, batch = random_case()
    wild = terms.logp.detach().masked_fill(~batch.mask, -math.inf).requires_grad_()
    assert batch.logp_old is not None
    batch = replace(batch, logp_old=batch.logp_old.masked_fill(~batch.mask, math.nan))
    config = kl_reference.Config(estimator=estimator, ratio_weighted=True)
    loss = kl_reference.loss(replace(terms, logp=wild), batch, config).loss
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), wild)[0].isfinite().all()


def test_a_velocity_gap_is_no_kl_in_nats():
    terms, batch = random_case()
    assert set(kl_reference.loss(terms, batch, kl_reference.Config()).metrics) == {"kl_reference"}


def test_a_velocity_gap_has_no_ratio():
    written = {"estimator": "velocity_elbo", "ratio_weighted": True}
    message = r"regularisers\[0\].ratio_weighted: belongs to the estimators k1, k2 and k3"
    with pytest.raises(UserError, match=message):
        validate(kl_reference.Config, written, "regularisers[0]")
    assert not kl_reference.Config().ratio_weighted
