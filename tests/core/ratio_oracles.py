"""Loop oracles of the ratio-control losses and adaptive penalties, and checks against them."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from core_oracles import (
    ESTIMATORS,
    batch_of,
    clipped,
    close,
    entries,
    float64,
    prepared,
    random_case,
    ratios,
    trained,
)
from pydantic import ValidationError
from text_oracles import check_approx_kl
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Advantages, LossTerms, PolicyTerms, Scores, Survey, UpdateBatch

GROUP = torch.tensor([3, 1, 3, 1, 3, 8, 1, 3, 1])
"""Ragged and interleaved; of group 8 there is one sample.  Row 6 is empty, row 7 of weight 0."""
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.25, 2.0, 0.5, 1.0, 1.0)
KEPT = {3: (0, 2, 4), 1: (1, 3, 8), 8: (5,)}
LENGTHS = (4, 1, 2, 3, 3, 2, 0, 4, 2)


def group_case(seed: int = 3, on_policy: bool = False) -> tuple[PolicyTerms, UpdateBatch]:
    """9 samples of 3 groups, up to 4 decisions; advantages are REWARDS less the group's mean."""
    draw = torch.Generator().manual_seed(seed)
    logp = -torch.randn(9, 4, dtype=torch.float64, generator=draw).abs()
    shift = 0.5 * torch.randn(9, 4, dtype=torch.float64, generator=draw)
    reference = logp + 0.3 * torch.randn(9, 4, dtype=torch.float64, generator=draw)
    mask = torch.arange(4)[None] < torch.tensor(LENGTHS)[:, None]
    values = [0.0] * 9
    for rows in KEPT.values():
        mean = statistics.fmean(REWARDS[i] for i in rows)
        for i in rows:
            values[i] = REWARDS[i] - mean if len(rows) > 1 else 0.7
    weights = float64([1, 1, 1, 1, 1, 1, 1, 0, 1])
    old = None if on_policy else logp + shift
    batch = batch_of(mask, float64(values), weights, old)
    return PolicyTerms(logp=logp.requires_grad_(), logp_ref=reference), batch


def scores_of(rewards=REWARDS) -> tuple[Scores, Advantages]:
    keep = torch.ones(9, dtype=torch.bool)
    keep[[6, 7]] = False
    _, batch = group_case()
    values = batch.advantages.masked_fill(~keep, 0)
    scores = Scores(combined=float64(rewards), group=GROUP, valid=keep)
    return scores, Advantages(values=values, keep=keep)


def sums(terms: PolicyTerms, batch: UpdateBatch, other: str = "old") -> list[float]:
    """Log-ratio of each sample, the sum over its decisions."""
    found = batch.logp_old if other == "old" else terms.logp_ref
    if found is None:
        return [0.0] * len(batch.mask)
    total = [0.0] * len(batch.mask)
    for b, k in entries(batch.mask):
        total[b] += terms.logp[b, k].item() - found[b, k].item()
    return total


def ready(module: ModuleType, config, terms: PolicyTerms, batch: UpdateBatch) -> UpdateBatch:
    """``batch`` with signals, couplings at its real log-ratios, and a state."""
    log_ratio = {"old": float64(sums(terms, batch))}
    if terms.logp_ref is not None:
        log_ratio["reference"] = float64(sums(terms, batch, "reference"))
    return prepared(module, config, batch, GROUP, log_ratio)


def refused(module: ModuleType, match: str, **options) -> None:
    with pytest.raises((ValidationError, UserError), match=match):
        module.Config(**options)


# --- ratios of decisions --------------------------------------------------------------------------


def check_mhpo(module: ModuleType) -> None:
    for options in (
        {},
        {"bound": 0.7, "shape_up": 2.5, "onset_up": 0.6},
        {"hazard": False},
        {"bound": None},
    ):
        config = module.Config(**options)
        terms, batch = random_case()
        out, found = module.loss(terms, batch, config), ratios(terms, batch, "decision")
        weights = {}
        for (b, k), ratio in found.items():
            x = math.log(ratio)
            psi = config.bound * math.tanh(x / config.bound) if config.bound else x
            hazard = (math.log1p(math.exp(psi)) / config.onset_up) ** config.shape_up
            hazard += (math.log1p(math.exp(-psi)) / config.onset_down) ** config.shape_down
            changed = math.exp(psi - (hazard if config.hazard else 0.0))
            close(out.loss[b, k], -batch.advantages[b].item() * changed)
            sech = 1 / math.cosh(x / config.bound) if config.bound else 1.0
            weights[b, k] = changed * sech**2
        used = trained(batch)
        close(out.metrics["ratio/mean"], (sum(found[key] for key in used), len(used)))
        close(out.metrics["mhpo/weight"], (sum(weights[key] for key in used), len(used)))
        check_approx_kl(out.metrics["approx_kl"], terms, batch)


