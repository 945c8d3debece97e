"""The closed-form penalty on denoising steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, close, random_case
from torch.distributions import Normal, kl_divergence

from mmrl.errors import UserError
from mmrl.regularisers import kl_transition
from mmrl.schema import validate
from mmrl.types import PolicyTerms


@pytest.mark.parametrize("denominator", ["true", "drop_dt"])
def test_it_is_the_divergence_and_the_policy_feels_it(denominator):
    """KL of two Gaussian steps; the gradient reaches the policy's mean, not a no_grad copy."""
    draw = torch.Generator().manual_seed(0)
    mean, other = torch.randn((2, 4, 3, 5), dtype=torch.float64, generator=draw)
    std, step = (torch.rand((4, 3), dtype=torch.float64, generator=draw) + 0.2 for _ in range(2))
    mean.requires_grad_()
    terms = PolicyTerms(
        logp=torch.zeros(4, 3).double(),
        mean_gap_reference=(mean - other).square().mean(-1),
        step_std=std,
        diffusion=std / step.sqrt(),
    )
    batch = batch_of(torch.ones(4, 3, dtype=torch.bool), torch.zeros(4).double())
    value = kl_transition.loss(terms, batch, kl_transition.Config(denominator=denominator)).loss
    factor = 1.0 if denominator == "true" else step
    exact = kl_divergence(Normal(mean, std[..., None]), Normal(other, std[..., None])).mean(-1)
    close(value, (exact * factor).tolist())
    gradient, expected = (
        torch.autograd.grad(x.sum(), mean, retain_graph=True)[0] for x in (value, exact * factor)
    )
    assert gradient.abs().min() > 0
    close(gradient, expected.tolist())


@pytest.mark.parametrize(("denominator", "term"), [("true", "step_std"), ("drop_dt", "diffusion")])
def test_a_step_without_noise_is_refused(denominator, term):
    terms, batch = random_case()
    spread = getattr(terms, term).clone()
    spread[1, 2] = 0
    terms = replace(terms, **{term: spread})
    config = kl_transition.Config(denominator=denominator)
    with pytest.raises(UserError, match=f"kl_transition: {term} must be positive.*got 0;"):
        kl_transition.loss(terms, batch, config)
    batch.mask[1, 2] = False
    assert kl_transition.loss(terms, batch, config).loss.isfinite().all()


def test_config():
    assert validate(kl_transition.Config, {"denominator": True}).denominator == "true"
    assert kl_transition.Config().coef == 4e-3, "the published weight of `true`"
    with pytest.raises(UserError, match=r"regularisers\[0\].denominator"):
        validate(kl_transition.Config, {"denominator": "dt"}, "regularisers[0]")
