"""Every ratio-control loss through one table: what all of them, old and new, have in common.

A batch here is a whole optimizer step with ragged groups; what couples samples is found at its real
log-ratios, once, as the trainer does.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from core_oracles import close, prepared, random_case, reduced
from pydantic import ValidationError
from ratio_oracles import KEPT, LENGTHS, group_case, ready

from mmrl import reduction
from mmrl.objectives import (
    cispo,
    etr,
    gbpo,
    grpo,
    grpo_guard,
    mdpo_mirror,
    mhpo,
    p3o_pairwise,
    r2vpo,
    real,
    reinforce,
    sapo,
)
from mmrl.regularisers import entropy, entropy_target, kl_reference, kl_target, orpo_occupancy
from mmrl.resolve import names
from mmrl.types import PolicyTerms

PLAIN = {"drift_correction": False, "std_normalisation": False, "reweight": False}
SAMPLES = sorted(i for rows in KEPT.values() for i in rows)
UNCLIPPED = grpo.Config(clip_low=1.0, clip_high=1e9)

# --- what stands for the advantage at ratio 1 -----------------------------------------------------


def advantage(batch):
    return batch.advantages.tolist()


def times(factor):
    return lambda batch: [factor * a for a in advantage(batch)]


def by_length(rule):
    """A sum over the decisions of a sample, where others have its mean."""
    return lambda batch: [a * n for a, n in zip(rule(batch), LENGTHS, strict=True)]


def median_side(batch):
    """GBPO with a hard target: A on the side of the median where it lies, else the opposite."""
    found, values = [0.0] * 9, advantage(batch)
    for rows in KEPT.values():
        median = statistics.median(values[i] for i in rows) if len(rows) > 1 else 0.0
        for i in rows:
            found[i] = abs(values[i]) * ((values[i] > median) - (values[i] < median))
    return found


def leave_one_out(batch):
    found, values = [0.0] * 9, advantage(batch)
    for rows in KEPT.values():
        for i in rows:
            others = [values[j] for j in rows if j != i]
            found[i] = values[i] - statistics.fmean(others) if others else 0.0
    return found


def class_weights(form):
    def rule(batch):
        found, values, tau = [0.0] * 9, advantage(batch), 0.5
        for rows in KEPT.values():
            right = [i for i in rows if values[i] > 0]
            wrong = [i for i in rows if values[i] <= 0]
            for sign, members in ((1, right), (-1, wrong)):
                for i in members if right and wrong else ():
                    share = 1 / (1 + len(members)) if form == "softmax" else 0.5 / len(rows)
                    found[i] = sign * len(rows) / tau * share
        return found

    return rule


RATIO_CONTROL = {
    "grpo": (grpo, grpo.Config(), advantage),
    "grpo_dual_clip": (grpo, grpo.Config(dual_clip=3), advantage),
    "grpo_delta": (grpo, grpo.Config(delta=4), advantage),
    "gspo": (grpo, grpo.Config(importance="sample"), advantage),
    "guard_plain": (grpo_guard, grpo_guard.Config(**PLAIN), advantage),
    "reinforce": (reinforce, reinforce.Config(), advantage),
    "cispo": (cispo, cispo.Config(low=0.2), advantage),
    "sapo": (sapo, sapo.Config(), advantage),
    "mhpo": (mhpo, mhpo.Config(), times(0.26505)),
    "mhpo_bound": (mhpo, mhpo.Config(hazard=False), advantage),
    "gbpo": (gbpo, gbpo.Config(), median_side),
    "gbpo_reward": (gbpo, gbpo.Config(gap="reward"), median_side),
    "etr": (etr, etr.Config(), advantage),
    "etr_wide": (etr, etr.Config(micro=3, macro=3, clip_max=1), advantage),
    "r2vpo": (r2vpo, r2vpo.Config(), advantage),
    "r2vpo_strong": (r2vpo, r2vpo.Config(multiplier=50), advantage),
    "mdpo": (mdpo_mirror, mdpo_mirror.Config(), advantage),
    "mdpo_short": (mdpo_mirror, mdpo_mirror.Config(step_size=0.1), advantage),
    "mdpo_gaussian": (mdpo_mirror, mdpo_mirror.Config(form="gaussian_kl"), advantage),
    "mdpo_squared": (
        mdpo_mirror,
        mdpo_mirror.Config(form="squared", step_size=0.5),
        by_length(times(2 / 0.5)),
    ),
    "p3o": (p3o_pairwise, p3o_pairwise.Config(), leave_one_out),
    "p3o_product": (p3o_pairwise, p3o_pairwise.Config(ratio="product"), by_length(leave_one_out)),
    "p3o_joint": (p3o_pairwise, p3o_pairwise.Config(form="joint"), leave_one_out),
    "p3o_joint_product": (
        p3o_pairwise,
        p3o_pairwise.Config(form="joint", ratio="product"),
        by_length(leave_one_out),
    ),
    "real": (real, real.Config(), class_weights("softmax")),
    "real_bce": (real, real.Config(form="bce"), class_weights("bce")),
}
"""By name: the loss, and what its gradient at ratio 1 has in place of A."""
PENALTIES = {
    "orpo": (orpo_occupancy, orpo_occupancy.Config()),
    "orpo_chi2": (orpo_occupancy, orpo_occupancy.Config(form="chi2")),
    "orpo_kl": (orpo_occupancy, orpo_occupancy.Config(form="kl")),
    "orpo_step": (orpo_occupancy, orpo_occupancy.Config(form="step_chi2")),
    "kl_target": (kl_target, kl_target.Config(estimator="k3")),
    "entropy_target": (entropy_target, entropy_target.Config(start=2)),
}
LOSSES = {**{name: row[:2] for name, row in RATIO_CONTROL.items()}, **PENALTIES}
by_ratio_loss = pytest.mark.parametrize(
    ("module", "config", "rule"), RATIO_CONTROL.values(), ids=RATIO_CONTROL
)
by_objective = pytest.mark.parametrize(
    ("module", "config"), [row[:2] for row in RATIO_CONTROL.values()], ids=RATIO_CONTROL
)
by_loss = pytest.mark.parametrize(("module", "config"), LOSSES.values(), ids=LOSSES)
TERMS = ("logp", "logp_ref", "entropy", "mean_gap_old", "mean_gap_reference", "step_std")
CONSTANT = {"logp_ref", "step_std"}
"""Terms that do not follow the policy."""


def test_no_ratio_control_loss_is_missing():
    """Neither here nor below, where neutral values are looked at."""
    ratio_control = set(names("objectives")) - {"sft", "nft", "opd"}

    def known(modules):
        return {module.__name__.rpartition(".")[2] for module in modules} & {*names("objectives")}

    assert known(row[0] for row in RATIO_CONTROL.values()) == ratio_control
    assert known(row[0] for row in NEUTRAL.values()).isdisjoint(NO_BASE)
    assert known(row[0] for row in NEUTRAL.values()) | NO_BASE == ratio_control


def case(on_policy: bool = False):
    """``group_case`` with the terms of denoising steps; ratios differ from 1 unless on-policy."""
    terms, batch = group_case(on_policy=on_policy)
    draw = torch.Generator().manual_seed(5)
    gap = torch.rand(9, 4, dtype=torch.float64, generator=draw)
    gaps = {"mean_gap_old": gap, "mean_gap_reference": gap / 2, "step_std": gap + 0.5}
    return replace(terms, entropy=1 + gap, **gaps), batch


def variables(module, config) -> list[str]:
    """Terms through which the policy reaches the loss, log-probabilities first if it reads them."""
    return sorted(module.needs(config) - CONSTANT, key=TERMS.index)


def gradient(module, config, terms, batch, how="sample_mean_of_means"):
    """Value and gradient in the first of its ``variables``, of a mean over the 7 samples."""
    name = variables(module, config)[0]
    x = getattr(terms, name).detach().requires_grad_()
    loss = module.loss(replace(terms, **{name: x}), batch, config).loss
    value = reduced(reduction, loss, batch.mask, batch.weights, how, 4)
    return value.item(), torch.autograd.grad(value, x)[0]


@by_ratio_loss
@pytest.mark.parametrize("explicit", [True, False], ids=["stored", "none"])
def test_at_ratio_one_the_gradient_is_the_policy_gradient(module, config, rule, explicit):
    terms, batch = case(on_policy=True)
    terms = replace(terms, mean_gap_old=torch.zeros(9, 4).double())
    if explicit:
        batch = replace(batch, logp_old=terms.logp.detach().clone())
    _, found = gradient(module, config, terms, ready(module, config, terms, batch))
    wanted = torch.zeros(9, 4).double()
    for i, weight in enumerate(rule(batch)):
        if i in SAMPLES:
            wanted[i, : LENGTHS[i]] = -weight / LENGTHS[i] / 7
    tolerance = 1e-5 if module is mhpo else 1e-12  # the published constant has few digits
    close(found, wanted.tolist(), tolerance)
    assert found.any()


def test_on_policy_means_that_no_ratio_was_stored():
    """The survey of a strictly on-policy step needs no forward: its log-ratios are 0."""
    terms, batch = case(on_policy=True)
    for module, config in LOSSES.values():
        stored = replace(batch, logp_old=terms.logp.detach().clone())
        gaps = replace(terms, mean_gap_old=torch.zeros(9, 4).double())
        first, second = (
            gradient(module, config, gaps, ready(module, config, terms, each))
            for each in (batch, stored)
        )
        assert first[0] == second[0]
        assert torch.equal(first[1], second[1])


@by_loss
def test_order_and_padding_change_nothing(module, config):
    terms, batch = case()
    batch = ready(module, config, terms, batch)
    value, slopes = gradient(module, config, terms, batch)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))

    def moved(tensor, filler=math.nan):
        return (
            None if tensor is None else torch.nn.functional.pad(tensor[order], (0, 2), value=filler)
        )

    other = PolicyTerms(**{name: moved(getattr(terms, name).detach()) for name in TERMS})
    given = replace(
        batch,
        mask=moved(batch.mask, False),
        advantages=batch.advantages[order],
        weights=batch.weights[order],
        logp_old=moved(batch.logp_old, -math.inf),
        signals={name: signal[order] for name, signal in batch.signals.items()},
    )
    moved_value, moved_slopes = gradient(module, config, other, given)
    close(moved_value, value)
    assert moved_slopes.isfinite().all()
    close(moved_slopes[:, :4], slopes[order].tolist())


def part_of(terms, batch, rows, columns):
    some = {name: getattr(terms, name)[rows][:, columns] for name in TERMS}
    small = replace(
        batch,
        mask=batch.mask[rows][:, columns],
        advantages=batch.advantages[rows],
        weights=batch.weights[rows],
        logp_old=batch.logp_old[rows][:, columns],
        signals={name: signal[rows] for name, signal in batch.signals.items()},
    )
    return PolicyTerms(**some), small


def whole_samples(module, config) -> bool:
    if hasattr(module, "needs_whole_samples"):
        return module.needs_whole_samples(config)
    return getattr(config, "importance", "") == "sample"


@by_loss
@pytest.mark.parametrize("how", ["decision_mean", "sample_mean_of_means", "sample_mean_of_sums"])
def test_micro_batches_give_the_same_step(module, config, how):
    """Of single samples, out of order, and where the loss allows it of parts of samples."""
    terms, batch = case()
    batch = ready(module, config, terms, batch)
    value, slopes = gradient(module, config, terms, batch, how)
    name = variables(module, config)[0]
    x = getattr(terms, name).detach().requires_grad_()
    columns = [slice(0, 4)] if whole_samples(module, config) else [slice(0, 1), slice(1, 4)]
    weights = reduction.decision_weights(batch.mask, batch.weights, how)
    total, count = 0.0, reduction.denominator(batch.mask, batch.weights, how)
    for rows in ([8], [2, 0], [1, 7, 5], [6, 3, 4]):
        for some in columns:
            part, small = part_of(replace(terms, **{name: x}), batch, rows, some)
            loss = module.loss(part, small, config).loss
            total = total + reduction.weighted_sum(loss, weights[rows][:, some]) / count
    close(total.item(), value)
    close(torch.autograd.grad(total, x)[0], slopes.tolist())


@by_objective
def test_a_flipped_sign_is_noticed(module, config):
    terms, batch = case(on_policy=True)
    values = [
        gradient(module, config, terms, ready(module, config, terms, given))[1]
        for given in (batch, replace(batch, advantages=-batch.advantages))
    ]
    assert (values[0] * values[1]).sum() < 0


FROZEN = {mhpo: "zeta", cispo: "log_ratio"}
"""What a loss takes for a constant though it follows the policy; differences must hold it."""


@by_loss
def test_gradient_matches_finite_differences(module, config, monkeypatch):
    """What couples samples is found anew beside each point, so of a step's whole loss."""
    terms, batch = case()
    found = variables(module, config)
    if module in FROZEN:
        monkeypatch.setattr(module, FROZEN[module], once(getattr(module, FROZEN[module])))

    def value(*inputs):
        given = replace(terms, **dict(zip(found, inputs, strict=True)))
        loss = module.loss(given, ready(module, config, given, batch), config).loss
        return reduced(reduction, loss, batch.mask, batch.weights, "sample_mean_of_means", 4)

    inputs = [getattr(terms, name).detach().requires_grad_() for name in found]
    assert torch.autograd.grad(value(*inputs), inputs[0])[0].any()
    assert torch.autograd.gradcheck(value, inputs, atol=1e-7)


