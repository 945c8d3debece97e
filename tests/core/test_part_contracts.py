"""Every part in the folders of the core keeps its contract; a new file is covered at once."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import get_type_hints

import pytest
import torch
from core_oracles import fit, fit_scores, random_case, random_scores

from mmrl.config import Part
from mmrl.per_decision import apart
from mmrl.preflight import takes_samples_together
from mmrl.resolve import entries, names, resolve
from mmrl.schema import StrictModel
from mmrl.types import TERMS, Advantages, LossTerms, Moment, Tempering

FUNCTIONS = {
    "objectives": ("needs", "loss"),
    "regularisers": ("needs", "loss"),
    "corrections": ("needs", "correct"),
    "advantages": ("estimate",),
    "modulators": ("modulate",),
    "selection": ("needs", "select"),
    "samplers": ("take",),
    "budgets": ("bounds", "allocate"),
}
KEEPS_UNSCORED = {"none"}
"""Estimators that train on samples without a reward, because they read none."""
EVIDENCE = ("code", "paper", "reconstructed")
PARTS = [(kind, name) for kind in FUNCTIONS for name in names(kind)]


def parts(*kinds: str):
    chosen = [(kind, name) for kind, name in PARTS if kind in kinds]
    return pytest.mark.parametrize(("kind", "name"), chosen, ids=[n for _, n in chosen])


def test_shipped_parts_are_found():
    assert {("objectives", "grpo"), ("objectives", "reinforce")} <= set(PARTS)
    assert {("objectives", "cispo"), ("objectives", "sapo"), ("objectives", "sft")} <= set(PARTS)
    assert {("advantages", "group"), ("advantages", "leave_one_out")} <= set(PARTS)
    assert {("advantages", "g2rpo"), ("regularisers", "entropy")} <= set(PARTS)
    assert {("modulators", n) for n in ("clip", "drop_zero", "dcpo")} <= set(PARTS)
    assert {("regularisers", "kl_reference"), ("regularisers", "kl_ema")} <= set(PARTS)
    assert ("corrections", "importance_sampling") in PARTS
    assert {("samplers", "uniform"), ("samplers", "round_robin")} <= set(PARTS)
    assert ("samplers", "budgets") not in PARTS
    assert ("budgets", "knapsack") in PARTS
    assert {("selection", n) for n in ("d3s", "entropy_quantile", "pf_ppo")} <= set(PARTS)


@parts(*FUNCTIONS)
def test_documentation(kind, name):
    module = resolve(kind, name)
    entry = next(entry for entry in entries(kind) if entry.name == name)
    assert entry.summary.endswith("."), "the first docstring line is a sentence"
    assert entry.paper == module.PAPER
    assert not module.PAPER or any(mark in module.PAPER for mark in ("arXiv:", "doi:"))
    for function in FUNCTIONS[kind]:
        assert inspect.getdoc(getattr(module, function))


@parts(*FUNCTIONS)
def test_what_has_a_paper_says_how_its_formula_is_known(kind, name):
    entry = next(entry for entry in entries(kind) if entry.name == name)
    assert entry.evidence in (EVIDENCE if entry.paper else ("",))
    assert entry.evidence == getattr(resolve(kind, name), "EVIDENCE", "")


@parts(*FUNCTIONS)
def test_configuration(kind, name):
    config = resolve(kind, name).Config
    assert issubclass(config, StrictModel)
    assert config() == config.model_validate({}), "the defaults alone are a valid configuration"
    for key, field in config.model_fields.items():
        assert field.description, f"{key} is not documented"
    if kind == "regularisers":
        assert config.model_fields["coef"].metadata, "coef has no lower bound"
        with pytest.raises(ValueError, match="coef"):
            config(coef=-1)
    if kind in ("advantages", "selection"):
        assert resolve(kind, name).MIN_GROUP_SIZE >= 1


@parts(*FUNCTIONS)
def test_signatures(kind, name):
    module = resolve(kind, name)
    for function in FUNCTIONS[kind]:
        reference = getattr(resolve(kind, names(kind)[0]), function)
        parameters = list(inspect.signature(getattr(module, function)).parameters)
        if hasattr(module, "learn") and kind == "modulators":
            assert parameters.pop() == "state", "one that remembers is given what it knows"
        assert parameters == list(inspect.signature(reference).parameters)
        assert get_type_hints(getattr(module, function))["config"] is module.Config


def config_of(module):
    """Defaults, with a penalty switched on."""
    return module.Config(coef=0.5) if "coef" in module.Config.model_fields else module.Config()


def only_needed(terms, needs):
    return replace(terms, **{name: None for name in TERMS if name not in needs | {"logp"}})


@parts("objectives", "regularisers")
@pytest.mark.parametrize("on_policy", [True, False])
def test_losses(kind, name, on_policy):
    """Needs are enough; the result is unreduced, finite, unweighted; padding is not logged."""
    module = resolve(kind, name)
    config = config_of(module)
    terms, batch = random_case(on_policy=on_policy)
    batch = fit(module, batch, config)
    needs = module.needs(config)
    assert isinstance(needs, frozenset)
    assert needs <= set(TERMS)
    out = module.loss(only_needed(terms, needs), batch, config)
    assert isinstance(out, LossTerms)
    assert out.loss.shape in (batch.mask.shape, (6, 1))
    assert out.loss.isfinite().all()
    heavier = replace(batch, weights=3 * batch.weights)
    assert torch.equal(module.loss(terms, heavier, config).loss, out.loss)
    for total, count in out.metrics.values():
        assert isinstance(total, float)
        assert count in (13, 4), "13 decisions in 4 samples are trained; the rest is padding"
    narrow = replace(terms, **{n: v.float() for n, v in vars(terms).items() if n in TERMS})
    assert module.loss(narrow, batch, config).loss.dtype in (torch.float32, torch.float64)


@parts("objectives", "regularisers")
def test_losses_of_a_batch_without_trained_samples(kind, name):
    module = resolve(kind, name)
    terms, batch = random_case()
    idle = replace(fit(module, batch), weights=torch.zeros(6).double())
    out = module.loss(terms, idle, config_of(module))
    assert all(pair == (0, 0) for pair in out.metrics.values())


@parts("objectives")
def test_objectives_treat_decisions_apart_or_say_so(kind, name):
    """Then each decision may have an advantage of its own."""
    module = resolve(kind, name)
    config = module.Config()
    if takes_samples_together(Part(kind, name, config)):
        return
    terms, batch = random_case()
    batch = fit(module, batch)
    whole = module.loss(terms, batch, config)
    assert whole.loss.shape == batch.mask.shape
    values = batch.advantages[:, None].expand(batch.mask.shape)
    split = module.loss(*apart(terms, batch, values), config)
    assert torch.equal(split.loss.reshape(6, 5)[batch.mask], whole.loss[batch.mask])
    assert split.metrics.keys() == whole.metrics.keys()
    for key, pair in whole.metrics.items():
        if pair[1] != 4:  # counted by samples
            assert split.metrics[key] == pytest.approx(pair)


@parts("regularisers")
def test_a_regulariser_of_weight_zero_computes_nothing(kind, name):
    module = resolve(kind, name)
    config = module.Config(coef=0)
    assert module.needs(config) == frozenset()
    terms, batch = random_case()
    out = module.loss(only_needed(terms, frozenset()), batch, config)
    assert not out.loss.any()
    assert out.metrics == {}


@parts("regularisers")
def test_a_regulariser_ignores_advantages(kind, name):
    module = resolve(kind, name)
    terms, batch = random_case()
    config = config_of(module)
    batch = fit(module, batch, config)
    other = replace(batch, advantages=-3 * batch.advantages)
    assert torch.equal(
        module.loss(terms, batch, config).loss, module.loss(terms, other, config).loss
    )


@parts("corrections")
@pytest.mark.parametrize("objective", [n for n in names("objectives")])
def test_corrections_of_every_objective(kind, name, objective):
    """The result is unreduced and finite, of the same dtype; metrics of the objective stay."""
    module, losses = resolve(kind, name), resolve("objectives", objective)
    terms, batch = random_case()
    batch = fit(losses, batch)
    policy = losses.loss(terms, batch, losses.Config())
    needs = module.needs(module.Config())
    assert needs <= set(TERMS)
    out = module.correct(policy, only_needed(terms, needs), batch, module.Config())
    assert out.loss.shape in (batch.mask.shape, (6, 1))
    assert out.loss.dtype == policy.loss.dtype
    assert out.loss[batch.mask.any(1)].isfinite().all()
    assert policy.metrics.items() < out.metrics.items()
    idle = replace(batch, weights=torch.zeros(6).double())
    pairs = (
        module.correct(policy, terms, idle, module.Config()).metrics.items()
        - policy.metrics.items()
    )
    assert {pair for _, pair in pairs} == {(0, 0)}


@parts("advantages")
def test_estimators(kind, name):
    module = resolve(kind, name)
    scores = fit_scores(module, random_scores())
    advantages, state = module.estimate(scores, module.Config(), {})
    assert isinstance(advantages, Advantages)
    assert name in KEEPS_UNSCORED or not advantages.keep[~scores.valid].any()
    assert not advantages.values[~scores.valid].any()
    assert json.loads(json.dumps(state)) == state
    assert all(isinstance(value, float) for value in advantages.metrics.values())


@parts("selection")
@pytest.mark.parametrize("step", [0, 3])
def test_selections(kind, name, step):
    """What is dropped stays dropped, the rest keeps its advantage, earlier metrics and counts."""
    module = resolve(kind, name)
    scores = random_scores()
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(13, dtype=torch.float64, generator=draw).masked_fill(~scores.valid, 0)
    tempering = Tempering(scale=values.abs(), temperature=1.2)
    given = Advantages(
        values=values, keep=scores.valid, tempering=tempering, metrics={"reward_std": 1.0}
    )
    moment = Moment(step=step, num_steps=4, seed=0)
    out = module.select(given, scores, moment, module.Config())
    assert not (out.keep & ~given.keep).any()
    left, share = int(out.keep.sum()), getattr(module, "decision_share", lambda *_: 1.0)
    assert 0 < left <= int(given.keep.sum())
    assert left < int(given.keep.sum()) or share(moment, module.Config()) < 1, "it leaves some out"
    assert torch.equal(out.values, values.where(out.keep, 0.0))
    assert out.metrics["reward_std"] == 1.0
    assert out.metrics["selection/samples"] == int(out.keep.sum()) / int(given.keep.sum())
    assert out.tempering is tempering
    nothing = replace(given, values=0 * values, keep=torch.zeros(13).bool())
    assert not module.select(nothing, scores, moment, module.Config()).keep.any()
    assert module.needs(module.Config()) <= set(TERMS)


@parts("modulators")
def test_modulators(kind, name):
    """What is dropped stays dropped and zero, and earlier metrics stay."""
    module = resolve(kind, name)
    scores = random_scores()
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(13, dtype=torch.float64, generator=draw).masked_fill(~scores.valid, 0)
    given = Advantages(values=values, keep=scores.valid, metrics={"reward_std": 1.0})
    state = ({},) if hasattr(module, "learn") else ()
    out = module.modulate(given, scores, module.Config(), *state)
    assert isinstance(out, Advantages)
    assert not (out.keep & ~given.keep).any()
    assert not out.values[~given.keep].any()
    assert out.metrics["reward_std"] == 1.0
