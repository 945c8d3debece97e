"""Loop oracles in plain Python, written from the formulas, and checks of modules against them.

Every check takes the module (or a mutant of it) as its argument, so that the same check can be
shown to fail when an operator of the module is turned round.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Advantages, PolicyTerms, Prompt, Scores, Survey, UpdateBatch

INF = float("inf")

# The fixture on which published trainers agree: 3 sequences with 4, 2 and 3 real tokens.
F_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
F_NEW = ((-0.8, -2.3, -0.5, -0.4), (-1.9, -0.2, 0, 0), (-0.25, -0.5, -1.6, 0))
F_OLD = ((-1, -2, -0.5, -1), (-1.5, -0.7, 0, 0), (-0.2, -0.9, -1.1, 0))
F_REF = ((-1.1, -2, -0.6, -0.9), (-1.4, -0.8, 0, 0), (-0.3, -1, -1, 0))
F_ADVANTAGES = (1.0, -1.0, 0.5)


def float64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fixture_f() -> tuple[PolicyTerms, UpdateBatch]:
    terms = PolicyTerms(logp=float64(F_NEW).requires_grad_(), logp_ref=float64(F_REF))
    return terms, batch_of(F_MASK, float64(F_ADVANTAGES), logp_old=float64(F_OLD))


def batch_of(mask: Tensor, advantages: Tensor, weights=None, logp_old=None) -> UpdateBatch:
    weights = torch.ones_like(advantages) if weights is None else weights
    return UpdateBatch(
        payload=None, mask=mask, advantages=advantages, weights=weights, logp_old=logp_old
    )


def random_case(seed: int = 0, on_policy: bool = False) -> tuple[PolicyTerms, UpdateBatch]:
    """6 samples, 5 decisions; ragged, one row empty, one of weight 0, ratios from 0.3 to 3."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    lengths = torch.tensor([5, 3, 1, 0, 4, 5])
    logp = -normal(6, 5).abs()
    logp_old = None if on_policy else logp + 0.5 * normal(6, 5)
    terms = PolicyTerms(
        logp=logp.requires_grad_(),
        logp_ref=-normal(6, 5).abs(),
        entropy=normal(6, 5).abs(),
        velocity_gap_reference=normal(6, 5).square(),
        velocity_gap_ema=normal(6, 5).square(),
        sigma=torch.rand(6, 5, dtype=torch.float64, generator=draw).clamp(min=0.05),
        implicit_positive=normal(6, 5).square(),
        implicit_negative=normal(6, 5).square(),
        mean_gap_old=normal(6, 5).square(),
        mean_gap_reference=normal(6, 5).square(),
        mean_gap_teacher=normal(6, 5).square(),
        step_size=0.1 + torch.rand(6, 5, dtype=torch.float64, generator=draw),
        step_std=0.5 + torch.rand(6, 5, dtype=torch.float64, generator=draw),
        diffusion=0.5 + torch.rand(6, 5, dtype=torch.float64, generator=draw),
        logp_sampled=logp.detach() + 0.5 * normal(6, 5),
        logp_tempered=-normal(6, 5).abs(),
        sum_squares=torch.rand(6, 5, dtype=torch.float64, generator=draw),
    )
    batch = batch_of(
        torch.arange(5)[None] < lengths[:, None],
        float64([1.5, -1.0, 0.5, 2.0, -0.7, 0.3]),
        float64([1, 1, 1, 1, 1, 0]),
        logp_old,
    )
    return terms, batch


def fit(module: ModuleType, batch: UpdateBatch, config=None) -> UpdateBatch:
    """``batch`` as the part wants it: that of DiffusionNFT reads probabilities, others have signals
    of groups of three, at log-ratios of 0, and a state.
    """
    if module.__name__.endswith(".nft"):
        return replace(batch, advantages=(batch.advantages / 10 + 0.5).clamp(0, 1))
    if not hasattr(module, "Config"):
        return batch
    config = module.Config() if config is None else config
    return prepared(module, config, batch, torch.arange(len(batch.mask)) // 3, {})


def prepared(
    module: ModuleType, config, batch: UpdateBatch, group: Tensor, log_ratio
) -> UpdateBatch:
    """``batch``, a whole optimizer step, with what the trainer gives a part beside terms.

    Rewards are the advantages.  ``log_ratio``: sums over the decisions of each row by the name of
    the other policy; 0 where absent.
    """
    state = module.initial_state(config) if hasattr(module, "initial_state") else {}
    signals = {}
    keep = batch.mask.any(1) & (batch.weights > 0)
    if hasattr(module, "signals"):
        scores = Scores(combined=batch.advantages, group=group, valid=keep)
        advantages = Advantages(values=batch.advantages.masked_fill(~keep, 0), keep=keep)
        signals = dict(module.signals(scores, advantages, config))
    if hasattr(module, "survey") and module.survey(config):
        zero = torch.zeros(len(group)).double()
        survey = Survey(
            group=group[keep],
            length=batch.mask.sum(1)[keep].double(),
            log_ratio={name: log_ratio.get(name, zero)[keep] for name in module.survey(config)},
            signals={name: value[keep] for name, value in signals.items()},
        )
        for name, value in module.couple(survey, config).items():
            signals[name] = zero.masked_scatter(keep, value)
    return replace(batch, signals=signals, state=state)


def random_scores(seed: int = 0) -> Scores:
    """Ragged, interleaved groups 7, 2, 9, 4; group 9 is flat, 4 has one valid sample of two.

    Reward ``a`` applies to every valid sample, ``b`` to some of them only.  All facts are known.
    """
    group = torch.tensor([7, 2, 7, 9, 2, 7, 9, 4, 2, 7, 9, 4, 7])
    valid = torch.ones(13, dtype=torch.bool)
    valid[[5, 11]] = False
    draw = torch.Generator().manual_seed(seed)
    combined = torch.randn(13, dtype=torch.float64, generator=draw)
    combined[group == 9] = 0.1
    combined[~valid] = 100.0
    nan = torch.full((13,), math.nan, dtype=torch.float64)
    some = valid & torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    by_name = {
        "a": torch.where(valid, combined, nan),
        "b": torch.where(some, torch.randn(13, dtype=torch.float64, generator=draw), nan),
    }
    return Scores(
        combined=combined,
        group=group,
        valid=valid,
        by_name=by_name,
        length=torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]),
        truncated=torch.tensor([0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool),
        answer=["7", "a", "7", None, "b", "8", "7", "7", "a", "8", None, "9", None],
        features=torch.randn(13, 4, dtype=torch.float64, generator=draw),
        score_norm=torch.rand(13, dtype=torch.float64, generator=draw),
    )


