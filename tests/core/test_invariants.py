"""Gradients, limits and invariances that any correct objective, penalty or reduction has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_oracles import AGGREGATIONS, batch_of, close, fit, float64, random_case, reduced

from mmrl import divergences, reduction
from mmrl.errors import UserError
from mmrl.objectives import cispo, grpo, grpo_guard, nft, opd, reinforce, sapo, sft
from mmrl.regularisers import entropy, kl_ema, kl_reference, kl_transition
from mmrl.types import PolicyTerms

POLICY_GRADIENTS = {
    "decision": (grpo, grpo.Config(clip_low=0.1, clip_high=0.3)),
    "sample": (grpo, grpo.Config(clip_low=0.01, clip_high=0.1, importance="sample")),
    "dual_clip": (grpo, grpo.Config(clip_low=0.1, clip_high=0.3, dual_clip=1.5)),
    "delta": (grpo, grpo.Config(clip_low=0.1, clip_high=0.3, delta=1.5)),
    "reinforce": (reinforce, reinforce.Config()),
    "cispo": (cispo, cispo.Config(low=0.2)),
    "cispo_absolute": (cispo, cispo.Config(bounds="absolute", high=1.5)),
    "sapo": (sapo, sapo.Config()),
}
OBJECTIVES = {
    **POLICY_GRADIENTS,
    "guard": (grpo_guard, grpo_guard.Config(clip_low=0.1, clip_high=0.3)),
}
DISTILLATIONS = {
    "nft": (nft, nft.Config()),
    "opd": (opd, opd.Config()),
    "opd_drop_dt": (opd, opd.Config(denominator="drop_dt")),
    "sft": (sft, sft.Config()),
}
PENALTIES = {
    **{
        name: (kl_reference, kl_reference.Config(coef=1, estimator=name))
        for name in ("velocity", "velocity_elbo", "k1", "k2", "k3")
    },
    **{
        f"{name}_weighted": (
            kl_reference,
            kl_reference.Config(coef=1, estimator=name, ratio_weighted=True),
        )
        for name in ("k1", "k2", "k3")
    },
    "ema": (kl_ema, kl_ema.Config()),
    "ema_elbo": (kl_ema, kl_ema.Config(estimator="velocity_elbo")),
    "transition": (kl_transition, kl_transition.Config()),
    "transition_drop_dt": (kl_transition, kl_transition.Config(denominator="drop_dt")),
    "entropy": (entropy, entropy.Config()),
    "entropy_top": (entropy, entropy.Config(top_share=0.4)),
}
LOSSES = {**OBJECTIVES, **DISTILLATIONS, **PENALTIES}
SMOOTH = {name: loss for name, loss in LOSSES.items() if loss[0] is not cispo}
"""Losses whose gradient is that of their value; test_cispo has the other."""
DIFFERENTIABLE = (
    "logp",
    "entropy",
    "velocity_gap_reference",
    "velocity_gap_ema",
    "implicit_positive",
    "implicit_negative",
    "mean_gap_old",
    "mean_gap_reference",
    "mean_gap_teacher",
)
CONSTANT = ("logp_ref", "sigma", "step_size", "step_std", "diffusion")
by_policy_gradient = pytest.mark.parametrize(
    ("module", "config"), POLICY_GRADIENTS.values(), ids=POLICY_GRADIENTS
)
by_objective = pytest.mark.parametrize(("module", "config"), OBJECTIVES.values(), ids=OBJECTIVES)
by_loss = pytest.mark.parametrize(("module", "config"), LOSSES.values(), ids=LOSSES)


def value_of(module, config, terms, batch, aggregation="decision_mean"):
    loss = module.loss(terms, fit(module, batch), config).loss
    return reduced(reduction, loss, batch.mask, batch.weights, aggregation, 7)


def gradients(module, config, terms, batch, aggregation="decision_mean"):
    leaves = {name: getattr(terms, name).detach().requires_grad_() for name in DIFFERENTIABLE}
    value = value_of(module, config, replace(terms, **leaves), batch, aggregation)
    return torch.autograd.grad(value, list(leaves.values()), allow_unused=True)


@pytest.mark.parametrize(("module", "config"), SMOOTH.values(), ids=SMOOTH)
def test_gradient_matches_finite_differences(module, config):
    terms, batch = random_case()
    names = [name for name in DIFFERENTIABLE if name in module.needs(config)]

    def value(*leaves):
        named = dict(zip(names, leaves, strict=True))
        return value_of(module, config, replace(terms, **named), batch)

    leaves = [getattr(terms, name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-7)
    assert any(g is not None and g.any() for g in gradients(module, config, terms, batch))


@by_policy_gradient
@pytest.mark.parametrize("explicit", [True, False], ids=["stored", "none"])
def test_on_policy_gradient_is_the_policy_gradient(module, config, explicit):
    """At logp == logp_old each of them has the gradient of -A logp (or of its sample mean)."""
    terms, batch = random_case(on_policy=True)
    if explicit:
        batch = replace(batch, logp_old=terms.logp.detach().clone())
    gradient, *_ = gradients(module, config, terms, batch, "sample_mean_of_means")
    length = batch.mask.sum(1, keepdim=True).clamp(min=1)
    share = batch.mask * batch.weights[:, None] / length / 4  # four trained samples
    close(gradient, (-batch.advantages[:, None] * share).tolist())


@pytest.mark.parametrize("importance", ["decision", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_without_old_logp_is_bitwise_one(importance, dtype):
    logp = (-1e4 * torch.rand(4, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    batch = batch_of(torch.ones(4, 7, dtype=torch.bool), float64([1, -1, 0.5, 2]))
    config = grpo.Config(importance=importance)
    out = grpo.loss(PolicyTerms(logp=logp.requires_grad_()), batch, config)
    assert torch.equal(out.loss, -batch.advantages[:, None].to(dtype).expand_as(out.loss))
    assert out.metrics["clip_ratio/region"][0] == 0
    assert out.metrics["approx_kl"][0] == 0


@by_objective
def test_zero_advantage_has_zero_gradient(module, config):
    terms, batch = random_case()
    batch = replace(batch, advantages=torch.zeros(6).double())
    assert not gradients(module, config, terms, batch)[0].any()


@by_objective
def test_negating_the_objective_is_noticed(module, config):
    terms, batch = random_case()
    flipped = replace(batch, advantages=-batch.advantages)
    original = gradients(module, config, terms, batch)[0]
    assert (original * gradients(module, config, terms, flipped)[0]).sum() < 0


def test_equal_clips_are_the_symmetric_form():
    """max(-A r, -A clamp(r)) = -(A r - |A| max(0, sign(A)(r - 1) - c)): PPO's hinge form."""
    terms, batch = random_case()
    loss = grpo.loss(terms, batch, grpo.Config(clip_low=0.2, clip_high=0.2)).loss
    ratio = (terms.logp - batch.logp_old).exp()
    advantages = batch.advantages[:, None]
    hinge = (advantages.sign() * (ratio - 1) - 0.2).clamp(min=0)
    expected = advantages.abs() * hinge - advantages * ratio
    close(loss[batch.mask], expected[batch.mask].tolist())


