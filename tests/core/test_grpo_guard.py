"""GRPO-Guard on simulated Gaussian steps: what its corrections do to the log-ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from core_oracles import GUARD_SWITCHES, batch_of, close, float64, random_case
from torch import Tensor
from torch.distributions import Normal

from mmrl.errors import UserError
from mmrl.objectives import grpo, grpo_guard
from mmrl.types import PolicyTerms, UpdateBatch

STDS = (0.9, 0.5, 0.2, 0.05)
OFF = dict.fromkeys(GUARD_SWITCHES, False)


@dataclass(frozen=True)
class Steps:
    """Steps x' = mu_old + S z of B samples, [B, K, D], and the policy's mean of each."""

    mu: Tensor
    mu_old: Tensor
    z: Tensor
    std: Tensor

    def terms(self) -> PolicyTerms:
        return PolicyTerms(
            logp=self.logp(self.mu),
            mean_gap_old=(self.mu - self.mu_old).square().mean(-1),
            step_std=self.std[..., 0],
            step_size=self.std[..., 0] / 2,
        )

    def logp(self, mean: Tensor) -> Tensor:
        return Normal(mean, self.std).log_prob(self.mu_old + self.std * self.z).mean(-1)

    def batch(self) -> UpdateBatch:
        rows, columns = self.z.shape[:2]
        mask = torch.ones(rows, columns, dtype=torch.bool)
        return batch_of(mask, torch.ones(rows).double(), logp_old=self.logp(self.mu_old))


def steps(rows: int, size: int = 3, drift: float = 0.01) -> Steps:
    draw = torch.Generator().manual_seed(0)
    shape = (rows, len(STDS), size)
    mu_old, z = (torch.randn(shape, dtype=torch.float64, generator=draw) for _ in range(2))
    # One drift for all samples of a step, so that only the noise differs between them.
    gap = drift * torch.randn((1, *shape[1:]), dtype=torch.float64, generator=draw)
    std = float64(STDS)[None, :, None].expand(shape)
    return Steps(mu=mu_old + gap, mu_old=mu_old, z=z, std=std)


def test_log_ratio_is_the_noise_along_the_drift():
    """log r = mean(z (mu - mu_old)), whatever S is (the identity behind the method)."""
    sampled = steps(7)
    _, corrected = grpo_guard.log_ratios(sampled.terms(), sampled.batch(), grpo_guard.Config())
    expected = (sampled.z * (sampled.mu - sampled.mu_old)).mean(-1)
    # A tenth of the smallest entry would be noticed: cancellation leaves 1e-12.
    close(corrected, expected.tolist(), 1e-11)


def test_moments_of_the_log_ratio():
    """Guard: mean 0 and variance mean(drift^2) / D at every step; plain: mean -KL, var ~ 1/S^2."""
    size, sampled = 3, steps(20_000)
    raw, corrected = grpo_guard.log_ratios(sampled.terms(), sampled.batch(), grpo_guard.Config())
    gap = sampled.terms().mean_gap_old[0]
    for k, std in enumerate(STDS):
        variance = gap[k].item() / size
        # 5 standard errors of a mean, and of a variance of Gaussians.
        assert abs(corrected[:, k].mean()) < 5 * math.sqrt(variance / len(raw))
        assert corrected[:, k].var().item() == pytest.approx(variance, rel=0.05)
        assert raw[:, k].var().item() == pytest.approx(variance / std**2, rel=0.05)
        kl = gap[k].item() / (2 * std**2)
        assert abs(raw[:, k].mean() + kl) < 5 * math.sqrt(variance / std**2 / len(raw))
    assert raw[:, -1].mean() < -0.005, "a drift too small to see tests nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_corrections_it_is_grpo_bit_for_bit(dtype):
    terms, batch = random_case()
    terms = PolicyTerms(logp=terms.logp.detach().to(dtype))
    clip = {"clip_low": 0.1, "clip_high": 0.3}
    plain = grpo.loss(terms, batch, grpo.Config(**clip))
    guard = grpo_guard.loss(terms, batch, grpo_guard.Config(**clip, **OFF))
    assert torch.equal(guard.loss, plain.loss)
    assert {name: guard.metrics[name] for name in plain.metrics} == plain.metrics


def test_on_policy_ratio_is_one_and_the_gradient_is_scaled():
    """Without stored log-probabilities: ratio 1 bitwise, gradient -A S / (-dt) of log p."""
    terms, batch = random_case(on_policy=True)
    gap = terms.mean_gap_old.clone().requires_grad_()
    out = grpo_guard.loss(replace(terms, mean_gap_old=gap), batch, grpo_guard.Config())
    total, count = out.metrics["ratio/mean"]
    assert total == count
    weight = -batch.advantages[:, None] / terms.step_size
    assert torch.equal(out.loss[batch.mask], weight[batch.mask])
    used = batch.mask.double()
    gradients = torch.autograd.grad(
        (out.loss * used).sum(), [terms.logp, gap], materialize_grads=True
    )
    close(gradients[0], (weight * terms.step_std * used).tolist())
    assert not gradients[1].any(), "mu_old is mu: the drift has no gradient where it is zero"


def test_drift_has_a_gradient_and_the_step_has_none():
    terms, batch = random_case()
    leaves = {
        name: getattr(terms, name).clone().requires_grad_()
        for name in ("mean_gap_old", "step_std", "step_size")
    }
    config = grpo_guard.Config(clip_low=1, clip_high=1e9)
    loss = grpo_guard.loss(replace(terms, **leaves), batch, config).loss
    gradients = torch.autograd.grad(loss[batch.mask].sum(), leaves.values(), allow_unused=True)
    _, corrected = grpo_guard.log_ratios(terms, batch, config)
    expected = -batch.advantages[:, None] * corrected.exp() / (2 * terms.step_std * terms.step_size)
    close(gradients[0], expected.where(batch.mask, 0.0).tolist())
    assert gradients[1:] == (None, None)


@pytest.mark.parametrize("switch", GUARD_SWITCHES)
@pytest.mark.parametrize("term", ["step_std", "step_size"])
def test_a_step_of_an_ode_is_refused_where_it_matters(switch, term):
    terms, batch = random_case()
    terms = replace(terms, **{term: getattr(terms, term).index_fill(1, torch.tensor(0), 0)})
    config = grpo_guard.Config(**(OFF | {switch: True}))
    if term in grpo_guard.needs(config):
        with pytest.raises(UserError, match=f"grpo_guard: {term} must be positive"):
            grpo_guard.loss(terms, batch, config)
        masked = batch.mask.index_fill(1, torch.tensor(0), False)
        terms_out = grpo_guard.loss(terms, replace(batch, mask=masked), config)
        assert terms_out.loss[masked].isfinite().all()
    else:
        grpo_guard.loss(terms, batch, config)