def fit_scores(module: ModuleType, scores: Scores) -> Scores:
    """``scores`` with rewards as the estimator wants them, by its ``REWARDS``."""
    kind = getattr(module, "REWARDS", "real")
    if kind == "real":
        return scores
    unit = (scores.combined > scores.combined.median()).double()
    return replace(scores, combined=torch.where(scores.valid, unit, 0.0))


def close(actual, expected, tolerance: float = 1e-12) -> None:
    actual = actual.detach() if isinstance(actual, Tensor) else float64(actual)
    torch.testing.assert_close(actual, float64(expected), rtol=tolerance, atol=tolerance)


def entries(mask: Tensor) -> list[tuple[int, int]]:
    return [(b, k) for b, row in enumerate(mask.tolist()) for k, real in enumerate(row) if real]


def trained(batch: UpdateBatch) -> list[tuple[int, int]]:
    return [(b, k) for b, k in entries(batch.mask) if batch.weights[b] > 0]


# --- objectives -----------------------------------------------------------------------------------


def clipped(ratio: float, advantage: float, low: float, high: float, cap: float = INF) -> float:
    """``cap``: bound of the ratio of a negative advantage."""
    if advantage >= 0:
        return -advantage * min(ratio, 1 + high)
    return -advantage * min(max(ratio, 1 - low), cap)


def ratios(terms: PolicyTerms, batch: UpdateBatch, importance: str) -> dict[tuple[int, int], float]:
    new, old = terms.logp.tolist(), batch.logp_old.tolist()
    gaps = {(b, k): new[b][k] - old[b][k] for b, k in entries(batch.mask)}
    if importance == "decision":
        return {key: math.exp(gap) for key, gap in gaps.items()}
    rows = {b for b, _ in gaps}
    return {
        (b, 0): math.exp(statistics.fmean(gap for (row, _), gap in gaps.items() if row == b))
        for b in rows
    }


def check_grpo(module: ModuleType) -> None:
    for low, high, importance in (
        (0.2, 0.2, "decision"),
        (0.1, 0.3, "decision"),
        (0.01, 0.1, "sample"),
    ):
        terms, batch = random_case()
        config = module.Config(clip_low=low, clip_high=high, importance=importance)
        out = module.loss(terms, batch, config)
        expected = ratios(terms, batch, importance)
        advantages = batch.advantages.tolist()
        for (b, k), ratio in expected.items():
            close(out.loss[b, k], clipped(ratio, advantages[b], low, high))
        used = {key: r for key, r in expected.items() if batch.weights[key[0]] > 0}
        below = sum(r < 1 - low and advantages[b] < 0 for (b, _), r in used.items())
        above = sum(r > 1 + high and advantages[b] > 0 for (b, _), r in used.items())
        count = len(used)
        old, new = batch.logp_old.tolist(), terms.logp.tolist()
        kl = [
            math.exp(new[b][k] - old[b][k]) - 1 + old[b][k] - new[b][k] for b, k in trained(batch)
        ]
        close(out.metrics["ratio/mean"], (sum(used.values()), count))
        close(out.metrics["clip_ratio/low"], (below, count))
        close(out.metrics["clip_ratio/high"], (above, count))
        close(out.metrics["clip_ratio/region"], (below + above, count))
        close(out.metrics["approx_kl"], (sum(kl), len(kl)))
        assert below > 0, "a case without active lower clip tests nothing"
        assert above > 0, "a case without active upper clip tests nothing"
    assert module.needs(config) == {"logp"}
    for caps in ({"dual_clip": 1.5}, {"delta": 1.5}, {"dual_clip": 1.5, "delta": 1.7}):
        check_capped_grpo(module, module.Config(clip_high=0.3, **caps))
    for wrong in ({"dual_clip": 1.0}, {"delta": 1.3}, {"clip_high": 0.5, "delta": 1.5}):
        with pytest.raises(ValidationError):
            module.Config(**{"clip_high": 0.3} | wrong)


