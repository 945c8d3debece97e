"""DCPO: how hard it pushes, where to, and advantages that differ between decisions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, clipped, close, entries, float64, random_case
from pydantic import ValidationError

from mmrl import per_decision
from mmrl.modulators.dcpo import Config, learn, modulate, strength
from mmrl.objectives import cispo, grpo, reinforce, sapo
from mmrl.types import Advantages, PolicyTerms, Scores, Tempering

SCALE = [0.3, 0.0, 0.2, 0.1, 0.4, 0.5]


def step(rewards=(1.0, 0.0, 0.04, 2.0), keep=(True, True, True, True)):
    kept = torch.tensor(keep)
    scores = Scores(combined=float64(rewards), group=torch.zeros(len(rewards)).long(), valid=kept)
    values = float64([1.0, -1.0, -0.5, 0.5]).where(kept, 0.0)
    return Advantages(values=values, keep=kept, metrics={"m": 1.0}), scores


def tempered_case(cap=2.0, on_policy=False):
    terms, batch = random_case(on_policy=on_policy)
    tempering = Tempering(scale=float64(SCALE), temperature=1.2, cap=cap)
    return terms, replace(batch, tempering=tempering)


# (f) 1


@pytest.mark.parametrize(
    ("config", "state"),
    [
        (Config(), {"surprise": 0.5}),
        (Config(target_entropy=0.0), {}),
        (Config(max_gap=0.0), {"surprise": 0.1}),
    ],
)
def test_1_at_the_target_nothing_changes(config, state):
    given, scores = step()
    out = modulate(given, scores, config, state)
    assert torch.equal(out.values, given.values)
    assert out.tempering is None
    assert out.metrics == {"m": 1.0, "dcpo/alpha": 0.0}


def test_nothing_is_added_where_no_sample_is_good():
    given, scores = step(rewards=(0.0, 0.05, -1.0, 0.01))
    out = modulate(given, scores, Config(), {})
    assert torch.equal(out.values, given.values)
    assert out.tempering is None


# (f) 3


@pytest.mark.parametrize(
    ("gap", "good", "alpha"), [(0.3, 0.5, 1 / 6), (0.05, 0.5, 1 / 11), (0.3, 0.1, 0.5)]
)
def test_3_the_strength_by_hand(gap, good, alpha):
    assert strength(gap, good, 0.1) == strength(-gap, good, 0.1) == pytest.approx(alpha)


def test_3_the_strength_is_below_one_and_its_mass_about_constant():
    for good in (1e-6, 0.01, 0.3, 1.0):
        alpha = strength(5.0, good, 0.1)
        assert 0 <= alpha < 1
        assert alpha * good == pytest.approx(0.1 / (1 + 0.1 / good))


@pytest.mark.parametrize(
    ("surprise", "temperature"), [(0.0, 1.2), (0.49, 1.2), (0.51, 0.8), (3.0, 0.8)]
)
def test_the_direction_is_towards_the_target(surprise, temperature):
    given, scores = step(keep=(True, True, True, False))
    out = modulate(given, scores, Config(), {"surprise": surprise})
    alpha = strength(0.5 - surprise, 1 / 3, 0.1)
    assert out.metrics["dcpo/alpha"] == alpha
    close(out.values, [(1 - alpha) * x for x in given.values.tolist()])
    close(out.tempering.scale, [alpha, 0, 0, 0])
    assert out.tempering.temperature == temperature
    assert out.tempering.cap == 10.0
    assert torch.equal(out.keep, given.keep)


def test_the_first_step_pushes_up_and_the_next_knows_the_last():
    given, scores = step()
    first = modulate(given, scores, Config(), {})
    assert first.tempering.temperature == 1.2
    state = learn({"surprise": 0.7, "reward": 1.0}, Config(), {})
    assert state == json.loads(json.dumps(state)) == {"surprise": 0.7}
    assert modulate(given, scores, Config(), state).tempering.temperature == 0.8
    assert learn({"reward": 1.0}, Config(), state) == state, "a step without an update"


# (f) 2


@pytest.mark.parametrize("temperature", [1.2, 0.8, 1.0])
@pytest.mark.parametrize("module", [grpo, reinforce, cispo, sapo])
def test_2_the_expected_push_is_towards_the_tempered_policy(temperature, module):
    """By enumeration: every action of a softmax policy, weighted by its probability."""
    alpha = 0.3
    logits = float64([0.5, -1.0, 2.0, 0.1, -0.3]).requires_grad_()
    logp = logits.log_softmax(-1)
    tempered = (logits.detach() / temperature).log_softmax(-1)
    p, p_tempered = logp.detach().exp(), tempered.exp()
    terms = PolicyTerms(logp=logp[:, None], logp_tempered=tempered[:, None])
    batch = batch_of(torch.ones(5, 1).bool(), torch.zeros(5).double())
    tempering = Tempering(scale=float64([alpha] * 5), temperature=temperature)
    batch = replace(batch, tempering=tempering)
    rho = per_decision.advantages(terms, batch, tempering)[:, 0] / alpha
    assert float((p * rho).sum()) == pytest.approx(1.0, abs=1e-12)
    loss = per_decision.loss(module, terms, batch, module.Config()).loss[:, 0]
    (gradient,) = torch.autograd.grad((p * loss).sum(), logits)
    close(-gradient, (alpha * (p_tempered - p)).tolist())
    entropies = [-float((q * q.log()).sum()) for q in (p, p_tempered)]
    assert (entropies[1] - entropies[0]) * (temperature - 1) >= 0, "flatter where T > 1"


# The loss


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("on_policy", [True, False])
def test_advantages_of_decisions_by_a_loop(cap, on_policy):
    terms, batch = tempered_case(cap, on_policy)
    old = terms.logp.tolist() if on_policy else batch.logp_old.tolist()
    tempered = terms.logp_tempered.tolist()
    found = per_decision.advantages(terms, batch, batch.tempering)
    assert not found.requires_grad
    capped = 0
    for b, k in entries(batch.mask):
        rho = math.exp(tempered[b][k] - old[b][k])
        capped += rho > (cap or math.inf)
        rho = min(rho, cap or math.inf)
        close(found[b, k], float(batch.advantages[b]) + SCALE[b] * rho)
    assert (capped > 0) == (cap is not None)


def test_the_loss_by_a_loop():
    terms, batch = tempered_case()
    config = grpo.Config(clip_low=0.1, clip_high=0.3)
    out = per_decision.loss(grpo, terms, batch, config)
    assert out.loss.shape == batch.mask.shape
    values = per_decision.advantages(terms, batch, batch.tempering).tolist()
    new, old = terms.logp.tolist(), batch.logp_old.tolist()
    clips = 0
    for b, k in entries(batch.mask):
        ratio = math.exp(new[b][k] - old[b][k])
        close(out.loss[b, k], clipped(ratio, values[b][k], 0.1, 0.3))
        over, under = ratio > 1.3 and values[b][k] > 0, ratio < 0.9 and values[b][k] < 0
        clips += float(batch.weights[b]) * (over or under)
    assert out.metrics["clip_ratio/region"] == (clips, 13)
    plain = grpo.loss(terms, batch, config)
    assert not torch.equal(out.loss[batch.mask], plain.loss[batch.mask])


@pytest.mark.parametrize("module", [grpo, reinforce, sapo])
def test_gradient_matches_finite_differences(module):
    terms, batch = tempered_case()
    config = module.Config()

    def value(logp):
        loss = per_decision.loss(module, replace(terms, logp=logp), batch, config).loss
        return (loss * batch.mask * batch.weights[:, None])[batch.mask].sum()

    leaf = terms.logp.detach().requires_grad_()
    assert torch.autograd.gradcheck(value, [leaf], eps=1e-6, atol=1e-7)


def test_a_flipped_sign_is_noticed():
    terms, batch = tempered_case()
    still = replace(batch, advantages=torch.zeros(6).double())
    flipped = replace(still, tempering=replace(batch.tempering, scale=-batch.tempering.scale))
    gradients = []
    for case in (still, flipped):
        leaf = terms.logp.detach().requires_grad_()
        loss = per_decision.loss(reinforce, replace(terms, logp=leaf), case, reinforce.Config())
        gradients.append(torch.autograd.grad(loss.loss[batch.mask].sum(), leaf)[0])
    assert torch.equal(gradients[0], -gradients[1])
    assert bool((gradients[0] <= 0).all()), "what is good is raised"
    assert bool(gradients[0].any())


def test_padding_and_order_change_nothing():
    """Masked decisions may hold anything."""
    terms, batch = tempered_case()
    config = grpo.Config()
    expected = per_decision.loss(grpo, terms, batch, config)
    wild = terms.logp_tempered.masked_fill(~batch.mask, float("nan"))
    old = batch.logp_old.masked_fill(~batch.mask, float("-inf"))
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    moved = PolicyTerms(logp=terms.logp[order], logp_tempered=wild[order])
    other = replace(
        batch_of(batch.mask[order], batch.advantages[order], batch.weights[order], old[order]),
        tempering=per_decision.of_samples(batch.tempering, order.tolist(), torch.device("cpu")),
    )
    found = per_decision.loss(grpo, moved, other, config)
    mask = batch.mask[order]
    assert torch.equal(found.loss[mask], expected.loss[order][mask])
    for name, pair in expected.metrics.items():
        close(found.metrics[name], pair)


def test_without_a_tempering_it_is_the_loss_itself():
    terms, batch = random_case()
    out = per_decision.loss(grpo, terms, batch, grpo.Config())
    expected = grpo.loss(terms, batch, grpo.Config())
    assert torch.equal(out.loss, expected.loss)
    assert out.metrics == expected.metrics
    # And with one that adds nothing.
    nothing = Tempering(scale=torch.zeros(6).double(), temperature=1.2)
    out = per_decision.loss(grpo, terms, replace(batch, tempering=nothing), grpo.Config())
    assert torch.equal(out.loss[batch.mask], expected.loss[batch.mask])


def test_parameters_outside_their_range_are_named():
    for wrong in (
        {"temperature_up": 0.9},
        {"temperature_down": 1.1},
        {"temperature_down": 0.0},
        {"target_entropy": -1.0},
        {"max_gap": -0.1},
        {"max_weight": 0.5},
    ):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            Config(**wrong)