def check_gbpo(module: ModuleType) -> None:
    scores, advantages = scores_of()
    for options in (
        {"temperature": 1.0, "clip_high": 0.3},
        {"temperature": 0.5, "gap": "reward"},
        {},
    ):
        config = module.Config(**options)
        gaps = module.signals(scores, advantages, config)["gap"]
        expected = [0.0] * 9
        for rows in KEPT.values():
            rewards = [REWARDS[i] for i in rows]
            spread = statistics.stdev(rewards) + 1e-6 if len(rewards) > 1 else 1.0
            median = statistics.median(rewards) if len(rewards) > 1 else 0.0
            for i in rows:
                gap = REWARDS[i] - median
                expected[i] = gap if config.gap == "reward" else gap / spread
        close(gaps, expected)
        terms, batch = group_case()
        given = replace(batch, signals={"gap": gaps})
        out, found = module.loss(terms, given, config), ratios(terms, batch, "decision")
        beyond = opposed = 0
        for (b, k), ratio in found.items():
            scaled = max(min(expected[b] / config.temperature, 700), -700)
            share = 1 / (1 + math.exp(-scaled))
            target = 1 - config.clip_low + (config.clip_low + config.clip_high) * share
            size = batch.advantages[b].item()
            close(out.loss[b, k], abs(ratio - target) * abs(size))
            if batch.weights[b] > 0:
                beyond += (ratio > target > 1 + 1e-12) or (ratio < target < 1 - 1e-12)
                opposed += k == 0 and (target - 1) * size < -1e-12
        count = len(trained(batch))
        close(out.metrics["gbpo/beyond"], (beyond, count))
        close(out.metrics["gbpo/opposed"], (opposed, 7))
        close(out.metrics["ratio/mean"], (sum(found[key] for key in trained(batch)), count))
        check_approx_kl(out.metrics["approx_kl"], terms, batch)
    refused(module, "clip_low", clip_low=1.0)


def check_etr(module: ModuleType) -> None:
    scores, advantages = scores_of()
    options = {"micro": 0.6, "macro": 0.5, "clip_low": 0.15, "clip_high": 0.3, "clip_min": 0.15}
    for more in ({"clip_max": 0.9}, {"clip_max": 0.35, "reward_range": 2.0}):
        config = module.Config(**options, **more)
        spread, expected = module.signals(scores, advantages, config)["spread"], [0.0] * 9
        for rows in KEPT.values():
            variance = statistics.pvariance([REWARDS[i] for i in rows])
            for i in rows:
                expected[i] = min(1.0, variance / (config.reward_range / 2) ** 2)
        close(spread, expected)
        terms, batch = group_case()
        given = replace(batch, signals={"spread": spread})
        out, low, high, total = module.loss(terms, given, config), 0, 0, 0.0
        found = ratios(terms, batch, "decision")
        for (b, k), ratio in found.items():
            size = batch.advantages[b].item()
            scale = (1 + 0.6 * math.tanh(abs(size))) * (1 + 0.5 * expected[b])
            bottom, top = (
                min(max(clip * scale, config.clip_min), config.clip_max) for clip in (0.15, 0.3)
            )
            close(out.loss[b, k], clipped(ratio, size, bottom, top))
            if batch.weights[b] > 0:
                low += ratio < 1 - bottom and size < 0
                high += ratio > 1 + top and size > 0
        total = sum(
            (1 + 0.6 * math.tanh(abs(batch.advantages[i].item()))) * (1 + 0.5 * expected[i])
            for rows in KEPT.values()
            for i in rows
        )
        count = len(trained(batch))
        close(out.metrics["clip_ratio/low"], (low, count))
        close(out.metrics["clip_ratio/high"], (high, count))
        close(out.metrics["etr/scale"], (total, 7))
        check_approx_kl(out.metrics["approx_kl"], terms, batch)
        assert low, "a case without active lower clip tests nothing"
        assert high, "a case without active upper clip tests nothing"
    refused(module, "clip_low: 0.05 is not allowed; allowed: clip_min", clip_low=0.05)
    refused(module, "clip_high: 0.5 is not allowed", clip_high=0.5)
    module.Config(clip_low=0.1, clip_high=0.4)
    close(module.signals(scores, advantages, module.Config())["spread"].max(), 8 / 9)