def check_capped_grpo(module: ModuleType, config) -> None:
    """Ratios of 1.6, above the caps, and of 1.4, outside the clip range only."""
    mask = torch.ones(3, 3, dtype=torch.bool)
    new, advantages = [[math.log(r) for r in (0.5, 1.4, 1.6)]] * 3, (2.0, -2.0, -2.0)
    batch = batch_of(mask, float64(advantages), logp_old=torch.zeros(3, 3).double())
    out = module.loss(PolicyTerms(logp=float64(new)), batch, config)
    close(out.loss, [[-1.0, -2.6, -2.6], [1.6, 2.8, 3.0], [1.6, 2.8, 3.0]])
    close(out.metrics["clip_ratio/capped"], (2, 9))


def check_ratio(module: ModuleType) -> None:
    terms, batch = random_case()
    for importance in ("decision", "sample"):
        actual = module.log_ratio(terms, batch, importance).exp()
        for (b, k), ratio in ratios(terms, batch, importance).items():
            close(actual[b, k], ratio)
    for b, k in entries(batch.mask):
        gap = terms.logp[b, k].item() - batch.logp_old[b, k].item()
        close(module.raw_log_ratio(terms, batch)[b, k], gap)
        close(module.approx_kl(terms, batch)[b, k], math.exp(gap) - 1 - gap)
    on_policy, batch = random_case(on_policy=True)
    assert torch.equal(module.log_ratio(on_policy, batch, "decision"), torch.zeros(6, 5).double())
    check_clipping(module)


def check_clipping(module: ModuleType) -> None:
    values, signs, low, high = (0.5, 0.85, 1.0, 1.2, 2.0), (-2.0, 0.0, 3.0), 0.1, 0.3
    given = float64([values] * 3), float64(signs)[:, None], low, high
    loss, metrics = module.clipped_surrogate(*given), module.ratio_metrics(*given)
    close(metrics["ratio/mean"], [values] * 3)
    for b, advantage in enumerate(signs):
        for k, ratio in enumerate(values):
            below, above = ratio < 1 - low and advantage < 0, ratio > 1 + high and advantage > 0
            close(loss[b, k], clipped(ratio, advantage, low, high))
            assert metrics["clip_ratio/low"][b, k] == below
            assert metrics["clip_ratio/high"][b, k] == above
            assert metrics["clip_ratio/region"][b, k] == (below or above)
    for caps in ({"dual_clip": 1.5}, {"delta": 1.5}, {"dual_clip": 1.5, "delta": 1.8}):
        capped = module.clipped_surrogate(*given, **caps)
        for b, advantage in enumerate(signs):
            close(capped[b], [clipped(r, advantage, low, high, 1.5) for r in values])


GUARD_SWITCHES = ("drift_correction", "std_normalisation", "reweight")


def guard_log_ratios(terms: PolicyTerms, batch: UpdateBatch, config, b: int, k: int):
    """Plain and corrected log-ratio of one decision."""
    gap, s = terms.mean_gap_old[b, k].item(), terms.step_std[b, k].item()
    plain = terms.logp[b, k].item() - batch.logp_old[b, k].item()
    corrected = plain + (gap / (2 * s * s) if config.drift_correction else 0.0)
    return plain, corrected * (s if config.std_normalisation else 1.0)


def check_grpo_guard(module: ModuleType) -> None:
    for drift, std, reweight in itertools.product((False, True), repeat=3):
        switches = dict(zip(GUARD_SWITCHES, (drift, std, reweight), strict=True))
        config = module.Config(clip_low=0.1, clip_high=0.3, **switches)
        check_guard_config(module, config)
        expected = {"logp"} | ({"mean_gap_old", "step_std"} if drift else set())
        expected |= ({"step_std"} if std else set()) | ({"step_size"} if reweight else set())
        assert module.needs(config) == expected
        with_levels = config.model_copy(update={"log_by_sigma": True})
        assert module.needs(with_levels) == expected | {"sigma"}


def check_guard_config(module: ModuleType, config) -> None:
    terms, batch = random_case()
    out = module.loss(terms, batch, config)
    advantages, moments, used = batch.advantages.tolist(), Counter(), trained(batch)
    for b, k in entries(batch.mask):
        plain, corrected = guard_log_ratios(terms, batch, config, b, k)
        weight = 1 / terms.step_size[b, k].item() if config.reweight else 1.0
        close(out.loss[b, k], weight * clipped(math.exp(corrected), advantages[b], 0.1, 0.3))
        if (b, k) in used:
            moments.update({"mean_raw": plain, "sq_raw": plain**2})
            moments.update({"mean": corrected, "sq": corrected**2, "ratio": math.exp(corrected)})
    for name in ("mean_raw", "sq_raw", "mean", "sq"):
        close(out.metrics[f"log_ratio/{name}"], (moments[name], len(used)))
    close(out.metrics["ratio/mean"], (moments["ratio"], len(used)))
    check_guard_levels(module, config, terms, batch)