def test_one_decision_makes_sample_and_decision_ratios_equal():
    terms, batch = random_case()
    one = PolicyTerms(logp=terms.logp[:, :1])
    batch = replace(batch, mask=batch.mask[:, :1], logp_old=batch.logp_old[:, :1])
    losses = [
        grpo.loss(one, batch, grpo.Config(importance=importance))
        for importance in ("decision", "sample")
    ]
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert losses[0].metrics == losses[1].metrics


@by_loss
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_changes_nothing(module, config, aggregation):
    """Columns of NaN and infinity behind the mask, and a row of weight 0."""
    terms, batch = random_case()
    expected = value_of(module, config, terms, batch, aggregation)

    def padded(value, filler):
        return None if value is None else torch.nn.functional.pad(value, (0, 3, 0, 1), value=filler)

    named = {name: padded(getattr(terms, name), float("nan")) for name in DIFFERENTIABLE}
    named |= {name: padded(getattr(terms, name), 0.0) for name in CONSTANT}
    named["logp_ref"] = padded(terms.logp_ref, float("-inf"))
    more = PolicyTerms(**named)
    wide = batch_of(
        padded(batch.mask, False),
        torch.nn.functional.pad(batch.advantages, (0, 1), value=3.0),
        torch.nn.functional.pad(batch.weights, (0, 1)),
        padded(batch.logp_old, float("-inf")),
    )
    close(value_of(module, config, more, wide, aggregation), expected.item())
    for before, after in zip(
        gradients(module, config, terms, batch, aggregation),
        gradients(module, config, more, wide, aggregation),
        strict=True,
    ):
        if before is not None:
            close(after[:6, :5], before.tolist())
            assert after.isfinite().all()
    metrics = module.loss(terms, fit(module, batch), config).metrics
    more_metrics = module.loss(more, fit(module, wide), config).metrics
    assert more_metrics.keys() == metrics.keys()
    for name, pair in more_metrics.items():
        close(pair, metrics[name])


def rows(terms, batch, index):
    named = {name: getattr(terms, name)[index] for name in (*DIFFERENTIABLE, *CONSTANT)}
    part = batch_of(
        batch.mask[index], batch.advantages[index], batch.weights[index], batch.logp_old[index]
    )
    return PolicyTerms(**named), part


@by_loss
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[5], [3, 0, 4], [2, 1]]])
def test_micro_batches_in_any_order_give_the_same_step(module, config, aggregation, split):
    terms, batch = random_case()
    parts = [rows(terms, batch, index) for index in split]
    total = sum(reduction.denominator(b.mask, b.weights, aggregation) for _, b in parts)
    value = 0.0
    for part, micro in parts:
        weights = reduction.decision_weights(micro.mask, micro.weights, aggregation, 7)
        loss = module.loss(part, fit(module, micro), config).loss
        value += reduction.weighted_sum(loss, weights).item() / reduction.step_denominator(total)
    close(value, value_of(module, config, terms, batch, aggregation).item())