def check_r2vpo(module: ModuleType) -> None:
    terms, batch = random_case()
    found, used = ratios(terms, batch, "decision"), trained(batch)
    for multiplier in (0.0, 0.3, 4.0):
        out = module.loss(terms, replace(batch, state={"multiplier": multiplier}), module.Config())
        for (b, k), ratio in found.items():
            advantage = batch.advantages[b].item()
            close(out.loss[b, k], -ratio * advantage + multiplier * (ratio - 1) ** 2)
        close(out.metrics["ratio/mean"], (sum(found[key] for key in used), len(used)))
        squares = sum((found[key] - 1) ** 2 for key in used)
        close(out.metrics["ratio/variance"], (squares, len(used)))
        close(out.metrics["r2vpo/multiplier"], (multiplier * len(used), len(used)))
        check_approx_kl(out.metrics["approx_kl"], terms, batch)
    close(module.Config().target, 0.2**2 / 3)  # the variance of a number spread evenly on 1 -+ 0.2
    first = module.Config(multiplier=2.5)
    assert module.initial_state(first) == {"multiplier": 2.5}
    assert torch.equal(
        module.loss(terms, batch, first).loss,
        module.loss(terms, replace(batch, state={"multiplier": 2.5}), first).loss,
    )

    def after(variance: float, start: float = 2.0, **options) -> float:
        config = module.Config(target=0.5, multiplier_min=0.25, multiplier_max=8.0, **options)
        state = {"multiplier": start}
        metrics = {"ratio/variance": variance}
        return module.update_state(state, metrics, config)["multiplier"]

    for variance in (0.1, 0.5, 0.9):
        close(after(variance, rate=1.5), 2.0 + 1.5 * (variance - 0.5))
    assert after(0.0, rate=100) == 0.25
    assert after(1e12, rate=100) == 8.0
    assert after(7.0, rate=0, start=123.0) == 123.0
    kept = {"multiplier": 2.0}
    assert module.update_state(kept, {}, module.Config()) == kept


def check_mdpo_mirror(module: ModuleType) -> None:
    terms, batch = random_case()
    batch = replace(batch, progress=0.25)
    found, used = ratios(terms, batch, "decision"), trained(batch)
    gaps, spread = terms.mean_gap_old.tolist(), terms.step_std.tolist()
    total = sums(terms, batch)
    for schedule, t in (("constant", 0.4), ("linear", 0.3)):
        config = module.Config(step_size=0.4, schedule=schedule)
        out, divergence = module.loss(terms, batch, config), {}
        for (b, k), ratio in found.items():
            divergence[b, k] = ratio * math.log(ratio) - ratio + 1
            close(out.loss[b, k], -ratio * batch.advantages[b].item() + divergence[b, k] / t)
        pair = (sum(divergence[key] for key in used), len(used))
        close(out.metrics["mdpo/divergence"], pair)
        close(out.metrics["ratio/mean"], (sum(found[key] for key in used), len(used)))
        check_approx_kl(out.metrics["approx_kl"], terms, batch)
        gaussian = module.Config(form="gaussian_kl", step_size=0.4, schedule=schedule)
        out = module.loss(terms, batch, gaussian)
        for (b, k), ratio in found.items():
            kl = gaps[b][k] / (2 * spread[b][k] ** 2)
            close(out.loss[b, k], -ratio * batch.advantages[b].item() + kl / t)
        squared = module.Config(form="squared", step_size=0.4, schedule=schedule)
        out = module.loss(terms, batch, squared)
        for b in {b for b, _ in entries(batch.mask)}:
            close(out.loss[b, 0], (total[b] / t - batch.advantages[b].item()) ** 2)
        assert [module.needs_whole_samples(c) for c in (config, squared)] == [False, True]
        assert module.needs(config) == module.needs(squared) == {"logp"}
        assert module.needs(gaussian) == {"logp", "mean_gap_old", "step_std"}
    close(module.step_size(0.99, module.Config(schedule="linear", step_size_min=0.2)), 0.2)
    on_policy, batch = random_case(on_policy=True)
    out = module.loss(on_policy, batch, gaussian)
    close(out.loss[batch.mask], (-batch.advantages[:, None].expand(6, 5))[batch.mask].tolist())
    with pytest.raises(UserError, match="mdpo_mirror: step_std must be positive"):
        module.loss(replace(on_policy, step_std=torch.zeros(6, 5).double()), batch, gaussian)