def check_guard_levels(module: ModuleType, config, terms: PolicyTerms, batch: UpdateBatch) -> None:
    levels = (0.96, 0.5, 0.96, 0.25, 0.125)
    terms = replace(terms, sigma=float64([levels] * 6))
    metrics = module.loss(terms, batch, config.model_copy(update={"log_by_sigma": True})).metrics
    for level in set(levels):
        at = [(b, k) for b, k in trained(batch) if levels[k] == level]
        values = [guard_log_ratios(terms, batch, config, b, k)[1] for b, k in at]
        close(metrics[f"log_ratio/mean/{level:.3f}"], (sum(values), len(at)))
        close(metrics[f"log_ratio/sq/{level:.3f}"], (sum(v * v for v in values), len(at)))


def check_moments(module: ModuleType) -> None:
    raw, corrected = float64([[1.0, 2.0, 4.0]]).requires_grad_(), float64([[3.0, 5.0, 9.0]])
    found = module.moments(raw, corrected)
    assert {name: value.tolist() for name, value in found.items()} == {
        "log_ratio/mean_raw": [[1.0, 2.0, 4.0]],
        "log_ratio/sq_raw": [[1.0, 4.0, 16.0]],
        "log_ratio/mean": [[3.0, 5.0, 9.0]],
        "log_ratio/sq": [[9.0, 25.0, 81.0]],
    }
    assert not any(value.requires_grad for value in found.values())
    # The last step does not exist; the two others are one, but for rounding.
    batch = batch_of(torch.tensor([[True, True, False]]), float64([0.0]))
    levels = float64([[0.5, 0.5001, 0.25]])
    pairs = module.by_sigma({"x": corrected}, levels, batch)
    assert pairs == {"x/0.500": (8.0, 2.0)}
    apart = module.by_sigma({"x": corrected}, float64([[0.5, 0.25, 0.25]]), batch)
    assert apart == {"x/0.500": (3.0, 1.0), "x/0.250": (5.0, 1.0)}


def check_nft(module: ModuleType) -> None:
    terms, batch = random_case()
    optimality = (0.0, 0.2, 0.5, 0.9, 1.0, 7.0)  # the last sample is padding
    batch = replace(batch, advantages=float64(optimality))
    out = module.loss(terms, batch, module.Config(adv_scale=3.0))
    positive, negative = terms.implicit_positive.tolist(), terms.implicit_negative.tolist()
    for b, k in entries(batch.mask):
        r = optimality[b]
        close(out.loss[b, k], 3 * (r * positive[b][k] + (1 - r) * negative[b][k]))
    used = trained(batch)
    close(out.metrics["nft/positive"], (sum(positive[b][k] for b, k in used), len(used)))
    close(out.metrics["nft/negative"], (sum(negative[b][k] for b, k in used), len(used)))
    close(out.metrics["nft/optimality"], (0.0 + 0.2 + 0.5 + 1.0, 4))  # row 3 has no decision
    assert module.needs(module.Config()) == {"implicit_positive", "implicit_negative"}
    for wrong in (-0.01, 1.01, math.nan):
        refused = replace(batch, advantages=float64([wrong, 0, 0, 0, 0, 0]))
        with pytest.raises(UserError, match="not a probability"):
            module.loss(terms, refused, module.Config())


def check_opd(module: ModuleType) -> None:
    terms, batch = random_case()
    ode = torch.tensor([False, True, False, True, True])
    terms = replace(
        terms,
        step_std=terms.step_std.masked_fill(ode, 0),
        diffusion=terms.diffusion.masked_fill(ode, 0),
    )
    gap = terms.mean_gap_teacher.tolist()
    for name, spread in (("true", terms.step_std), ("drop_dt", terms.diffusion)):
        config = module.Config(denominator=name)
        out = module.loss(terms, batch, config)
        expected = {
            (b, k): gap[b][k] / 2 if ode[k] else gap[b][k] / (2 * spread[b, k].item() ** 2)
            for b, k in entries(batch.mask)
        }
        for (b, k), value in expected.items():
            close(out.loss[b, k], value)
        used = trained(batch)
        close(out.metrics["opd/divergence"], (sum(expected[key] for key in used), len(used)))
        close(out.metrics["opd/mean_gap"], (sum(gap[b][k] for b, k in used), len(used)))
        term = {"true": "step_std", "drop_dt": "diffusion"}[name]
        assert module.needs(config) == {"mean_gap_teacher", term}


def check_reinforce(module: ModuleType) -> None:
    terms, batch = random_case(on_policy=True)
    out = module.loss(terms, batch, module.Config())
    logp = terms.logp.tolist()
    for b, k in entries(batch.mask):
        close(out.loss[b, k], -batch.advantages[b].item() * logp[b][k])
    used = [logp[b][k] for b, k in trained(batch)]
    close(out.metrics["logp/mean"], (sum(used), len(used)))


# --- divergences and regularisers -----------------------------------------------------------------

ESTIMATORS = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: math.exp(-x) - 1 + x,
}


