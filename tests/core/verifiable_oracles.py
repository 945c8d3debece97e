"""Loop oracles of advantage estimators and modulators for verifiable rewards."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from core_oracles import (
    centred,
    close,
    deviation,
    fit_scores,
    float64,
    no_scores,
    one_reward,
    random_scores,
    rewards_by_group,
    some_advantages,
)

from mmrl.errors import UserError
from mmrl.types import Scores


def rows_by_group(scores: Scores) -> dict[int, list[int]]:
    """Positions of the valid samples of each group, in ascending order of groups."""
    found: dict[int, list[int]] = {group: [] for group in sorted(set(scores.group.tolist()))}
    for i, group in enumerate(scores.group.tolist()):
        if scores.valid[i]:
            found[group].append(i)
    return found


# --- RiskPO ---------------------------------------------------------------------------------------


def paper_members(scores: Scores, size: int) -> list[tuple[int, list[int]]]:
    """(bundle, positions) of each paper."""
    groups = [rows for rows in rows_by_group(scores).values() if rows]
    found = []
    for bundle in range(len(groups) // size):
        chosen = groups[bundle * size : (bundle + 1) * size]
        for j in range(max(map(len, chosen))):
            found.append((bundle, [rows[j % len(rows)] for rows in chosen]))
    return found


def check_bundles(module: ModuleType) -> None:
    scores = random_scores()
    rows = [torch.tensor(rows) for rows in rows_by_group(scores).values()]
    rows.insert(1, torch.tensor([], dtype=torch.int64))
    for size in (1, 2, 3, 5):
        found = module.papers(rows, size)
        expected = paper_members(scores, size)
        assert found.member.tolist() == [members for _, members in expected]
        assert found.bundle.tolist() == [bundle for bundle, _ in expected]
    found = module.papers(rows, 2)
    credit = torch.arange(14, dtype=torch.float64).view(7, 2)
    totals: dict[int, list[float]] = {}
    for (_, members), values in zip(paper_members(scores, 2), credit.tolist(), strict=True):
        for member, value in zip(members, values, strict=True):
            totals.setdefault(member, []).append(value)
    close(found.spread(credit, 13), [statistics.fmean(totals.get(i, [0.0])) for i in range(13)])
    check_credit(module)


def check_credit(module: ModuleType) -> None:
    values, rewards = [2.0, -3.0, 1.0], [[1.0, 0.0], [0.5, -1.0], [1.0, 1.0]]
    gaps = [[0.5, -0.25], [0.1, -0.1], [0.75, -0.7]]
    spreads = [[0.5, 1e-4], [2.0, 1e-3], [0.25, 0.5]]
    given = (float64(values), float64(rewards), float64(gaps), float64(spreads))
    expected = {
        "uniform": [[v, v] for v in values],
        "std": [
            [v / (s if s > 1e-3 else 1) for s in row]
            for v, row in zip(values, spreads, strict=True)
        ],
        "score": [
            [v * (0.5 if r > 0 else 1.5) for r in row]
            for v, row in zip(values, rewards, strict=True)
        ],
        # Sums of 0.25, of 0 and of 0.05: shares of 2 and -1, of one half, of 15 within 2.
        "sum_mean": [[4.0, -2.0], [-1.5, -1.5], [2.0, -2.0]],
    }
    for how, wanted in expected.items():
        close(module.credited(*given, how), wanted)
    negative = module.credited(given[0], given[1], -given[2], given[3], "sum_mean")
    close(negative, expected["sum_mean"])


MARKS, BUNDLE = (0.0, 2.0, 5.0, 3.0, 1.0, 4.0, 4.0, 4.0), (0, 0, 0, 1, 1, 1, 2, 2)
JUDGES = [[1.0, 3.0]] * 4 + [[0.5, 3.5]] * 4


class Levels:
    alpha, beta, omega = 0.2, 0.8, 1.5


def check_mixed_var(module: ModuleType) -> None:
    marks, bundle, judges = float64(MARKS), torch.tensor(BUNDLE), float64(JUDGES)
    by_bundle = {b: [m for m, own in zip(MARKS, BUNDLE, strict=True) if own == b] for b in range(3)}
    for natural in (True, False):
        printed, released = [], []
        for s, b, (low, high) in zip(MARKS, BUNDLE, JUDGES, strict=True):
            middle = max(s - low, 0) - max(s - high, 0)
            printed.append(-2.5 * max(low - s, 0) + middle + low - high)
            middle = (middle + (low - high) * natural) / 0.6
            mixed = (1.5 * -max(low - s, 0) / 0.2 + middle) / 2.5
            spread = deviation(by_bundle[b], 1)
            released.append(mixed / spread if spread > 0 else 0.0)
        close(module.printed(marks, bundle, judges, Levels, natural), printed)
        close(module.released(marks, bundle, judges, Levels, natural), released)
    assert module.FORMS == {"code": module.released, "paper": module.printed}
    check_quantiles(module, marks, bundle, by_bundle)


def check_quantiles(module: ModuleType, marks, bundle, by_bundle) -> None:
    levels = float64([0.25, 0.5])
    state = module.first_state(marks, levels)
    ordered = sorted(MARKS)  # 0 1 2 3 4 4 4 5: at places 1.75 and 3.5
    expected = [ordered[1] + 0.75 * (ordered[2] - ordered[1]), (ordered[3] + ordered[4]) / 2]
    assert state["quantiles"] == pytest.approx(expected)
    assert state["range"] == [0.0, 5.0]
    run = {"quantiles": [2.0, 3.0], "range": [1.0, 4.0]}
    moved = module.followed(marks, levels, 0.4, run)
    below = [sum(m < q for m in MARKS) / 8 for q in (2.0, 3.0)]
    assert moved["quantiles"] == pytest.approx(
        [2 + 0.4 * (0.25 - below[0]), 3 + 0.4 * (0.5 - below[1])]
    )
    assert moved["range"] == [0.0, 5.0]
    far = module.followed(marks, levels, 1.0, {"quantiles": [9.0, -7.0], "range": [-1.0, 6.0]})
    assert far == {"quantiles": [-1.0, 6.0], "range": [-1.0, 6.0]}
    own = [float64(by_bundle[b]).quantile(levels).tolist() for b in BUNDLE]
    close(module.judging(marks, bundle, levels, "run", run), [[2.0, 3.0]] * 8)
    close(module.judging(marks, bundle, levels, "bundle", run), own)
    mixed = [[(2 + low) / 2, (3 + high) / 2] for low, high in own]
    close(module.judging(marks, bundle, levels, "mix", run), mixed)


def check_riskpo(module: ModuleType) -> None:
    scores = random_scores()
    rewards, groups = scores.combined.tolist(), rewards_by_group(scores)
    state = {"quantiles": [-0.3, 0.8], "range": [-2.0, 2.0]}
    config = module.Config(bundle_size=2, form="paper", credit="std", quantile_rate=0.5)
    result, after = module.estimate(scores, config, state)
    totals: dict[int, list[float]] = {}
    marks = []
    for _, members in paper_members(scores, 2):
        mark = sum(rewards[i] for i in members)
        marks.append(mark)
        value = -2.5 * max(-0.3 - mark, 0) + max(mark + 0.3, 0) - max(mark - 0.8, 0) - 1.1
        for i in members:
            spread = deviation(groups[int(scores.group[i])], 1)
            totals.setdefault(i, []).append(value / (spread if spread > 1e-3 else 1.0))
    close(result.values, [statistics.fmean(totals.get(i, [0.0])) for i in range(13)])
    below = [statistics.fmean(m < q for m in marks) for q in (-0.3, 0.8)]
    assert after["quantiles"] == pytest.approx(
        [-0.3 + 0.5 * (0.2 - below[0]), 0.8 + 0.5 * (0.8 - below[1])]
    )
    assert result.metrics["riskpo/papers"] == len(marks)
    close([result.metrics["riskpo/low"], result.metrics["riskpo/high"]], [-0.3, 0.8])
    nothing, same = module.estimate(scores, module.Config(bundle_size=5), {})
    assert not nothing.values.any()
    assert same == {}
    module.refuse(module.Config(bundle_size=4), 8, 2)
    with pytest.raises(UserError, match="bundle_size: 4 does not divide the 10 prompts"):
        module.refuse(module.Config(bundle_size=4), 10, 2)


# --- BNPO -----------------------------------------------------------------------------------------


def beta_density(p: float, alpha: float, beta: float) -> float:
    scale = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)
    return p ** (alpha - 1) * (1 - p) ** (beta - 1) / scale


def beta_fit(rates: list[float]) -> tuple[float, float]:
    mean, spread = statistics.fmean(rates), statistics.variance(rates) if len(rates) > 1 else 0.0
    if spread == 0:
        return 1.0, 1.0
    kappa = mean * (1 - mean) / spread - 1
    return max(1.0, 1 + kappa * mean / 3), max(1.0, 1 + kappa * (1 - mean) / 3)


def check_beta(module: ModuleType) -> None:
    for rates in ([0.2, 0.35, 0.4, 0.6], [0.9, 0.8, 0.95], [0.0, 1.0], [0.3], [0.5, 0.5]):
        assert module.fitted(float64(rates)) == pytest.approx(beta_fit(rates))
    assert module.fitted(float64([0.2, 0.35, 0.4, 0.6]))[1] > 2
    for alpha, beta in ((1.0, 1.0), (1.5, 1.5), (1.2, 4.0)):
        rates = [0.1, 0.5, 0.85]
        close(
            module.density(float64(rates), alpha, beta),
            [beta_density(p, alpha, beta) for p in rates],
        )


def check_bnpo(module: ModuleType) -> None:
    scores = fit_scores(module, random_scores())
    for most in (1e6, 0.9):
        result, _ = module.estimate(scores, module.Config(max_weight=most), {})
        expected, alpha, beta = expected_bnpo(scores, most)
        close(result.values, expected, 1e-10)
        close([result.metrics["bnpo/alpha"], result.metrics["bnpo/beta"]], [alpha, beta])
    unit = {n: c.sigmoid() for n, c in random_scores().by_name.items()}
    several = replace(scores, by_name=unit)
    result, _ = module.estimate(several, module.Config(weights={"a": 0.5, "b": 0.25}), {})
    parts = {name: one_reward(several, name) for name in "ab"}
    found = {name: expected_bnpo(part, 1e6) for name, part in parts.items()}
    close(
        result.values, [0.5 * found["a"][0][i] + 0.25 * found["b"][0][i] for i in range(13)], 1e-10
    )
    assert result.keep.tolist() == (parts["a"].valid | parts["b"].valid).tolist()
    close(result.metrics["bnpo/alpha/b"], found["b"][1])
    only, _ = module.estimate(several, module.Config(weights={"a": 0.0, "b": 1.0}), {})
    close(only.values, found["b"][0], 1e-10)
    assert only.keep.tolist() == parts["b"].valid.tolist()
    for wrong in (1.5, -0.01):
        bad = replace(scores, combined=torch.where(scores.valid, wrong, 0.0).double())
        with pytest.raises(UserError, match=f"and one is {wrong:g}; allowed: 0 to 1"):
            module.estimate(bad, module.Config(), {})


def expected_bnpo(scores: Scores, most: float) -> tuple[list[float], float, float]:
    groups = rewards_by_group(scores)
    rates = {group: statistics.fmean(found) for group, found in groups.items() if found}
    alpha, beta = beta_fit(list(rates.values()))
    values = []
    for gap, group in zip(centred(scores), scores.group.tolist(), strict=True):
        weight = min(1 / beta_density(rates[group], alpha, beta), most) if gap else 0.0
        values.append(weight * gap)
    return values, alpha, beta


# --- GDPO -----------------------------------------------------------------------------------------


def check_standardise(module: ModuleType) -> None:
    values, counts = [1.0, -2.0, 0.5, 7.0], [2, 1, 3, 0]
    used = values[:3]
    spread = statistics.stdev(used)
    ones = float64([1, 1, 1, 0])
    found = module.over_samples(float64(values), ones, 0.01)
    mean = statistics.fmean(used)
    close(found, [(v - mean) / (spread + 0.01) for v in used] + [0.0])
    long = [v for v, n in zip(values, counts, strict=True) for _ in range(n)]
    mean, spread = statistics.fmean(long), math.sqrt(statistics.pvariance(long) + 1e-8)
    found = module.over_decisions(float64(values), float64(counts))
    close(found, [(v - mean) / spread for v in used] + [0.0])
    tiny = module.over_decisions(float64([0, 2e-4]), float64([1, 1]))
    close(tiny, [-1e-4 / math.sqrt(2e-8), 1e-4 / math.sqrt(2e-8)])
    for nothing in (float64([0, 0, 0, 0]), float64([0, 0, 0, 1])):
        assert not module.over_samples(float64(values), nothing, 0.01).any()
        assert not module.over_decisions(float64(values), nothing).any()
    equal = float64([0.1] * 3)
    assert not module.over_samples(equal, torch.ones(3).double(), 0.0).any()


def check_gdpo(module: ModuleType) -> None:
    from mmrl.advantages import per_reward

    scores = random_scores()
    for weights in (None, {"a": 2.0, "b": -0.5}):
        base = per_reward.Config(weights=weights, deviation="group", ddof=1, eps=1e-4)
        plain, _ = per_reward.estimate(scores, base, {})
        kept = [i for i in range(13) if plain.keep[i]]
        values, lengths = plain.values.tolist(), scores.length.tolist()
        none, _ = module.estimate(scores, module.Config(weights=weights, batch="none"), {})
        assert torch.equal(none.values, plain.values)
        assert none.metrics == plain.metrics
        mean, spread = (
            statistics.fmean(values[i] for i in kept),
            statistics.stdev(values[i] for i in kept),
        )
        once, _ = module.estimate(scores, module.Config(weights=weights), {})
        close(
            once.values,
            [(values[i] - mean) / (spread + 1e-4) if i in kept else 0 for i in range(13)],
        )
        long = [values[i] for i in kept for _ in range(lengths[i])]
        mean, spread = statistics.fmean(long), math.sqrt(statistics.pvariance(long) + 1e-8)
        long_form, _ = module.estimate(scores, module.Config(weights=weights, batch="decision"), {})
        close(
            long_form.values, [(values[i] - mean) / spread if i in kept else 0 for i in range(13)]
        )
        assert torch.equal(once.keep, plain.keep)
        close(once.metrics["advantage/max"], once.values.abs().max().item())
    assert module.reads(module.Config()) == set()
    assert module.reads(module.Config(batch="decision")) == {"length"}
    check_ruling(module, scores)


def check_ruling(module: ModuleType, scores: Scores) -> None:
    ruling = module.Config(batch="none", only_if={"b": {"reward": "a", "least": 0.0}})
    a, b = (scores.by_name[name].tolist() for name in "ab")
    hand = [math.nan if math.isnan(x) else y * (x >= 0) for x, y in zip(a, b, strict=True)]
    found = module.ruled(scores.by_name, ruling)
    for got, wanted in zip(found["b"].tolist(), hand, strict=True):
        assert got == wanted or (math.isnan(got) and math.isnan(wanted))
    assert any(h == 0 and y for h, y in zip(hand, b, strict=True))
    assert (
        torch.equal(
            found["a"],
            scores.by_name["a"],
        )
        or scores.by_name["a"].isnan().any()
    )
    expected, _ = module.estimate(
        replace(scores, by_name={**scores.by_name, "b": float64(hand)}),
        module.Config(batch="none"),
        {},
    )
    close(module.estimate(scores, ruling, {})[0].values, expected.values.tolist())
    assert module.reward_weights(ruling, ["a", "b"]) == {"a": 1.0, "b": 1.0}
    for wrong in ({"c": {"reward": "a", "least": 0}}, {"a": {"reward": "c", "least": 0}}):
        with pytest.raises(UserError, match=r"advantage.only_if: no reward 'c'"):
            module.estimate(scores, module.Config(only_if=wrong), {})


# --- COPO -----------------------------------------------------------------------------------------


def entropies(scores: Scores, unparsed: str) -> dict[int, float]:
    found = {}
    for group, rows in rows_by_group(scores).items():
        answers = [scores.answer[i] for i in rows]
        if unparsed == "distinct":
            answers = [
                i if answer is None else answer for i, answer in zip(rows, answers, strict=True)
            ]
        shares = [count / len(rows) for count in Counter(answers).values()]
        found[group] = -sum(share * math.log(share) for share in shares)
    return found


def check_answers(module: ModuleType) -> None:
    scores = random_scores()
    for unparsed in ("one", "distinct"):
        close(module.answer_entropy(scores, unparsed), list(entropies(scores, unparsed).values()))
    counts = float64([0, 1, 4, 6, 9])
    scaled = [1.5 * math.log(max(n, 1)) / math.log(6) for n in (0, 1, 4, 6, 9)]
    close(module.even_entropy(counts, None), scaled)
    close(module.even_entropy(counts, 0.7), [0.7] * 5)
    scores = replace(scores, answer=[None] * 13)
    close(module.answer_entropy(scores, "one"), [0.0] * 4)
    sizes = [len(rows) for rows in rows_by_group(scores).values()]
    close(module.answer_entropy(scores, "distinct"), [math.log(size) for size in sizes])


def check_copo(module: ModuleType) -> None:
    scores = random_scores()
    groups = rewards_by_group(scores)
    means = {group: statistics.fmean(found) for group, found in groups.items()}
    middle, spread = statistics.fmean(means.values()), statistics.stdev(means.values())
    for threshold, unparsed, eps in ((None, "one", 1e-6), (0.7, "distinct", 0.5)):
        config = module.Config(sharpness=3.0, threshold=threshold, unparsed=unparsed, eps=eps)
        result, _ = module.estimate(scores, config, {})
        found, shares = entropies(scores, unparsed), {}
        for group, entropy in found.items():
            at = (
                1.5 * math.log(len(groups[group])) / math.log(6) if threshold is None else threshold
            )
            shares[group] = 1 / (1 + math.exp(-3.0 * (entropy - at)))
        expected = []
        for gap, group, valid in zip(
            centred(scores), scores.group.tolist(), scores.valid, strict=True
        ):
            local = gap / (deviation(groups[group], 1) + eps)
            between = (means[group] - middle) / (spread + eps)
            expected.append(shares[group] * local + (1 - shares[group]) * between if valid else 0.0)
        close(result.values, expected)
        close(result.metrics["copo/entropy"], statistics.fmean(found.values()))
        close(result.metrics["copo/local"], statistics.fmean(shares.values()))
    module.refuse(module.Config(threshold=1.5), 1, 5)
    module.refuse(module.Config(), 1, 2)
    with pytest.raises(UserError, match=r"threshold: 1.5 is not below log\(4\) = 1.39"):
        module.refuse(module.Config(threshold=1.5), 1, 4)
    assert module.reads(module.Config()) == {"answer"}


# --- baselines ------------------------------------------------------------------------------------


def check_optimal_baseline(module: ModuleType) -> None:
    scores = random_scores()
    rewards = scores.combined.tolist()
    facts = {"length": scores.length.tolist(), "logits": scores.score_norm.tolist()}
    for name, weights in facts.items():
        for leave_one_out in (True, False):
            config = module.Config(weight=name, leave_one_out=leave_one_out)
            result, _ = module.estimate(scores, config, {})
            for rows in rows_by_group(scores).values():
                for i in rows:
                    among = [j for j in rows if not (leave_one_out and j == i)]
                    total = sum(weights[j] for j in among)
                    base = (
                        sum(weights[j] * rewards[j] for j in among) / total if among else rewards[i]
                    )
                    close(result.values[i], rewards[i] - base)
            assert not result.values[~scores.valid].any()
    zero = replace(scores, score_norm=torch.zeros(13).double())
    for leave_one_out in (True, False):
        result, _ = module.estimate(
            zero, module.Config(weight="logits", leave_one_out=leave_one_out), {}
        )
        for rows in rows_by_group(scores).values():
            for i in rows:
                among = [rewards[j] for j in rows if not (leave_one_out and j == i)] or [rewards[i]]
                close(result.values[i], rewards[i] - statistics.fmean(among))
    assert module.reads(module.Config()) == {"length"}
    assert module.reads(module.Config(weight="logits")) == {"score_norm"}


def dense_kernel(groups: list[int], common: float, between: float, within: float) -> torch.Tensor:
    return float64(
        [
            [common + between * (g == h) + within * (i == j) for j, h in enumerate(groups)]
            for i, g in enumerate(groups)
        ]
    )


def check_gp_loo(module: ModuleType) -> None:
    scores = random_scores()
    rows = [i for i in range(13) if scores.valid[i]]
    groups, rewards = (
        [int(scores.group[i]) for i in rows],
        [scores.combined[i].item() for i in rows],
    )
    for common, between, within, mean in (
        (1.0, 0.05, 0.15, 0.0),
        (0.0, 2.0, 0.3, 0.4),
        (0.7, 0.0, 1.0, -1.0),
    ):
        config = module.Config(common=common, between=between, within=within, mean=mean)
        result, state = module.estimate(scores, config, {"kept": 1.0})
        kernel = dense_kernel(groups, common, between, within)
        for place, i in enumerate(rows):
            rest = [j for j in range(len(rows)) if j != place]
            solved = torch.linalg.solve(
                kernel[rest][:, rest], float64([rewards[j] - mean for j in rest])
            )
            predicted = mean + (kernel[place, rest] @ solved).item()
            close(result.values[i], rewards[place] - predicted, 1e-10)
        assert not result.values[~scores.valid].any()
        assert state == {"kept": 1.0}
        close(
            [result.metrics["gp_loo/between"], result.metrics["gp_loo/within"]], [between, within]
        )
    check_gp_fit(module, scores)


def analysis_of_variance(scores: Scores) -> dict[str, float]:
    """Of groups of unlike sizes, one way."""
    found = [rewards for rewards in rewards_by_group(scores).values() if rewards]
    everything = [reward for rewards in found for reward in rewards]
    grand, total, number = statistics.fmean(everything), len(everything), len(found)
    inside = sum((r - statistics.fmean(g)) ** 2 for g in found for r in g) / (total - number)
    around = sum(len(g) * (statistics.fmean(g) - grand) ** 2 for g in found) / (number - 1)
    size = (total - sum(len(g) ** 2 for g in found) / total) / (number - 1)
    return {"between": max((around - inside) / size, 0.0), "within": inside}


def check_gp_fit(module: ModuleType, scores: Scores) -> None:
    config = module.Config(fit=True)
    near, far = scores, replace(scores, combined=scores.combined + scores.group.double())
    first, state = module.estimate(near, config, {})
    known, other = analysis_of_variance(near), analysis_of_variance(far)
    assert other["between"] > 1
    assert state == pytest.approx(known)
    close([first.metrics["gp_loo/between"], first.metrics["gp_loo/within"]], [0.05, 0.15])
    assert module.estimate(far, config, {})[1] == pytest.approx(other)
    second, later = module.estimate(far, config, state)
    close(second.metrics["gp_loo/within"], known["within"])
    assert later == pytest.approx({n: 0.9 * known[n] + 0.1 * other[n] for n in known})
    alone = replace(scores, valid=scores.group == 7)
    assert module.estimate(alone, config, {})[1] == {}
    equal = replace(scores, combined=scores.group.double())
    assert module.estimate(equal, config, {})[1]["within"] == 1e-6


# --- SubPO ----------------------------------------------------------------------------------------

POOL_REWARDS = (0.4, 1.0, 0.9, 1.0, 0.7)
POOL_ANSWERS = ("3", "4", "4", None, "5")


def expected_worth(name: str, chosen, kernel: list[list[float]]) -> float:
    r = POOL_REWARDS
    if name == "max":
        return max((r[i] for i in chosen), default=0.0)
    if name == "distinct":
        return float(len({POOL_ANSWERS[i] for i in chosen if r[i] > 0.5 and POOL_ANSWERS[i]}))
    if name == "facility_location":
        return sum(
            max((r[i] * max(kernel[v][i], 0) for i in chosen), default=0.0) for v in range(5)
        )
    matrix = [[math.sqrt(r[i] * r[j]) * kernel[i][j] + (i == j) for j in chosen] for i in chosen]
    return math.log(determinant(matrix))


def determinant(matrix: list[list[float]]) -> float:
    if not matrix:
        return 1.0
    rest = [row[1:] for row in matrix]
    return sum(
        (-1) ** i * row[0] * determinant(rest[:i] + rest[i + 1 :]) for i, row in enumerate(matrix)
    )


def pool_features() -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(5, 3, dtype=torch.float64, generator=draw)


def cosine(x: list[float], y: list[float]) -> float:
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def check_sets(module: ModuleType) -> None:
    features = pool_features()
    kernel = [[cosine(x, y) for y in features.tolist()] for x in features.tolist()]
    close(module.cosines(features), kernel)
    assert module.cosines(torch.zeros(2, 3).double()).tolist() == [[0, 0], [0, 0]]
    pool = module.Pool(
        rewards=float64(POOL_REWARDS), answers=POOL_ANSWERS, kernel=module.cosines(features)
    )
    for name, function in module.FUNCTIONS.items():
        for size in range(6):
            for chosen in itertools.combinations(range(5), size):
                close(function(pool, chosen), expected_worth(name, chosen, kernel), 1e-10)
        whole = expected_worth(name, range(5), kernel)
        without = [expected_worth(name, [j for j in range(5) if j != i], kernel) for i in range(5)]
        close(module.leave_one_out(function, pool), [whole - rest for rest in without], 1e-10)
    check_pool(module)
    reads = {name: set(facts) for name, facts in module.READS.items()}
    space = {"features"}
    assert reads == {
        "max": set(),
        "distinct": {"answer"},
        "facility_location": space,
        "log_det": space,
    }


def check_pool(module: ModuleType) -> None:
    scores, rows = random_scores(), torch.tensor([3, 6, 10])  # all of reward 0.1
    plain = module.pool(scores, rows, "max", 0.25)
    close(plain.rewards, [0.1] * 3)
    assert (plain.answers, plain.kernel, plain.success) == ((), None, 0.25)
    assert module.pool(scores, rows, "distinct", 0.25).answers == [None, "7", None]
    space = module.pool(scores, rows, "log_det", 0.25)
    close(space.kernel, module.cosines(scores.features[rows]).tolist())
    zero = replace(scores, combined=torch.zeros(13).double())
    module.pool(zero, rows, "facility_location", 0.5)
    with pytest.raises(UserError, match=r"'log_det' weighs samples by reward, and one is -0\.1"):
        module.pool(replace(scores, combined=-scores.combined), rows, "log_det", 0.5)
    module.pool(replace(scores, combined=-scores.combined), rows, "max", 0.5)


def check_subpo(module: ModuleType) -> None:
    scores = replace(random_scores(), combined=random_scores().combined.abs())
    rewards, rows = scores.combined.tolist(), rows_by_group(scores)
    best: dict[int, float] = {}
    for members in rows.values():
        for i in members:
            rest = [rewards[j] for j in members if j != i]
            best[i] = max(rewards[j] for j in members) - max(rest, default=0.0)
    plain, _ = module.estimate(scores, module.Config(), {})
    close(plain.values, [best.get(i, 0.0) for i in range(13)])
    worth = [max(rewards[i] for i in members) for members in rows.values()]
    close(plain.metrics["subpo/value"], statistics.fmean(worth))
    own = {}
    for members in rows.values():
        for i in members:
            rest = [rewards[j] for j in members if j != i]
            own[i] = rewards[i] - statistics.fmean(rest) if rest else 0.0
    both, _ = module.estimate(scores, module.Config(reward_weight=0.3), {})
    close(both.values, [best.get(i, 0.0) + 0.3 * own.get(i, 0.0) for i in range(13)])
    credit = replace(scores, combined=plain.values)
    normal, _ = module.estimate(scores, module.Config(normalise=True), {})
    groups = rewards_by_group(credit)
    expected = [
        gap / (deviation(groups[group], 1) + 1e-6)
        for gap, group in zip(centred(credit), scores.group.tolist(), strict=True)
    ]
    close(normal.values, expected)
    config = module.Config(function="distinct", success=0.0)
    found, _ = module.estimate(scores, config, {})
    for members in rows.values():
        answers = Counter(scores.answer[i] for i in members)
        for i in members:
            assert found.values[i] == float(
                scores.answer[i] is not None and answers[scores.answer[i]] == 1
            )
    for name in ("facility_location", "log_det"):
        module.estimate(scores, module.Config(function=name), {})
        with pytest.raises(UserError, match=r"weighs samples by reward, and one is -"):
            module.estimate(random_scores(), module.Config(function=name), {})


# --- ADORA ----------------------------------------------------------------------------------------


def expected_weight(
    rule: str, rows: list[int], scores: Scores, rewards: list[float], config
) -> float:
    lengths, cut = scores.length.tolist(), scores.truncated.tolist()
    right = [lengths[i] for i in rows if rewards[i] > config.success]
    wrong = [lengths[i] for i in rows if not rewards[i] > config.success and not cut[i]]
    if rule == "vlm":
        top = math.inf if not right else max(right)
        mean = math.inf if not wrong else statistics.fmean(wrong)
        return 1.0 if not right or top > mean else config.low
    if rule == "llm":
        top, mean = max(right, default=-math.inf), statistics.fmean(wrong) if wrong else -math.inf
        return 1.0 if top > mean else config.low
    longer = bool(right and wrong) and max(right) > statistics.fmean(wrong)
    hard = len(right) / len(rows) <= config.hard_rate
    helps = {"and": longer and hard, "or": longer or hard, "length": longer, "difficulty": hard}
    return config.high if helps[config.combine] else 1.0


def adora_scores(seed: int) -> Scores:
    """``random_scores`` in which some groups lack successes or failures that count."""
    scores, draw = random_scores(seed), torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 2, (13,), generator=draw).double()
    lengths = torch.randint(1, 9, (13,), generator=draw)
    return replace(
        scores,
        combined=torch.where(scores.valid, rewards, 0.0),
        length=lengths,
        truncated=torch.rand(13, generator=draw) < 0.4,
    )


def check_adora(module: ModuleType) -> None:
    settings = [("vlm", "and"), ("llm", "and")]
    settings += [("paper", combine) for combine in ("and", "or", "length", "difficulty")]
    for rule, combine in settings:
        seen = set()
        for seed in range(12):
            scores = adora_scores(seed)
            config = module.Config(rule=rule, combine=combine, hard_rate=0.4)
            values = torch.linspace(-2, 3, 13, dtype=torch.float64)
            given = replace(some_advantages(), values=values, keep=scores.valid)
            given = replace(given, values=given.values * scores.valid)
            result = module.modulate(given, scores, config)
            rewards, weights = scores.combined.tolist(), {}
            for group, rows in rows_by_group(scores).items():
                weights[group] = (
                    expected_weight(rule, rows, scores, rewards, config) if rows else 1.0
                )
                seen.add(weights[group])
            ours = [weights[group] for group in scores.group.tolist()]
            close(result.values, [v * w for v, w in zip(given.values.tolist(), ours, strict=True)])
            used = [weights[group] for group, rows in rows_by_group(scores).items() if rows]
            close(result.metrics["adora/weight"], statistics.fmean(used))
        assert len(seen) == 2, f"{rule} {combine}: a case with one weight only tests nothing"
    check_adora_reward(module)


def check_adora_reward(module: ModuleType) -> None:
    """The raw reward decides, where it is named; samples without one count nowhere."""
    scores = adora_scores(1)
    raw = torch.where(scores.valid, 1 - scores.combined, math.nan)
    raw[0] = math.nan
    scores = replace(scores, by_name={"raw": raw})
    config = module.Config(rule="llm", reward="raw", success=0.9)
    given = replace(some_advantages(), values=scores.valid.double(), keep=scores.valid)
    result = module.modulate(given, scores, config)
    for rows in rows_by_group(scores).values():
        used = [i for i in rows if i != 0]
        expected = expected_weight("llm", used, scores, raw.tolist(), config)
        close(result.values[rows], [expected] * len(rows))
    nothing = replace(scores, valid=torch.zeros(13, dtype=torch.bool))
    assert module.modulate(given, nothing, config).metrics["adora/weight"] == 1.0
    assert module.reads(config) == {"length", "truncated"}


# --- DCPO -----------------------------------------------------------------------------------------


def check_dcpo(module: ModuleType) -> None:
    given, scores = some_advantages(), no_scores()
    rewards = float64([1.0, 0.04, 0.05, 3.0, 9.0, -1.0])
    scores, config = replace(scores, combined=rewards), module.Config(target_entropy=0.5)
    good = [1.0, 0, 0, 1, 0, 0]  # above 0.05; the fifth is not kept
    for state, temperature in (({}, 1.2), ({"surprise": 0.46}, 1.2), ({"surprise": 0.9}, 0.8)):
        pushed = min(abs(0.5 - state.get("surprise", 0.0)), 0.1) / (2 / 5)
        alpha = pushed / (1 + pushed)
        out = module.modulate(given, scores, config, state)
        close(out.values, [(1 - alpha) * value for value in given.values.tolist()])
        close(out.tempering.scale, [alpha * each for each in good])
        assert (out.tempering.temperature, out.tempering.cap) == (temperature, 10.0)
        assert out.metrics.keys() == {"reward_std", "dcpo/alpha"}
        close(out.metrics["dcpo/alpha"], alpha)
    for case in (replace(scores, combined=0 * rewards), scores):
        state = {"surprise": 0.5} if case is scores else {}
        out = module.modulate(given, case, config, state)
        assert out.tempering is None
        assert torch.equal(out.values, given.values)
        assert out.metrics["dcpo/alpha"] == 0
    assert module.learn({"surprise": 0.7}, config, {"kept": 1}) == {"kept": 1, "surprise": 0.7}
    assert module.learn({"reward": 0.7}, config, {"kept": 1}) == {"kept": 1}
    assert module.needs(config) == {"logp", "logp_tempered"}