# --- losses that couple samples -------------------------------------------------------------------


def check_group_helpers(module: ModuleType) -> None:
    values, among = float64(REWARDS), torch.ones(9, dtype=torch.bool)
    among[[6, 7]] = False
    found = module.by_group(values, GROUP, among, lambda x: x - x.min())
    expected = [0.0] * 9
    for rows in KEPT.values():
        for i in rows:
            expected[i] = REWARDS[i] - min(REWARDS[j] for j in rows)
    close(found, expected)
    survey = Survey(group=GROUP, length=torch.ones(9).double(), log_ratio={})
    value, slope = module.group_losses(survey, values, lambda x, rows: (x * values[rows]).sum())
    members = {g: [i for i in range(9) if GROUP[i] == g] for g in (1, 3, 8)}
    for rows in members.values():
        for i in rows:
            close(value[i], sum(REWARDS[j] ** 2 for j in rows))
            close(slope[i], len(rows) * REWARDS[i])
    excess = module.pair_excess(values, GROUP, among)
    for rows in KEPT.values():
        for i in rows:
            above = sum(max(REWARDS[i] - REWARDS[j], 0.0) for j in rows)
            close(excess[i], above / max(len(rows) - 1, 1))
    assert not excess[~among].any()
    constant = module.group_losses(survey, values, lambda x, _: torch.tensor(3.0).double())
    close(constant[0], [3.0] * 9)
    assert not constant[1].any()
    length, scale = torch.arange(1.0, 10.0).double(), torch.arange(9.0, 0.0, -1.0).double()
    survey = Survey(group=GROUP, length=length, log_ratio={"old": values})
    found = module.coupled_by_group(survey, scale, lambda x, _: x.square().sum())
    for rows in members.values():
        for i in rows:
            close(found["value"][i], sum((REWARDS[j] / (9 - j)) ** 2 for j in rows))
            # Of the mean over the sample's i + 1 decisions, where x is their sum over scale.
            slope = 2 * REWARDS[i] / (9 - i) * (i + 1) / (9 - i)
            close(found["slope"][i], len(rows) * slope)


def pair_losses(config, terms: PolicyTerms, batch: UpdateBatch) -> dict[int, Tensor]:
    """By group: the mean over its pairs, from the formula; differentiable in ``terms.logp``."""
    logs = {}
    for b in {b for b, _ in entries(batch.mask)}:
        gaps = [
            terms.logp[b, k] - (terms.logp[b, k].detach() if batch.logp_old is None else old)
            for k, old in enumerate(
                terms.logp[b].tolist() if batch.logp_old is None else batch.logp_old[b].tolist()
            )
            if batch.mask[b, k]
        ]
        logs[b] = sum(gaps) / (1 if config.ratio == "product" else len(gaps))
    found = {}

    def least(gap: float, ratio: Tensor) -> Tensor:
        return torch.minimum(gap * ratio, gap * ratio.clamp(1 - config.clip, 1 + config.clip))

    for group, rows in KEPT.items():
        total, count = torch.zeros(()).double(), 0
        for i in rows:
            for j in rows:
                gap = (batch.advantages[i] - batch.advantages[j]).item()
                if i == j:
                    continue
                count += 1
                if config.form == "joint":
                    total = total - 0.5 * least(gap, (logs[i] - logs[j]).exp())
                else:  # each pair is met twice, and the form is symmetric
                    both = least(gap, logs[i].exp()) + least(-gap, logs[j].exp())
                    total = total - 0.5 * both
        found[group] = total / max(count, 1)
    return found


