"""Loop oracles of the parts that text models brought, and checks of modules against them."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from core_oracles import close, entries, float64, random_case, random_scores, ratios, trained
from pydantic import ValidationError

from mmrl.errors import UserError
from mmrl.types import LossTerms, PolicyTerms, Scores, UpdateBatch

# --- objectives -----------------------------------------------------------------------------------

CISPO_BOUNDS = (
    ({"low": 0.2, "high": 0.28}, 0.8, 1.28),
    ({"high": 0.1}, 0.0, 1.1),
    ({"bounds": "absolute", "high": 1.5}, 0.0, 1.5),
    ({"bounds": "absolute", "low": 0.7, "high": 1.2}, 0.7, 1.2),
)


def check_cispo(module: ModuleType) -> None:
    for options, low, high in CISPO_BOUNDS:
        terms, batch = random_case()
        out = module.loss(terms, batch, module.Config(**options))
        found, logp = ratios(terms, batch, "decision"), terms.logp.tolist()
        for (b, k), ratio in found.items():
            weight = min(max(ratio, low), high)
            close(out.loss[b, k], -batch.advantages[b].item() * weight * logp[b][k])
        used = [found[key] for key in trained(batch)]
        below, above = sum(r < low for r in used), sum(r > high for r in used)
        assert (below > 0) == (low > 0)
        assert above > 0, "a case without active upper bound tests nothing"
        close(out.metrics["ratio/mean"], (sum(used), len(used)))
        close(out.metrics["clip_ratio/low"], (below, len(used)))
        close(out.metrics["clip_ratio/high"], (above, len(used)))
        close(out.metrics["clip_ratio/region"], (below + above, len(used)))
        check_approx_kl(out.metrics["approx_kl"], terms, batch)
    module.Config(bounds="absolute", low=1.0, high=1.0)
    for wrong in ({"low": 1.01, "high": 2}, {"low": 0.5, "high": 0.99}):
        with pytest.raises(ValidationError, match="should not cut off the ratio 1"):
            module.Config(bounds="absolute", **wrong)


def check_approx_kl(pair: tuple[float, float], terms: PolicyTerms, batch: UpdateBatch) -> None:
    gaps = [terms.logp[key].item() - batch.logp_old[key].item() for key in trained(batch)]
    close(pair, (sum(math.exp(gap) - 1 - gap for gap in gaps), len(gaps)))


def check_sapo(module: ModuleType) -> None:
    terms, batch = random_case()
    for positive, negative in ((1.0, 1.05), (0.5, 3.0)):
        config = module.Config(temperature_positive=positive, temperature_negative=negative)
        out, slopes = module.loss(terms, batch, config), {}
        found = ratios(terms, batch, "decision")
        for (b, k), ratio in found.items():
            advantage = batch.advantages[b].item()
            tau = positive if advantage > 0 else negative
            gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
            close(out.loss[b, k], -advantage * gate * 4 / tau)
            slopes[b, k] = 4 * gate * (1 - gate)
        used = trained(batch)
        close(out.metrics["ratio/mean"], (sum(found[key] for key in used), len(used)))
        close(out.metrics["gate/mean"], (sum(slopes[key] for key in used), len(used)))
        check_approx_kl(out.metrics["approx_kl"], terms, batch)


def check_sft(module: ModuleType) -> None:
    terms, batch = random_case()
    out = module.loss(terms, batch, module.Config())
    logp = terms.logp.tolist()
    for b, k in entries(batch.mask):
        close(out.loss[b, k], -logp[b][k])
    used = [-logp[b][k] for b, k in trained(batch)]
    close(out.metrics["nll"], (sum(used), len(used)))


# --- correction -----------------------------------------------------------------------------------


def check_importance_sampling(module: ModuleType) -> None:
    for level, mode in itertools.product(("decision", "sample"), ("truncate", "mask")):
        config = module.Config(level=level, mode=mode, cap=1.2)
        terms, batch = random_case()
        policy = LossTerms(loss=2 + terms.logp.detach(), metrics={"own": (1.0, 2.0)})
        out = module.correct(policy, terms, batch, config)
        gaps = {
            (b, k): float(batch.logp_old[b, k] - terms.logp_sampled[b, k])
            for b, k in entries(batch.mask)
        }
        # A weight of a sample is logged once, at its first decision.
        logged, above = [], 0
        for b, k in trained(batch):
            same = [gap for (row, j), gap in gaps.items() if row == b and level == "sample"]
            weight = math.exp(sum(same or [gaps[b, k]]))
            above += weight > 1.2
            weight = weight if weight <= 1.2 else 1.2 if mode == "truncate" else 0.0
            close(out.loss[b, k], policy.loss[b, k].item() * weight, 1e-9)
            logged += [weight] if level == "decision" or k == 0 else []
        assert above, "a case without active cap tests nothing"
        ratio, gap = "sampling/importance_sampling_ratio", "sampling/sampling_logp_difference"
        sizes = [abs(gaps[key]) for key in trained(batch)]
        expected = {
            "own": (1.0, 2.0),
            f"{ratio}/mean": (sum(logged), len(logged)),
            f"{ratio}/min": min(logged),
            f"{ratio}/max": max(logged),
            f"{gap}/mean": (sum(sizes), len(sizes)),
            f"{gap}/max": max(sizes),
        }
        assert out.metrics.keys() == expected.keys()
        for name, value in expected.items():
            close(out.metrics[name], value, 1e-9)


# --- regularisers ---------------------------------------------------------------------------------


def check_entropy(module: ModuleType) -> None:
    terms, batch = random_case()
    entropy = terms.entropy.tolist()
    # Samples of 5, 3, 1, 0, 4 and 5 decisions.
    for share, sizes in (
        (1.0, [5, 3, 1, 0, 4, 5]),
        (0.5, [3, 2, 1, 0, 2, 3]),
        (0.2, [1, 1, 1, 0, 1, 1]),
    ):
        out = module.loss(terms, batch, module.Config(top_share=share))
        for b, row in enumerate(entropy):
            real = [k for k in range(5) if batch.mask[b, k]]
            counts = sorted(real, key=lambda k, row=row: row[k])[len(real) - sizes[b] :]
            close(out.loss[b], [-row[k] if k in counts else 0.0 for k in range(5)])
        used = [entropy[b][k] for b, k in trained(batch)]
        close(out.metrics["entropy"], (sum(used), len(used)))
    many, everything = torch.rand(1, 100), torch.ones(1, 100, dtype=torch.bool)
    for share in (0.07, 0.29, 0.57):  # times 100 none is a whole number in binary
        assert module.highest(many, everything, share).sum() == round(100 * share)
    assert module.needs(module.Config()) == {"entropy"}
    assert module.needs(module.Config(coef=0)) == set()
    off = module.loss(PolicyTerms(logp=terms.logp), batch, module.Config(coef=0))
    assert not off.loss.any()


def check_entropy_corridor(module: ModuleType) -> None:
    terms, batch = random_case()
    entropy = terms.entropy.tolist()
    config = module.Config(low=0.5, high=0.8, tasks={"own": {"low": 1.0, "high": 1.1}})
    tasks = ["own", "", "own", "", "", ""]
    out = module.loss(terms, replace(batch, tasks=tasks), config)
    means, outside = [], 0
    for b, row in enumerate(entropy):
        mine = [row[k] for k in range(5) if batch.mask[b, k]]
        mean = statistics.fmean(mine) if mine else 0.0
        bounds = config.tasks[tasks[b]] if tasks[b] else config
        penalty = max(mean - bounds.high, 0.0) + max(bounds.low - mean, 0.0)
        close(out.loss[b], [penalty])
        if mine and batch.weights[b] > 0:
            means.append(mean)
            outside += penalty > 0
    close(out.metrics["entropy/mean"], (sum(means), len(means)))
    close(out.metrics["entropy/outside"], (outside, len(means)))
    assert 0 < outside < len(means)
    without, nameless = (
        module.loss(terms, replace(batch, tasks=names), config) for names in ((), [""] * 6)
    )
    assert torch.equal(without.loss, nameless.loss)
    module.Bounds(low=0.5, high=0.5)
    with pytest.raises((UserError, ValidationError), match=r"low = 0\.7 is above high = 0\.6"):
        module.Config(low=0.7)
    assert module.needs(module.Config()) == {"entropy"}
    assert module.needs(module.Config(coef=0)) == set()
    off = module.loss(PolicyTerms(logp=terms.logp), batch, module.Config(coef=0))
    assert not off.loss.any()
    assert off.metrics == {}


# --- advantage ------------------------------------------------------------------------------------


def quantile(p: float) -> float:
    return torch.special.ndtri(float64(p)).item()


def transported(values: list[float]) -> list[float]:
    """Each value gets the mean quantile of the ranks that its equals take up."""
    size = len(values)
    results = []
    for value in values:
        first = sum(other < value for other in values)
        ranks = range(first, first + values.count(value))
        results.append(statistics.fmean(quantile((rank + 0.5) / size) for rank in ranks))
    return results if len(set(values)) > 1 else [0.0] * size


def by_part(values: list[float], parts: list, active: list[bool]) -> list[float]:
    results = [0.0] * len(values)
    for part in set(parts):
        rows = [i for i, each in enumerate(parts) if each == part and active[i]]
        for i, value in zip(rows, transported([values[i] for i in rows]), strict=True):
            results[i] = value
    return results


TASKS = ["x", "y", "x", "x", "y", "x", "x", "x", "y", "x", "x", "x", "x"]
"""Of ``random_scores``: group 2 is of task y, the others of x."""


def tasked_scores() -> Scores:
    """``random_scores`` with tasks, and ties in group 7."""
    scores = random_scores()
    combined = scores.combined.clone()
    combined[[0, 9]] = 0.25
    return replace(scores, combined=combined, task=TASKS)


def check_g2rpo(module: ModuleType) -> None:
    scores = tasked_scores()
    rewards, groups = scores.combined.tolist(), scores.group.tolist()
    valid, once = scores.valid.tolist(), by_part(rewards, groups, scores.valid.tolist())
    result, state = module.estimate(scores, module.Config(), {"kept": 1})
    close(result.values, once)
    assert (result.keep.tolist(), state) == (valid, {"kept": 1})
    for names, tasks in ((TASKS, TASKS), ([], ["one"] * 13)):
        twice, _ = module.estimate(
            replace(scores, task=names), module.Config(second_stage=True), {}
        )
        level = [round(value, 6) for value in once]
        active = [groups[i] in (7, 2) and valid[i] for i in range(13)]  # the others are flat
        close(twice.values, by_part(level, tasks, active))
    check_g2rpo_per_reward(module, scores)
    wide = module.estimate(scores, module.Config(min_spread=100.0), {})[0]
    assert not wide.values.any()
    with pytest.raises(ValidationError, match="belongs to per_reward"):
        module.Config(weights={"a": 1.0})


def check_g2rpo_per_reward(module: ModuleType, scores: Scores) -> None:
    groups, valid = scores.group.tolist(), scores.valid.tolist()
    columns = {name: column.tolist() for name, column in scores.by_name.items()}
    for weights in (None, {"a": 2.0, "b": -0.5}, {"a": 0.0, "b": 1.0}):
        config = module.Config(per_reward=True, weights=weights)
        parts = {}
        for name, column in columns.items():
            active = [not math.isnan(value) and valid[i] for i, value in enumerate(column)]
            parts[name] = by_part(column, groups, active)
        used = weights or {"a": 1.0, "b": 1.0}
        result, _ = module.estimate(scores, config, {})
        close(result.values, [sum(w * parts[n][i] for n, w in used.items()) for i in range(13)])
        assert result.keep.tolist() == valid
        assert module.reward_weights(config, ["a", "b"]) == used
    with pytest.raises(UserError, match="no weight for reward 'b'"):
        module.estimate(scores, module.Config(per_reward=True, weights={"a": 1.0}), {})
    assert module.reward_weights(module.Config(), ["a", "b"]) == {}


def check_transport(module: ModuleType) -> None:
    scores = tasked_scores()
    values, valid = scores.combined.tolist(), scores.valid.tolist()
    for parts in (scores.group, torch.zeros(13, dtype=torch.int64)):
        actual = module.transport(scores.combined, parts, scores.valid)
        close(actual, by_part(values, parts.tolist(), valid))
    given = float64([0.31, 0.29, 0.52, 0.48, 0.98])
    close(module.quantiles(given, 0.1, 0.0), transported([3, 3, 5, 5, 10]))
    for spread, flat in ((0.0, False), (0.6, False), (0.7, True), (0.8, True)):
        assert module.quantiles(given, 0.1, spread).eq(0).all() == flat