def once(function):
    """``function`` that answers with its first result ever after."""
    results = []

    def first(*arguments):
        results.extend([] if results else [function(*arguments).detach()])
        return results[0]

    return first


@by_loss
@pytest.mark.parametrize("gap", [1e3, -1e3])
def test_extremes_are_finite_in_float32(module, config, gap):
    terms, batch = case()
    logp = torch.full((9, 4), gap)
    others = dict.fromkeys(("mean_gap_old", "mean_gap_reference", "entropy"), logp.abs())
    others |= {"logp_ref": torch.zeros(9, 4), "step_std": torch.full((9, 4), 1e-3)}
    terms = PolicyTerms(logp=logp, **others)
    batch = replace(batch, logp_old=torch.zeros(9, 4))
    given = ready(module, config, terms, batch)
    out = module.loss(terms, given, config)
    assert out.loss[batch.mask.any(1)].isfinite().all()
    assert all(torch.tensor(pair).isfinite().all() for pair in out.metrics.values())
    assert gradient(module, config, terms, given)[1].isfinite().all()


def test_a_batch_without_its_signals_is_refused():
    terms, batch = case()
    for module, config in ((gbpo, gbpo.Config()), (etr, etr.Config()), (real, real.Config())):
        with pytest.raises(ValueError, match="the batch has no signal"):
            module.loss(terms, batch, config)