def check_groups(module: ModuleType, config, expected, case=None) -> None:
    """Values and gradients of a mean over samples against ``expected(config, terms, batch)``."""
    terms, batch = case or group_case()
    out = module.loss(terms, ready(module, config, terms, batch), config)
    groups = expected(config, terms, batch)
    by_sample = (out.loss * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)
    value, wanted = 0.0, 0.0
    for group, rows in KEPT.items():
        close(by_sample[list(rows)].mean(), groups[group].item())
        value, wanted = value + by_sample[list(rows)].sum(), wanted + len(rows) * groups[group]
    (actual,) = torch.autograd.grad(value, terms.logp)
    if wanted.requires_grad:
        (wanted_gradient,) = torch.autograd.grad(wanted, terms.logp)
        assert wanted_gradient.any()
        close(actual, wanted_gradient.tolist())


def check_p3o_pairwise(module: ModuleType) -> None:
    for form, ratio, clip in (
        ("separate", "mean", 0.2),
        ("separate", "product", 0.3),
        ("joint", "mean", 0.1),
        ("joint", "product", 0.5),
    ):
        config = module.Config(form=form, ratio=ratio, clip=clip)
        check_groups(module, config, pair_losses)
        assert module.needs_whole_samples(config) == (form == "separate")
        assert module.survey(config) == ({"old"} if form == "joint" else set())
    terms, batch = group_case()
    config = module.Config(ratio="mean")
    out = module.loss(terms, ready(module, config, terms, batch), config)
    rows = [i for group in KEPT.values() for i in group]
    total = sums(terms, batch)
    mean = sum(math.exp(total[i] / LENGTHS[i]) for i in rows)
    close(out.metrics["ratio/mean"], (mean, len(rows)))
    check_approx_kl(out.metrics["approx_kl"], terms, batch)


def label_losses(config, terms: PolicyTerms, batch: UpdateBatch) -> dict[int, Tensor]:
    """By group: REAL's loss from the formula."""
    found, tau = {}, config.temperature
    for group, rows in KEPT.items():
        logits, right, wrong = {}, [], []
        for i in rows:
            gaps = [
                terms.logp[i, k] - batch.logp_old[i, k] for b, k in entries(batch.mask) if b == i
            ]
            logits[i] = sum(gaps) / len(gaps)
            reward = batch.advantages[i].item()
            over = reward > (0 if config.threshold is None else config.threshold)
            (right if over else wrong).append(logits[i])
        both = bool(right) and bool(wrong)
        if config.single_class == "skip" and not both:
            found[group] = torch.zeros(()).double()
        elif config.form == "bce":
            terms_of = [(1 + (-s / tau).exp()).log() for s in right]
            terms_of += [(1 + (s / tau).exp()).log() for s in wrong]
            found[group] = sum(terms_of) / len(rows)
        else:
            found[group] = (1 + sum((-s / tau).exp() for s in right)).log() if right else 0.0
            found[group] = found[group] + (
                (1 + sum((s / tau).exp() for s in wrong)).log() if wrong else 0.0
            )
    return found


def check_real(module: ModuleType) -> None:
    by_reward = {"threshold": 0.2}
    for options in (
        {},
        {"temperature": 2.0, **by_reward},
        {"form": "bce"},
        {"form": "bce", "single_class": "keep", **by_reward},
        {"single_class": "keep", **by_reward},
    ):
        check_groups(module, module.Config(**options), label_losses)
    terms, batch = group_case()
    config = module.Config()
    given = ready(module, config, terms, batch)
    out, total = module.loss(terms, given, config), sums(terms, batch)
    rows = [i for group in KEPT.values() for i in group]
    y = {i: 1 if batch.advantages[i] > 0 else -1 for i in rows}

    def y_of(known: dict[int, int]) -> list[int]:
        return [known.get(i, 0) for i in range(1, 9)]

    assert given.signals["label"].tolist() == [y[0], *y_of(y)]
    close(out.metrics["real/right"], (sum(y[i] > 0 for i in rows), 7))
    close(out.metrics["real/logit"], (sum(y[i] * total[i] / LENGTHS[i] for i in rows), 7))
    close(out.metrics["real/weight"], (given.signals["slope"].abs().sum().item(), 7))
    check_approx_kl(out.metrics["approx_kl"], terms, batch)
    scores, advantages = scores_of()
    for threshold in (0.25, 0.24):
        labels = module.signals(scores, advantages, module.Config(threshold=threshold))["label"]
        assert labels[4] == (1 if threshold < 0.25 else -1)
    some = replace(scores, valid=scores.valid.clone().index_fill(0, torch.tensor([0]), False))
    for given in ((some, advantages), (scores, replace(advantages, keep=some.valid))):
        assert module.signals(*given, config)["label"].tolist() == [0, *y_of(y)]
    assert module.survey(config) == {"old"}
    flat = replace(advantages, values=0 * advantages.values)
    assert not module.signals(scores, flat, config)["label"].any()