def check_divergences(module: ModuleType) -> None:
    new, other = (-1.0, -0.5, -2.0), (-1.2, -0.5, -1.0)
    for name, formula in ESTIMATORS.items():
        actual = getattr(module, name)(float64(new), float64(other))
        close(actual, [formula(a - b) for a, b in zip(new, other, strict=True)])
    close(module.clamp_log_ratio(float64([-1e3, -3, 3, 1e3])), [-20, -3, 3, 20])
    close(module.gaussian_kl(float64([0.5, 2]), float64([0.7, 3])), [0.5 / 0.98, 2 / 18])
    spread, mask = float64([[0.5, 0.0]]), torch.tensor([[True, False]])
    close(module.active_spread(spread, mask, "S"), [[0.5, 1.0]])
    for wrong in (0.0, -0.5, math.nan):
        with pytest.raises(UserError, match="S must be positive at every trained step"):
            module.active_spread(float64([[wrong, 0.0]]), mask, "S")
    terms, batch = random_case()
    gaps = module.raw_log_ratio(terms, batch)
    for b, k in entries(batch.mask):
        close(gaps[b, k], terms.logp[b, k].item() - batch.logp_old[b, k].item())
    assert not gaps[~batch.mask].any()


def elbo(gap: float, sigma: float) -> float:
    s = 0.7 * math.sqrt(sigma / (1 - min(sigma, 0.99)))
    return gap / (2 * s**2)


def check_velocity(module: ModuleType) -> None:
    terms, batch = random_case()
    gap, sigma = terms.velocity_gap_ema.tolist(), terms.sigma.tolist()
    plain = module.velocity_penalty(terms, batch.mask, "velocity_gap_ema", "velocity")
    weighted = module.velocity_penalty(terms, batch.mask, "velocity_gap_ema", "velocity_elbo")
    for b, k in entries(batch.mask):
        close(plain[b, k], gap[b][k])
        close(weighted[b, k], elbo(gap[b][k], sigma[b][k]))
    assert not plain[~batch.mask].any()
    close(module.elbo_std(float64([0.995, 1])), [0.7 * math.sqrt(99.5), 7.0])
    assert module.velocity_needs("velocity_gap_ema", "velocity") == {"velocity_gap_ema"}
    assert module.velocity_needs("a", "velocity_elbo") == {"a", "sigma"}


def check_kl_reference(module: ModuleType) -> None:
    terms, batch = random_case()
    new, ref = terms.logp.tolist(), terms.logp_ref.tolist()
    for name, formula in ESTIMATORS.items():
        out = module.loss(terms, batch, module.Config(coef=0.5, estimator=name))
        for b, k in entries(batch.mask):
            close(out.loss[b, k], formula(new[b][k] - ref[b][k]))
        used = [formula(new[b][k] - ref[b][k]) for b, k in trained(batch)]
        close(out.metrics["kl_reference"], (sum(used), len(used)))
        assert out.metrics["kl"] == out.metrics["kl_reference"]
        assert module.needs(module.Config(estimator=name)) == {"logp", "logp_ref"}
        weighted = module.loss(terms, batch, module.Config(estimator=name, ratio_weighted=True))
        for b, k in entries(batch.mask):
            ratio = math.exp(new[b][k] - batch.logp_old[b, k].item())
            close(weighted.loss[b, k], ratio * formula(new[b][k] - ref[b][k]))
    for name in ("velocity", "velocity_elbo"):
        with pytest.raises(ValidationError, match="belongs to the estimators k1, k2 and k3"):
            module.Config(estimator=name, ratio_weighted=True)
    check_velocity_regulariser(module, "velocity_gap_reference")


def check_velocity_regulariser(module: ModuleType, gap: str = "velocity_gap_ema") -> None:
    terms, batch = random_case()
    values, sigma = getattr(terms, gap).tolist(), terms.sigma.tolist()
    for estimator, formula in (("velocity", lambda gap, _: gap), ("velocity_elbo", elbo)):
        out = module.loss(terms, batch, module.Config(coef=0.5, estimator=estimator))
        for b, k in entries(batch.mask):
            close(out.loss[b, k], formula(values[b][k], sigma[b][k]))
    used = [elbo(values[b][k], sigma[b][k]) for b, k in trained(batch)]
    (metric,) = out.metrics.values()
    close(metric, (sum(used), len(used)))
    assert module.needs(module.Config(coef=0.5)) == {gap}
    assert module.needs(module.Config(coef=0.5, estimator="velocity_elbo")) == {gap, "sigma"}
    assert module.needs(module.Config(coef=0)) == set()


def check_kl_transition(module: ModuleType) -> None:
    terms, batch = random_case()
    gap = terms.mean_gap_reference.tolist()
    for name, term in (("true", "step_std"), ("drop_dt", "diffusion")):
        config, spread = module.Config(coef=0.5, denominator=name), getattr(terms, term).tolist()
        out = module.loss(terms, batch, config)
        expected = {(b, k): gap[b][k] / (2 * spread[b][k] ** 2) for b, k in entries(batch.mask)}
        for (b, k), value in expected.items():
            close(out.loss[b, k], value)
        used = trained(batch)
        close(out.metrics["kl_transition"], (sum(expected[key] for key in used), len(used)))
        assert module.needs(config) == {"mean_gap_reference", term}
    off = module.Config(coef=0)
    assert module.needs(off) == set()
    assert not module.loss(PolicyTerms(logp=terms.logp), batch, off).loss.any()