@by_loss
@pytest.mark.parametrize("gap", [1e3, -1e3])
def test_extremes_are_finite_in_float32(module, config, gap):
    """Log-ratios of 1e3 nats: loss and gradient are finite, nothing overflows in float32."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    shape = {name: torch.full((2, 3), 1e3) for name in DIFFERENTIABLE[1:]}
    shape |= {name: torch.full((2, 3), 1e-3) for name in CONSTANT[1:]}
    logp = torch.full((2, 3), gap)
    terms = PolicyTerms(logp=logp, logp_ref=torch.zeros(2, 3), **shape)
    batch = batch_of(mask, float64([5, -5]), logp_old=torch.zeros(2, 3))
    out = module.loss(terms, fit(module, batch), config)
    assert out.loss.isfinite().all()
    assert all(torch.tensor(pair).isfinite().all() for pair in out.metrics.values())
    for gradient in gradients(module, config, terms, batch):
        assert gradient is None or gradient.isfinite().all()


def test_log_ratio_clamp_has_its_documented_value():
    assert divergences.LOG_RATIO_LIMIT == 20
    at_limit = divergences.k3(float64([20.0, -20.0]), float64([0.0, 0.0]))
    beyond = divergences.k3(float64([30.0, -1e3]), float64([0.0, 0.0]))
    assert torch.equal(beyond, at_limit)


def test_gaussian_kl_refuses_a_deterministic_step():
    with pytest.raises(ValueError, match="std must be positive"):
        divergences.gaussian_kl(torch.ones(2), torch.tensor([0.1, 0.0]))


def test_elbo_weight_at_sigma_zero_is_refused():
    terms, batch = random_case()
    terms = replace(terms, sigma=torch.zeros(6, 5).double())
    with pytest.raises(ValueError, match="std must be positive"):
        kl_ema.loss(terms, batch, kl_ema.Config(estimator="velocity_elbo"))


def test_reference_side_has_no_gradient():
    terms, batch = random_case()
    ref = terms.logp_ref.clone().requires_grad_()
    config = kl_reference.Config(estimator="k2")
    loss = kl_reference.loss(replace(terms, logp_ref=ref), batch, config).loss
    assert torch.autograd.grad(loss.sum(), ref, allow_unused=True) == (None,)


class TestReduction:
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    weights = float64([1, 1, 1])

    @pytest.mark.parametrize(("count_empty", "value"), [(False, 3.75), (True, 2.5)])
    def test_fully_masked_rows_count_only_on_request(self, count_empty, value):
        loss = float64([[2, 3], [7, 7], [5, 9]])
        how = "sample_mean_of_means"
        weights = reduction.decision_weights(self.mask, self.weights, how)
        total = reduction.denominator(self.mask, self.weights, how, count_empty=count_empty)
        assert reduction.weighted_sum(loss, weights).item() / total == pytest.approx(value)

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_nothing_trained_is_zero(self, aggregation):
        nothing = torch.zeros(3).double()
        loss = torch.full((3, 2), float("nan"), dtype=torch.float64)
        assert reduced(reduction, loss, self.mask, nothing, aggregation, 4).item() == 0

    def test_float32_losses_are_summed_in_float64(self):
        loss = torch.tensor([[2.0**24, 1.0, 1.0]])
        mask = torch.ones(1, 3, dtype=torch.bool)
        value = reduced(reduction, loss, mask, float64([1.0]), "decision_sum")
        assert value.item() == 2**24 + 2  # float32 would give 2^24

    def test_sample_losses_stand_for_each_decision(self):
        loss = float64([[2], [7], [5]])
        for how in AGGREGATIONS:
            single = reduced(reduction, loss, self.mask, self.weights, how, 4)
            spread = reduced(reduction, loss.expand(3, 2), self.mask, self.weights, how, 4)
            close(single, spread.item())

    def test_a_loss_of_another_shape_is_refused(self):
        with pytest.raises(ValueError, match=r"loss \(3, 3\) does not fit"):
            reduction.weighted_sum(torch.ones(3, 3), torch.ones(3, 2).double())

    def test_user_mistakes_are_named(self):
        with pytest.raises(UserError, match="did you mean 'decision_mean'"):
            reduction.denominator(self.mask, self.weights, "decsion_mean")
        for horizon in (None, 0):
            with pytest.raises(UserError, match=f"horizon: {horizon}"):
                reduction.decision_weights(
                    self.mask, self.weights, "sample_sum_over_horizon", horizon
                )


def test_rows_side_by_side_get_any_width():
    rows = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]
    assert reduction.side_by_side(rows).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert reduction.side_by_side(rows, 2).tolist() == [[1, 2], [4, 0]]
    assert reduction.side_by_side(rows, 4).tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