def check_orpo_occupancy(module: ModuleType) -> None:
    terms, batch = group_case()
    rows = [i for group in KEPT.values() for i in group]

    def extended(x: float) -> float:
        return math.exp(x) if x <= 10 else math.exp(10) * (1 + x - 10)

    for far in (0.0, 12.0, -12.0):
        shifted = replace(
            terms, logp_ref=terms.logp_ref.clone().index_fill(0, torch.tensor([2]), far)
        )
        total = sums(shifted, batch, "reference")
        rise = {i: extended(total[i]) - 1 for i in rows}
        fall = {i: extended(-total[i]) - 1 for i in rows}
        chi2 = statistics.fmean(rise[i] + fall[i] for i in rows)
        kl = statistics.fmean(total[i] + fall[i] for i in rows)
        for form, value in (("chi2", chi2), ("kl", kl), ("sqrt_chi2", math.sqrt(chi2))):
            config = module.Config(form=form)
            out = module.loss(shifted, ready(module, config, shifted, batch), config)
            for b, k in trained(batch):
                close(out.loss[b, k], value)
            close(out.metrics["orpo_occupancy"], (value * len(trained(batch)), len(trained(batch))))
            check_occupancy_gradient(out, shifted, batch, total, form, value)
            assert module.needs(config) == {"logp", "logp_ref"}
            assert module.survey(config) == {"reference"}
    same = replace(terms, logp_ref=terms.logp.detach())
    for form, value in (("chi2", 0.0), ("kl", 0.0), ("sqrt_chi2", 0.01)):
        config = module.Config(form=form)
        out = module.loss(same, ready(module, config, same, batch), config)
        close(out.loss[0, 0], value)
        assert not torch.autograd.grad(out.loss.sum(), terms.logp)[0].any()
    check_occupancy_steps(module)


def check_occupancy_gradient(out, terms, batch, total, form, value) -> None:
    """Of the mean over samples, by the chain rule; |l| > 10 lies on the straight line."""
    length = batch.mask.double().sum(1, keepdim=True).clamp(min=1)
    weight = batch.mask / length * batch.weights[:, None]
    (actual,) = torch.autograd.grad((out.loss * weight).sum() / 7, terms.logp)
    for b, k in trained(batch):
        up, down = (math.exp(min(x, 10)) for x in (total[b], -total[b]))
        slope = 1 - down if form == "kl" else up - down
        slope /= 2 * value if form == "sqrt_chi2" else 1
        close(actual[b, k], slope / 7)


def check_occupancy_steps(module: ModuleType) -> None:
    terms, batch = random_case()
    terms = replace(terms, mean_gap_reference=terms.mean_gap_reference * 0.3)
    gap, spread = terms.mean_gap_reference.tolist(), terms.step_std.tolist()
    config = module.Config(form="step_chi2")
    out = module.loss(terms, batch, config)
    for b, k in entries(batch.mask):
        close(out.loss[b, k], math.exp(gap[b][k] / spread[b][k] ** 2) - 1)
    assert module.needs(config) == {"mean_gap_reference", "step_std"}
    assert module.survey(config) == set()
    with pytest.raises(UserError, match="orpo_occupancy: step_std must be positive"):
        module.loss(replace(terms, step_std=torch.zeros(6, 5).double()), batch, config)
    off = module.Config(coef=0)
    assert module.needs(off) == set()
    assert not module.loss(terms, batch, off).loss.any()


# --- weights that follow a target -----------------------------------------------------------------