# --- neutral values -------------------------------------------------------------------------------

NO_BASE = {"grpo", "reinforce", "cispo", "sapo", "gbpo", "p3o_pairwise", "real"}
"""Those that are a base, or with no setting are another objective."""
NEUTRAL = {
    "grpo_guard": (
        grpo_guard,
        grpo_guard.Config(clip_low=0.2, clip_high=0.28, **PLAIN),
        grpo,
        grpo.Config(clip_low=0.2, clip_high=0.28),
    ),
    "mhpo": (mhpo, mhpo.Config(bound=None, hazard=False), grpo, UNCLIPPED),
    "r2vpo": (r2vpo, r2vpo.Config(multiplier=0, rate=0), grpo, UNCLIPPED),
    "mdpo": (mdpo_mirror, mdpo_mirror.Config(step_size=1e300), grpo, UNCLIPPED),
    "etr": (
        etr,
        etr.Config(micro=0, macro=0),
        grpo,
        grpo.Config(clip_low=0.2, clip_high=0.28),
    ),
    "kl_target": (
        kl_target,
        kl_target.Config(estimator="k3", rate=0),
        kl_reference,
        kl_reference.Config(estimator="k3"),
    ),
    "entropy_target": (entropy_target, entropy_target.Config(start=1), entropy, entropy.Config()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("module", "config", "base", "other"), NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_values_give_the_base_method_to_the_bit(module, config, base, other, dtype):
    terms, batch = random_case()
    kept = {"logp": terms.logp.detach(), "logp_ref": terms.logp_ref, "entropy": terms.entropy}
    terms = PolicyTerms(**{name: value.to(dtype) for name, value in kept.items()})
    batch = replace(batch, logp_old=batch.logp_old.to(dtype))
    given = prepared(module, config, batch, torch.arange(6) // 3, {})
    if module is mdpo_mirror and dtype is torch.float32:
        config = mdpo_mirror.Config(step_size=1e30)
    found, wanted = module.loss(terms, given, config), base.loss(terms, batch, other)
    assert torch.equal(found.loss[batch.mask], wanted.loss[batch.mask])
    shared = found.metrics.keys() & wanted.metrics.keys()
    assert {name: found.metrics[name] for name in shared} == {
        name: wanted.metrics[name] for name in shared
    }


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
        (mhpo, {"bound": 0}),
        (mhpo, {"onset_up": 0}),
        (gbpo, {"temperature": 0}),
        (etr, {"clip_max": 1.5}),
        (etr, {"reward_range": 0}),
        (r2vpo, {"target": 0}),
        (r2vpo, {"rate": -1}),
        (r2vpo, {"multiplier_min": 5, "multiplier_max": 1}),
        (mdpo_mirror, {"step_size": 0}),
        (mdpo_mirror, {"form": "reverse"}),
        (p3o_pairwise, {"clip": -0.1}),
        (real, {"temperature": 0}),
        (orpo_occupancy, {"form": "tv"}),
        (kl_target, {"target": 0}),
        (kl_target, {"multiplier_max": 0.5}),
        (entropy_target, {"max_multiplier": -1}),
        (entropy_target, {"start": 99}),
    ],
)
def test_configurations_outside_their_range_are_refused(module, wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        module.Config(**wrong)