# --- advantages and modulators --------------------------------------------------------------------


def rewards_by_group(scores: Scores) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for reward, group, valid in zip(
        scores.combined.tolist(), scores.group.tolist(), scores.valid.tolist(), strict=True
    ):
        found.setdefault(group, [])
        if valid:
            found[group].append(reward)
    return found


def deviation(rewards: list[float], ddof: int) -> float:
    if len(rewards) <= ddof:
        return 0.0
    return statistics.stdev(rewards) if ddof else statistics.pstdev(rewards)


def centred(scores: Scores) -> list[float]:
    groups = rewards_by_group(scores)
    rows = zip(scores.combined.tolist(), scores.group.tolist(), scores.valid.tolist(), strict=True)
    return [
        reward - statistics.fmean(groups[group]) if valid and len(set(groups[group])) > 1 else 0.0
        for reward, group, valid in rows
    ]


def expected_group(scores: Scores, config) -> list[float]:
    groups = rewards_by_group(scores)
    everything = [reward for rewards in groups.values() for reward in rewards]
    values = []
    for value, group in zip(centred(scores), scores.group.tolist(), strict=True):
        among = everything if config.deviation == "global" else groups[group]
        spread = deviation(among, config.ddof)
        guarded = spread + config.eps if config.eps_mode == "add" else max(spread, config.eps)
        values.append(value / (1.0 if config.deviation == "none" else guarded))
    return values


def check_group(module: ModuleType) -> None:
    scores = random_scores()
    for kind in ("group", "global", "none"):
        for ddof, eps, mode in ((0, 1e-4, "add"), (1, 0.3, "add"), (0, 9.0, "floor")):
            config = module.Config(deviation=kind, ddof=ddof, eps=eps, eps_mode=mode)
            advantages, _ = module.estimate(scores, config, {})
            close(advantages.values, expected_group(scores, config))


def check_leave_one_out(module: ModuleType) -> None:
    scores = random_scores()
    advantages, _ = module.estimate(scores, module.Config(), {})
    for i, (reward, group) in enumerate(
        zip(scores.combined.tolist(), scores.group.tolist(), strict=True)
    ):
        same = (scores.group == group) & scores.valid
        same[i] = False
        others = scores.combined[same].tolist()
        usable = scores.valid[i] and others
        close(advantages.values[i], reward - statistics.fmean(others) if usable else 0.0)


def check_per_reward(module: ModuleType) -> None:
    scores = random_scores()
    for weights in ({"a": 2.0, "b": -0.5}, {"a": 0.0, "b": 1.0}, None):
        for kind in ("group", "global"):
            config = module.Config(weights=weights, deviation=kind, ddof=1, eps=1e-3)
            result, _ = module.estimate(scores, config, {})
            used = {n: w for n, w in (weights or {"a": 1.0, "b": 1.0}).items() if w}
            alone = {name: one_reward(scores, name) for name in used}
            values = {name: expected_group(alone[name], config) for name in used}
            for i in range(13):
                close(result.values[i], sum(w * values[name][i] for name, w in used.items()))
                assert result.keep[i] == any(alone[name].valid[i] for name in used)
            total = [
                sum(w * alone[n].combined[i].item() for n, w in used.items()) for i in range(13)
            ]
            pooled = Scores(combined=float64(total), group=scores.group, valid=result.keep)
            found = [rewards for rewards in rewards_by_group(pooled).values() if rewards]
            spread = statistics.fmean(deviation(rewards, 0) for rewards in found)
            close(result.metrics["reward_std"], spread)


def one_reward(scores: Scores, name: str) -> Scores:
    raw = scores.by_name[name].tolist()
    return Scores(
        combined=float64([0.0 if math.isnan(value) else value for value in raw]),
        group=scores.group,
        valid=torch.tensor([not math.isnan(value) for value in raw]),
    )


def check_none(module: ModuleType) -> None:
    scores = random_scores()
    result, state = module.estimate(scores, module.Config(), {"seen": 1})
    assert result.values.tolist() == [0.0] * 13
    assert result.keep.all()
    assert state == {"seen": 1}
    found = [rewards for rewards in rewards_by_group(scores).values() if rewards]
    spread = statistics.fmean(deviation(rewards, 0) for rewards in found)
    close(result.metrics["reward_std"], spread)


