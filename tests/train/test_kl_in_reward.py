"""Divergence from the reference in the reward: by hand, by its gradient, and through the loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toy.gauss.backend import ToyBackend
from toy.run import column, metrics_of, weights_of

from mmrl.advantages import group
from mmrl.kl_in_reward import KlInReward, divergence, penalised
from mmrl.objectives import reinforce
from mmrl.types import PolicyTerms, Prompt, RolloutGroup, RolloutRequest, Scores, UpdateBatch
from mmrl.windows import MicroBatch, Sample

LOGP, LOGP_REF = [[-1.0, -0.5, -2.0]], [[-1.2, -0.5, -1.0]]


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.2, 0.0, -1.0]),
        ("k2", [0.02, 0.0, 0.5]),
        ("k3", [math.exp(-0.2) - 0.8, 0.0, math.e - 2]),
    ],
)
def test_estimates(estimator, expected):
    """The example on which published systems agree; what was not drawn counts as 0."""
    terms = PolicyTerms(logp=float64(LOGP), logp_ref=float64(LOGP_REF))
    config = KlInReward(estimator=estimator)
    found = divergence(terms, torch.ones(1, 3).bool(), config)
    assert found.tolist()[0] == pytest.approx(expected)
    wild = replace(terms, logp_ref=float64([[-1.2, -0.5, -math.inf]]))
    found = divergence(wild, torch.tensor([[True, True, False]]), config)
    assert found.tolist()[0] == pytest.approx([*expected[:2], 0.0])


def test_k1_is_the_default():
    assert KlInReward().estimator == "k1"


def test_it_is_taken_off_valid_rewards_alone():
    scores = Scores(
        combined=float64([1.0, 0.0, 0.5]),
        group=torch.tensor([0, 0, 1]),
        valid=torch.tensor([True, False, True]),
        by_name={"r": float64([1.0, math.nan, 0.5])},
    )
    found = penalised(scores, float64([2.0, 3.0, -4.0]), KlInReward(coef=0.1))
    assert found.combined.tolist() == pytest.approx([0.8, 0.0, 0.9])
    assert found.by_name is scores.by_name


def test_its_policy_gradient_is_that_of_the_divergence():
    """Exactly, by enumeration of one token: sum_x p(x) (coef k1(x)) grad logp(x) = coef grad KL."""
    logits = float64([0.5, -1.0, 0.2, 1.5]).requires_grad_()
    logp = logits.log_softmax(-1)
    ref = float64([0.1, 0.4, 0.2, 0.3]).log()
    (expected,) = torch.autograd.grad(
        0.3 * (logp.exp() * (logp - ref)).sum(), logits, retain_graph=True
    )
    terms = PolicyTerms(logp=logp[:, None], logp_ref=ref[:, None])
    mask = torch.ones(4, 1).bool()
    kl = divergence(terms, mask, KlInReward()).sum(1)
    nothing = Scores(
        combined=torch.zeros(4).double(), group=torch.zeros(4).long(), valid=torch.ones(4).bool()
    )
    rewards = penalised(nothing, kl, KlInReward(coef=0.3)).combined
    ones = torch.ones(4).double()
    batch = UpdateBatch(payload=None, mask=mask, advantages=rewards, weights=ones)
    loss = reinforce.loss(terms, batch, reinforce.Config()).loss[:, 0]
    (found,) = torch.autograd.grad((logp.detach().exp() * loss).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert float(expected.abs().max()) > 0.01


def test_samples_that_are_not_trained_are_penalised_as_well():
    """With the overlong filter they have no mask, but are in the means of their groups."""
    request = RolloutRequest(
        prompt=Prompt(id="p", text="p"), group_size=2, seed=0, stream=0, index=0
    )
    everything = torch.tensor([[True, True, False], [True, True, True]])
    rolled = RolloutGroup(
        request=request,
        outputs=["a", "b"],
        payload=None,
        mask=everything & torch.tensor([[True], [False]]),
        everything=everything,
    )
    rows = MicroBatch([Sample(rolled, 1, 1), Sample(rolled, 0, 0)], slice(1, 3))
    assert rows.drawn.tolist() == [[True, True], [True, False]]


@pytest.fixture
def observed(monkeypatch):
    """What the estimator gets, and samples and means of the policy that drew them."""
    seen = {"scores": [], "drawn": []}
    estimate, rollout = group.estimate, ToyBackend.rollout

    def watched_estimate(scores, config, state):
        seen["scores"].append(scores)
        return estimate(scores, config, state)

    def watched_rollout(self, requests, *, evaluation=False):
        for rolled in rollout(self, requests, evaluation=evaluation):
            if not evaluation:
                seen["drawn"].append((rolled.payload.clone(), self.model.mean.detach().clone()))
            yield rolled

    monkeypatch.setattr(group, "estimate", watched_estimate)
    monkeypatch.setattr(ToyBackend, "rollout", watched_rollout)
    return seen


@pytest.mark.parametrize("size", [2, 4])
def test_advantages_are_of_rewards_less_the_log_ratio_of_two_gaussians(toy, observed, size):
    """N(m, 1) against N(0, 1) at x: k1 = sum_k x_k^2 / 2 - (x_k - m_k)^2 / 2.

    A micro-batch of two of the three decisions sees a sample in parts.
    """
    path = toy(
        "kl_in_reward.coef=0.5", "regularisers=[]", f"training.micro_batch_size={size}",
        "training.num_steps=3",
    )  # fmt: skip
    drawn, logged = iter(observed["drawn"]), column(path, "kl_in_reward")
    assert len(observed["scores"]) == len(logged) == 3
    for step, scores in enumerate(observed["scores"]):
        expected, estimates = [], []
        for _ in range(4):
            x, mean = next(drawn)
            kl = [
                sum(float(v**2 - (v - m) ** 2) / 2 for v, m in zip(row, mean, strict=True))
                for row in x
            ]
            estimates += kl
            rewards = scores.by_name["near"][len(expected) : len(expected) + len(kl)]
            expected += [float(r) - 0.5 * k for r, k in zip(rewards, kl, strict=True)]
        assert scores.combined.tolist() == pytest.approx(expected, abs=1e-5)
        assert logged[step] == pytest.approx(sum(estimates) / (3 * len(estimates)), abs=1e-6)
    assert abs(logged[-1]) > 1e-3, "else the policy is still the reference"


def test_logged_rewards_are_those_without_it(toy, tmp_path):
    """And the first step, at the reference, is that of a run without it."""
    (tmp_path / "without").mkdir()
    with_kl = toy("kl_in_reward={}", "training.num_steps=1")
    without = toy("training.num_steps=1", folder=tmp_path / "without")
    (line,) = [m for m in metrics_of(with_kl) if "reward" in m]
    (plain,) = [m for m in metrics_of(without) if "reward" in m]
    assert line.pop("kl_in_reward") == 0
    assert line == plain
    left, right = weights_of(with_kl), weights_of(without)
    assert all(torch.equal(left[name], right[name]) for name in left)