def check_multiplier(module: ModuleType) -> None:
    given = LossTerms(loss=float64([[1.0, 2.0]]), metrics={"a": (6.0, 3.0)})
    found = module.multiplied(given, 2.5, "weight")
    close(found.loss, [[2.5, 5.0]])
    assert found.metrics == {"a": (6.0, 3.0), "weight": (7.5, 3.0)}
    nothing = LossTerms(loss=float64([[0.0]]))
    assert module.multiplied(nothing, 2.5, "weight") is nothing


def check_kl_target(module: ModuleType) -> None:
    terms, batch = random_case()
    config = module.Config(coef=0.5, estimator="k3", target=0.4, rate=0.3)
    new, ref = terms.logp.tolist(), terms.logp_ref.tolist()
    for multiplier in (1.0, 2.5):
        state = {"multiplier": multiplier} if multiplier != 1 else {}
        out = module.loss(terms, replace(batch, state=state), config)
        for b, k in entries(batch.mask):
            close(out.loss[b, k], multiplier * ESTIMATORS["k3"](new[b][k] - ref[b][k]))
        used = [ESTIMATORS["k3"](new[b][k] - ref[b][k]) for b, k in trained(batch)]
        close(out.metrics["kl_reference"], (sum(used), len(used)))
        close(out.metrics["kl_target/multiplier"], (multiplier * len(used), len(used)))
    for divergence, error in ((0.4, 0.0), (0.44, 0.1), (0.36, -0.1), (40.0, 0.2), (-9.0, -0.2)):
        state = module.update_state({"multiplier": 2.0}, {"kl_reference": divergence}, config)
        close(state["multiplier"], 2.0 * (1 + 0.3 * error))
    narrow = module.Config(rate=1.0, multiplier_min=0.95, multiplier_max=1.1)
    for divergence, bound in ((0.0, 0.95), (9.0, 1.1)):
        state = module.update_state({"multiplier": 1.0}, {"kl_reference": divergence}, narrow)
        assert state == {"multiplier": bound}
    assert module.update_state({"multiplier": 2.0}, {}, config) == {"multiplier": 2.0}
    assert module.needs(config) == {"logp", "logp_ref"}
    assert module.needs(module.Config(coef=0)) == set()


def check_entropy_target(module: ModuleType) -> None:
    terms, batch = random_case()
    config, entropy = module.Config(max_multiplier=2.0, target=0.5), terms.entropy.tolist()
    used = trained(batch)
    for state, weight in (
        ({}, 0.0),
        ({"multiplier": 3.0, "applied": True}, 3.0),
        ({"multiplier": 3.0, "applied": False}, 0.0),
    ):
        out = module.loss(terms, replace(batch, state=state), config)
        for b, k in entries(batch.mask):
            close(out.loss[b, k], -weight * entropy[b][k])
        close(out.metrics["entropy"], (sum(entropy[b][k] for b, k in used), len(used)))
        close(out.metrics["entropy_target/multiplier"], (weight * len(used), len(used)))
    assert module.initial_state(module.Config(start=7)) == {"multiplier": 7.0, "applied": True}
    for before, value, after in ((1, 0.4, 2), (2, 0.4, 2), (2, 0.6, 1), (0, 0.6, 0), (1, 0.5, 0)):
        state = {"multiplier": float(before), "applied": True}
        found = module.update_state(state, {"entropy": value}, config)
        assert found == {"multiplier": float(after), "applied": value < 0.5}
    kept = {"multiplier": 2.0, "applied": False}
    assert module.update_state(kept, {}, config) == kept
    assert module.needs(config) == {"entropy"}


CHECKS = {
    "mmrl.objectives._groups": check_group_helpers,
    "mmrl.objectives.mhpo": check_mhpo,
    "mmrl.objectives.gbpo": check_gbpo,
    "mmrl.objectives.etr": check_etr,
    "mmrl.objectives.r2vpo": check_r2vpo,
    "mmrl.objectives.mdpo_mirror": check_mdpo_mirror,
    "mmrl.objectives.p3o_pairwise": check_p3o_pairwise,
    "mmrl.objectives.real": check_real,
    "mmrl.regularisers.orpo_occupancy": check_orpo_occupancy,
    "mmrl.regularisers._multiplier": check_multiplier,
    "mmrl.regularisers.kl_target": check_kl_target,
    "mmrl.regularisers.entropy_target": check_entropy_target,
}