def check_groups(module: ModuleType) -> None:
    scores = random_scores()
    groups = module.group_statistics(scores)
    rewards = [found for _, found in sorted(rewards_by_group(scores).items())]
    assert groups.flat.tolist() == [False, True, False, True]  # groups 2, 4, 7, 9
    close(groups.count, [len(found) for found in rewards])
    close(groups.mean, [statistics.fmean(found) for found in rewards])
    close(groups.centred, centred(scores))
    everything = [reward for found in rewards for reward in found]
    for ddof in (0, 1):
        close(groups.deviation(ddof), [deviation(found, ddof) for found in rewards])
        close(module.global_deviation(scores, ddof), deviation(everything, ddof))
    check_rows(module, scores)
    assert module.task_numbers(scores).tolist() == [0] * 13
    tasks = ["b", "a", "", "b"] * 3 + ["a"]
    assert module.task_numbers(replace(scores, task=tasks)).tolist() == [2, 1, 0, 2] * 3 + [1]
    values = torch.linspace(-3, 1, 13, dtype=torch.float64)
    out = module.advantages_with_metrics(values, scores, groups)
    sizes = [abs(v) for v, valid in zip(values.tolist(), scores.valid, strict=True) if valid]
    assert torch.equal(out.keep, scores.valid)
    close(out.metrics["reward_std"], statistics.fmean(deviation(found, 0) for found in rewards))
    close(out.metrics["frac_reward_zero_std"], 0.5)
    close(out.metrics["advantage/abs_mean"], statistics.fmean(sizes))
    close(out.metrics["advantage/max"], max(sizes))


def check_rows(module: ModuleType, scores: Scores) -> None:
    rows = [found.tolist() for found in module.rows_of_groups(scores)]
    assert rows == [[1, 4, 8], [7], [0, 2, 9, 12], [3, 6, 10]]
    assert module.others(float64([5, 6, 7])).tolist() == [[6, 7], [5, 7], [5, 6]]
    for name in ("a", "b"):
        alone, expected = module.one_reward(scores, name), one_reward(scores, name)
        assert torch.equal(alone.combined, expected.combined)
        assert torch.equal(alone.valid, expected.valid)


def some_advantages() -> Advantages:
    values = float64([-10, -5, 0, 2, 0, 10])
    keep = torch.tensor([True, True, True, True, False, True])
    return Advantages(values=values, keep=keep, metrics={"reward_std": 1.0})


def no_scores() -> Scores:
    return Scores(
        combined=torch.zeros(6).double(),
        group=torch.zeros(6, dtype=torch.int64),
        valid=torch.ones(6, dtype=torch.bool),
    )


def check_clip(module: ModuleType) -> None:
    for bound, normalize, output_max in ((5.0, True, 1.0), (1.0, False, 1.0), (4.0, True, 3.0)):
        config = module.Config(bound=bound, normalize=normalize, output_max=output_max)
        out = module.modulate(some_advantages(), no_scores(), config)
        scale = output_max / bound if normalize else output_max
        raw = some_advantages().values.tolist()
        close(out.values, [max(-bound, min(bound, value)) * scale for value in raw])
        assert out.keep.tolist() == some_advantages().keep.tolist()
        used = [value for value in raw if value]
        close(out.metrics["advantage/clip_ratio"], sum(abs(v) > bound for v in used) / 5)


def check_drop_zero(module: ModuleType) -> None:
    out = module.modulate(some_advantages(), no_scores(), module.Config())
    close(out.values, some_advantages().values.tolist())
    assert out.keep.tolist() == [True, True, False, True, False, True]
    assert out.metrics == {"reward_std": 1.0, "advantage/dropped": 0.2}


SHAPED = {
    "all": lambda a: a,
    "positive_only": lambda a: max(a, 0.0),
    "negative_only": lambda a: min(a, 0.0),
    "one_only": lambda a: 1.0 if a > 0 else 0.0,
    "binary": lambda a: float((a > 0) - (a < 0)),
}


def check_optimality(module: ModuleType) -> None:
    given = some_advantages()
    for mode, shape in SHAPED.items():
        for bound in (5.0, 2.0, 0.5):
            out = module.modulate(given, no_scores(), module.Config(bound=bound, mode=mode))
            shaped = [shape(max(-bound, min(bound, a))) for a in given.values.tolist()]
            expected = [min(1.0, max(0.0, a / bound / 2 + 0.5)) for a in shaped]
            expected[4] = 0.0  # not kept
            close(out.values, expected)
            assert out.keep.tolist() == given.keep.tolist()
            close(out.metrics["optimality/mean"], sum(expected) / 5)
            clipped = sum(abs(a) > bound for a in given.values.tolist())
            close(out.metrics["advantage/clip_ratio"], clipped / 5)
            assert out.metrics["reward_std"] == 1.0


# --- prompts --------------------------------------------------------------------------------------


def task_prompts(**sizes: int) -> list[Prompt]:
    """``name=size`` prompts of each task, interleaved as in a shuffled file."""
    rows = sorted((i / size, name) for name, size in sizes.items() for i in range(size))
    return [
        Prompt(id=f"{i}", text=f"{name} {i}", columns={"task": name})
        for i, (_, name) in enumerate(rows)
    ]


def check_round_robin(module: ModuleType) -> None:
    prompts, config, state = task_prompts(b=5, a=4, c=7), module.Config(), {}
    taken: list[Prompt] = []
    for step, count in enumerate((4, 5, 12, 2, 7, 6)):
        chosen, state = module.take(prompts, count, step, 3, config, state)
        assert len({prompt.id for prompt in chosen}) == count
        taken += chosen
    assert [prompt.columns["task"] for prompt in taken] == ["a", "b", "c"] * 12
    assert state["slot"] == 36
    for name, size in (("a", 4), ("b", 5), ("c", 7)):
        check_epochs(module, [p for p in prompts if p.columns["task"] == name], size, config)
    module.take(prompts, 12, 0, 3, config, {})  # task a has 4 prompts, so 3 x 4 is the most
    with pytest.raises(UserError, match=r"up to 5 prompts of task 'a' .* allowed: 12 or less"):
        module.take(prompts, 13, 0, 3, config, {})


