"""Weights for what the sampler drew from another distribution than the one that is scored."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_oracles import AGGREGATIONS, close, float64, random_case, reduced
from pydantic import ValidationError

from mmrl import reduction
from mmrl.corrections.importance_sampling import Config, correct
from mmrl.metrics import Means
from mmrl.objectives import grpo, reinforce
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

RATIO, GAP = "sampling/importance_sampling_ratio", "sampling/sampling_logp_difference"
ALL = pytest.mark.parametrize(
    "config",
    [Config(level=level, mode=mode, cap=1.2) for level in ("decision", "sample")
     for mode in ("truncate", "mask")],
    ids=lambda config: f"{config.level}_{config.mode}",
)  # fmt: skip


def case(ratios, mask=None):
    """A loss of 1 everywhere, of decisions whose weights are ``ratios``."""
    gap = float64(ratios).log()
    mask = torch.ones(gap.shape).bool() if mask is None else torch.tensor(mask)
    old = torch.full_like(gap, -1.5)
    terms = PolicyTerms(logp=old + 7, logp_sampled=old - gap)
    ones = torch.ones(len(gap)).double()
    batch = UpdateBatch(payload=None, mask=mask, advantages=ones, weights=ones, logp_old=old)
    return LossTerms(loss=torch.ones_like(gap)), terms, batch


def weights(ratios, mask=None, **options):
    policy, terms, batch = case(ratios, mask)
    return correct(policy, terms, batch, Config(**options)).loss


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cap": 2.0}, [[0.5, 2.0, 2.0], [1.0, 1.5, 1.0]]),
        ({"cap": 2.0, "mode": "mask"}, [[0.5, 2.0, 0.0], [1.0, 1.5, 1.0]]),
        ({"cap": 2.0, "level": "sample"}, [[2.0] * 3, [1.5] * 3]),
        ({"cap": 2.0, "level": "sample", "mode": "mask"}, [[0.0] * 3, [1.5] * 3]),
        ({"cap": 9.0, "level": "sample", "mode": "mask"}, [[4.0] * 3, [1.5] * 3]),
    ],
)
def test_by_hand(options, expected):
    close(weights([[0.5, 2.0, 4.0], [1.0, 1.5, 1.0]], **options), expected, 1e-9)


def test_the_defaults_are_those_of_the_first_publications():
    assert Config() == Config(level="decision", mode="truncate", cap=2.0)


@pytest.mark.parametrize("level", ["decision", "sample"])
def test_a_loss_of_a_sample_counts_at_each_of_its_decisions(level):
    terms, batch = random_case()
    single = LossTerms(loss=torch.arange(1.0, 7.0, dtype=torch.float64)[:, None])
    spread = LossTerms(loss=single.loss.expand(6, 5))
    config = Config(level=level)
    for how in AGGREGATIONS:
        one, many = (
            reduced(
                reduction, correct(policy, terms, batch, config).loss,
                batch.mask, batch.weights, how, 7,
            )
            for policy in (single, spread)
        )  # fmt: skip
        close(one, many.item())


@ALL
def test_the_weight_has_no_gradient(config):
    """On-policy it is made of the very log-probabilities that are trained."""
    terms, batch = random_case(on_policy=True)
    policy = reinforce.loss(terms, batch, reinforce.Config())
    found = correct(policy, terms, batch, config).loss
    (gradient,) = torch.autograd.grad(found[batch.mask].sum(), terms.logp)
    ones = LossTerms(loss=torch.ones(6, 5).double())
    weight = correct(ones, terms, batch, config).loss
    assert not weight.requires_grad
    expected = torch.where(batch.mask, -batch.advantages[:, None] * weight, 0.0)
    close(gradient, expected.tolist(), 1e-9)


def test_an_expectation_under_the_sampler_becomes_that_of_the_policy():
    """Sum over all tokens of q (p / q) f = sum p f, where the cap is out of reach."""
    p, q, f = float64([[0.5, 0.3, 0.2]]), float64([[0.1, 0.6, 0.3]]), float64([[1.0, -2.0, 5.0]])
    terms = PolicyTerms(logp=p.log(), logp_sampled=q.log())
    batch = UpdateBatch(
        payload=None,
        mask=torch.ones(1, 3).bool(),
        advantages=torch.ones(1).double(),
        weights=torch.ones(1).double(),
    )
    found = correct(LossTerms(loss=f), terms, batch, Config(cap=10.0)).loss
    close((q * found).sum(), float((p * f).sum()))


def test_the_same_distribution_leaves_the_loss_as_it_is():
    terms, batch = random_case(on_policy=True)
    terms = replace(terms, logp_sampled=terms.logp.detach())
    policy = reinforce.loss(terms, batch, reinforce.Config())
    for level in ("decision", "sample"):
        found = correct(policy, terms, batch, Config(level=level))
        assert torch.equal(found.loss, policy.loss)


@ALL
def test_masked_values_reach_nothing(config):
    mask = [[True, False, True]]
    policy, terms, batch = case([[0.5, 1.0, 1.5]], mask)
    expected = correct(policy, terms, batch, config)
    wild = replace(terms, logp_sampled=terms.logp_sampled.masked_fill(~batch.mask, -math.inf))
    found = correct(policy, wild, batch, config)
    assert torch.equal(found.loss, expected.loss)
    assert found.metrics == expected.metrics


def test_extremes_are_finite_in_float32():
    mask, ones = torch.ones(1, 2).bool(), torch.ones(1).double()
    batch = UpdateBatch(payload=None, mask=mask, advantages=ones, weights=ones)
    policy = LossTerms(loss=torch.ones(1, 2))
    terms = PolicyTerms(logp=torch.zeros(1, 2), logp_sampled=torch.tensor([[-1e4, 1e4]]))
    found = correct(policy, terms, batch, Config(cap=1e30))
    assert found.loss.dtype == torch.float32
    assert found.loss.isfinite().all()


@ALL
def test_micro_batches_add_up(config):
    """Loss and metrics are those of the whole, whichever samples are together."""
    terms, batch = random_case()
    policy = grpo.loss(terms, batch, grpo.Config())

    def part(rows):
        some = UpdateBatch(
            payload=None,
            mask=batch.mask[rows],
            advantages=batch.advantages[rows],
            weights=batch.weights[rows],
            logp_old=batch.logp_old[rows],
        )
        few = PolicyTerms(logp=terms.logp[rows], logp_sampled=terms.logp_sampled[rows])
        return correct(LossTerms(loss=policy.loss[rows]), few, some, config)

    whole, means = correct(LossTerms(loss=policy.loss), terms, batch, config), Means()
    for rows in ([5, 0], [3], [2, 1, 4]):
        found = part(rows)
        assert torch.equal(found.loss, whole.loss[rows])
        means.add(found.metrics)
    together = Means()
    together.add(whole.metrics)
    assert means.result() == pytest.approx(together.result())
    assert means.result().keys() == whole.metrics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0}, "greater than 0"),
        ({"mode": "clip"}, "'truncate' or 'mask'"),
        ({"level": "token"}, "'decision' or 'sample'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValidationError, match=message):
        Config(**options)