def check_epochs(module: ModuleType, prompts: list[Prompt], size: int, config) -> None:
    """One by one, a task goes through all its prompts before any comes again."""
    state, taken = {}, []
    for step in range(3 * size):
        (prompt,), state = module.take(prompts, 1, step, 3, config, state)
        taken.append(prompt.id)
    assert [list(cursor) for cursor in state["cursors"].values()] == [[2, size]]
    epochs = [taken[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(epoch) == sorted(p.id for p in prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "every epoch has its own shuffle"


# --- reduction ------------------------------------------------------------------------------------


def aggregate(values: dict[int, list[float]], weights: list[float], how: str, horizon: int):
    """``values``: those of the existing decisions of each sample."""
    total = sum(weights[b] * sum(row) for b, row in values.items())
    used = sum(weights[b] for b, row in values.items() if row)
    means = sum(weights[b] * statistics.fmean(row) for b, row in values.items() if row)
    return {
        "decision_mean": total / sum(weights[b] * len(row) for b, row in values.items()),
        "decision_sum": total,
        "sample_mean_of_means": means / used,
        "sample_mean_of_sums": total / used,
        "sample_sum_over_horizon": total / horizon / used,
    }[how]


AGGREGATIONS = (
    "decision_mean",
    "decision_sum",
    "sample_mean_of_means",
    "sample_mean_of_sums",
    "sample_sum_over_horizon",
)


def reduced(module: ModuleType, loss: Tensor, mask: Tensor, weights: Tensor, how, horizon=None):
    coefficients = module.decision_weights(mask, weights, how, horizon)
    total = module.denominator(mask, weights, how)
    return module.weighted_sum(loss, coefficients) / module.step_denominator(total)


def check_coupling(module: ModuleType) -> None:
    """A value and its derivative, found apart and put together as constants."""
    at = float64([0.5, 2.0])
    value, slope = module.differentiated(lambda x: (x**3).sum(), at)
    close(value, 8.125)
    close(slope, [0.75, 12.0])
    with torch.no_grad():
        assert torch.equal(module.differentiated(lambda x: (x**3).sum(), at)[1], slope)
    assert not module.differentiated(lambda x: float64(1.0), at)[1].any()
    variable = float64([[2.0, 3.0]]).requires_grad_()
    given = [float64([[5.0]]).requires_grad_(), float64([[-4.0]]).requires_grad_()]
    found = module.linearised(*given, variable)
    close(found, [[5.0, 5.0]])
    gradients = torch.autograd.grad(found.sum(), [variable, *given], allow_unused=True)
    close(gradients[0], [[-4.0, -4.0]])
    assert gradients[1:] == (None, None), "both are constants"
    signals = {"value": float64([5.0]), "slope": float64([-4.0])}
    batch = batch_of(torch.ones(1, 2).bool(), float64([0.0]))
    narrow = variable.detach().float().requires_grad_()
    found = module.coupled_loss(replace(batch, signals=signals), narrow)
    assert found.tolist() == [[5.0, 5.0]]
    (gradient,) = torch.autograd.grad(found.sum(), narrow)
    assert gradient.tolist() == [[-4.0, -4.0]]
    assert found.dtype == torch.float32


def check_reduction(module: ModuleType) -> None:
    rows = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]
    for width, expected in ((2, [[1, 2], [4, 0]]), (4, [[1, 2, 3, 0], [4, 0, 0, 0]])):
        assert module.side_by_side(rows, width).tolist() == expected
    check_coupling(module)
    terms, batch = random_case()
    mask, weights = batch.mask, float64([1, 0.5, 1, 1, 2, 0])
    loss = terms.logp.detach().masked_fill(~mask, float("nan"))
    values = {b: [loss[b, k].item() for k in range(5) if mask[b, k]] for b in range(6)}
    for how in AGGREGATIONS:
        expected = aggregate(values, weights.tolist(), how, 7)
        close(reduced(module, loss, mask, weights, how, 7), expected)
    close(
        module.masked_mean(loss, mask)[1:4, 0], [*map(statistics.fmean, [values[1], values[2]]), 0]
    )
    used = [value for b, row in values.items() if weights[b] > 0 for value in row]
    rows = {"each": loss, "sample": module.masked_mean(loss, mask)}
    rows |= {"each/min": loss, "each/max": loss}
    tallies = module.tallies(rows, mask, weights)
    close(tallies["each"], (sum(used), len(used)))
    close(tallies["each/min"], min(used))
    close(tallies["each/max"], max(used))
    assert module.tallies({"x/max": loss}, mask, 0 * weights) == {}
    close(tallies["sample"], (sum(statistics.fmean(values[b]) for b in (0, 1, 2, 4)), 4))
    close(module.denominator(mask, weights, "sample_mean_of_sums", count_empty=True), 5.5)
