"""Estimators for verifiable rewards: invariances, limits, and the published checks of each."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from core_oracles import close, fit_scores, float64, random_scores, some_advantages
from pydantic import ValidationError
from verifiable_oracles import POOL_ANSWERS, POOL_REWARDS, adora_scores, pool_features

from mmrl import facts
from mmrl.advantages import (
    _beta,
    _mixed_var,
    _risk,
    _sets,
    bnpo,
    copo_consistency,
    gdpo_decoupled,
    gp_loo,
    group,
    leave_one_out,
    optimal_baseline,
    per_reward,
    risk,
    riskpo,
    subpo,
)
from mmrl.modulators import adora
from mmrl.types import FACTS, PolicyTerms, Scores

ESTIMATORS = {
    "risk": (risk, risk.Config()),
    "risk-batch": (risk, risk.Config(measure="pass_at_k", k=2, scope="batch")),
    "risk-entropic": (risk, risk.Config(measure="entropic", baseline="mean")),
    "riskpo": (riskpo, riskpo.Config(bundle_size=2)),
    "riskpo-paper": (riskpo, riskpo.Config(bundle_size=2, form="paper", quantiles="mix")),
    "bnpo": (bnpo, bnpo.Config()),
    "bnpo-each": (bnpo, bnpo.Config(weights={"a": 0.5, "b": 0.5})),
    "gdpo": (gdpo_decoupled, gdpo_decoupled.Config()),
    "gdpo-decision": (gdpo_decoupled, gdpo_decoupled.Config(batch="decision")),
    "copo": (copo_consistency, copo_consistency.Config(sharpness=3.0)),
    "optimal": (optimal_baseline, optimal_baseline.Config()),
    "optimal-logits": (
        optimal_baseline,
        optimal_baseline.Config(weight="logits", leave_one_out=False),
    ),
    "subpo": (subpo, subpo.Config(reward_weight=0.5)),
    "subpo-distinct": (subpo, subpo.Config(function="distinct", success=-9.0)),
    "subpo-volume": (subpo, subpo.Config(function="log_det", normalise=True)),
    "subpo-places": (subpo, subpo.Config(function="facility_location")),
    "gp_loo": (gp_loo, gp_loo.Config()),
    "gp_loo-fit": (gp_loo, gp_loo.Config(fit=True)),
}
IN_ORDER = {"riskpo", "riskpo-paper"}
"""The j-th sample of each question makes a paper, so their order matters."""
ZERO_SUM = ("bnpo", "risk-entropic", "subpo-volume")
FLAT_ZERO = ("risk", "risk-entropic", "bnpo", "bnpo-each", "optimal", "optimal-logits", "subpo")
by_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def given_to(name: str) -> Scores:
    """Ragged scores as the estimator wants them, both rewards between 0 and 1."""
    scores = random_scores()
    unit = {label: column.sigmoid() for label, column in scores.by_name.items()}
    scores = replace(scores, by_name=unit)
    if name.startswith("subpo"):
        scores = replace(scores, combined=scores.combined.abs())
    return fit_scores(ESTIMATORS[name][0], scores)


def values(name: str, scores: Scores) -> torch.Tensor:
    module, config = ESTIMATORS[name]
    return module.estimate(scores, config, {})[0].values


def chosen(scores: Scores, rows: torch.Tensor) -> Scores:
    """Only the samples ``rows``, with all that is known of them."""
    facts = {}
    for name in FACTS:
        value = getattr(scores, name)
        facts[name] = [value[i] for i in rows.tolist()] if name == "answer" else value[rows]
    return Scores(
        combined=scores.combined[rows],
        group=scores.group[rows],
        valid=scores.valid[rows],
        by_name={name: column[rows] for name, column in scores.by_name.items()},
        **facts,
    )


def scores(*groups: list[float], **facts) -> Scores:
    sizes = torch.tensor([len(each) for each in groups])
    rewards = float64([reward for each in groups for reward in each])
    return Scores(
        combined=rewards,
        group=torch.repeat_interleave(torch.arange(len(groups)), sizes),
        valid=torch.ones(len(rewards), dtype=torch.bool),
        **facts,
    )


# --- what holds of every one ----------------------------------------------------------------------


@by_estimator
def test_invalid_samples_influence_nothing(name):
    given = given_to(name)
    expected = values(name, given)
    other = replace(
        given,
        combined=torch.where(given.valid, given.combined, 0.75),
        length=torch.where(given.valid, given.length, 77),
        answer=[a if v else "?" for a, v in zip(given.answer, given.valid.tolist(), strict=True)],
        features=torch.where(given.valid[:, None], given.features, 1.0),
        score_norm=torch.where(given.valid, given.score_norm, 9.0),
    )
    assert torch.equal(values(name, other), expected)
    assert expected[~given.valid].tolist() == [0, 0]
    kept = given.valid.nonzero()[:, 0]
    close(values(name, chosen(given, kept)), expected[kept].tolist(), 1e-10)


@by_estimator
def test_permutation_of_samples_permutes_advantages(name):
    given = given_to(name)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    if name in IN_ORDER:  # of each group as before
        order = order[given.group[order].argsort(stable=True)]
        order = torch.cat([order[given.group[order] == g].sort().values for g in (9, 2, 7, 4)])
    close(values(name, chosen(given, order)), values(name, given)[order].tolist(), 1e-10)


@by_estimator
def test_names_of_groups_do_not_matter(name):
    given = given_to(name)
    other = replace(given, group=10 * given.group - 3)
    assert torch.equal(values(name, other), values(name, given))


@by_estimator
def test_nothing_that_is_given_changes(name):
    module, config = ESTIMATORS[name]
    given, again, state = given_to(name), given_to(name), {}
    _, after = module.estimate(given, config, state)
    held = dict(after)
    module.estimate(given, config, after)
    assert after == held
    assert state == {}
    assert torch.equal(given.combined, again.combined)


@by_estimator
def test_a_step_without_a_usable_reward(name):
    module, config = ESTIMATORS[name]
    nan = {label: torch.full((13,), math.nan).double() for label in ("a", "b")}
    given = replace(given_to(name), valid=torch.zeros(13, dtype=torch.bool), by_name=nan)
    result, state = module.estimate(given, config, {})
    assert not result.values.any()
    assert not result.keep.any()
    assert state == {}


@pytest.mark.parametrize("name", ZERO_SUM)
def test_groups_sum_to_zero(name):
    given = given_to(name)
    found = values(name, given)
    for each in given.group.unique():
        assert found[given.group == each].sum().abs() < 1e-10


@pytest.mark.parametrize("name", FLAT_ZERO)
def test_equal_rewards_are_exactly_zero(name):
    module, config = ESTIMATORS[name]
    facts = {"length": torch.tensor([2, 3, 4, 5, 6]), "score_norm": float64([1, 2, 3, 4, 5])}
    column = float64([0.1] * 3 + [0.7, 0.2])
    given = scores([0.1] * 3, [0.7, 0.2], by_name={"a": column, "b": column}, **facts)
    found = module.estimate(given, config, {})[0].values
    assert found[:3].tolist() == [0, 0, 0]
    assert found[3:].abs().min() > 0.01 or name == "risk"


# --- RiskPO ---------------------------------------------------------------------------------------


class Levels:
    alpha, beta, omega = 0.2, 0.8, 1.5


def test_riskpo_1_the_printed_form():
    marks = float64([0, 0.5, 1, 2, 3, 4])
    judges = float64([[1, 3]]).expand(6, 2)
    found = _mixed_var.printed(marks, torch.zeros(6).long(), judges, Levels, True)
    close(found, [-4.5, -3.25, -2, -1, 0, 0])


def test_riskpo_2_one_question_without_tail_is_reinforce_with_a_baseline():
    given = scores([0.0, 1.0, 0.3, 0.8])
    config = riskpo.Config(bundle_size=1, omega=0.0, natural_baseline=False)
    state = {"quantiles": [-1.0, 2.0], "range": [-1.0, 2.0]}
    found = riskpo.estimate(given, config, state)[0].values
    centred = given.combined - given.combined.mean()
    spread = given.combined.std().item()
    close(found - found.mean(), (centred / 0.6 / spread).tolist())
    close(found, ((given.combined + 1) / 0.6 / spread).tolist())


def test_riskpo_3_the_tracker_stays_where_the_share_below_is_the_level():
    q, levels = float64([1.5, 3.5]), float64([0.4, 0.8])
    close(_risk.tracked(q, levels, float64([0, 1, 2, 3, 4]), 0.1), [1.5, 3.5])
    draw, q = torch.Generator().manual_seed(0), float64([0.0, 0.0])
    for step in range(4000):
        marks = torch.randn(32, dtype=torch.float64, generator=draw)
        q = _risk.tracked(q, float64([0.2, 0.8]), marks, 1.0 / (1 + step) ** 0.7)
    close(q, [-0.8416, 0.8416], 0.03)


def test_riskpo_with_a_natural_baseline_pushes_nothing_up():
    rewards = [[1.0, 0, 0, 1], [0, 0, 1.0, 1], [1.0, 1, 1, 1], [0, 0, 0, 1.0]]
    given = scores(*rewards)
    down = riskpo.estimate(given, riskpo.Config(bundle_size=2), {})[0].values
    assert (down <= 0).all()
    assert down.min() < 0
    both = riskpo.Config(bundle_size=2, natural_baseline=False)
    assert riskpo.estimate(given, both, {})[0].values.max() > 0


def test_riskpo_learns_from_questions_that_all_failed():
    """As a part of a bundle; alone it would teach nothing."""
    given = scores([0.0, 0, 0], [1.0, 0, 1])
    found = riskpo.estimate(given, riskpo.Config(bundle_size=2, quantiles="bundle"), {})[0].values
    assert found[1] < 0
    assert found[1] == found[4]


def test_riskpo_state_is_followed_over_steps():
    given, config, state = given_to("riskpo"), riskpo.Config(bundle_size=2), {}
    seen = []
    for _ in range(3):
        result, state = riskpo.estimate(given, config, state)
        seen.append(result.metrics["riskpo/low"])
    assert len(set(seen)) == 3
    bundle = riskpo.Config(bundle_size=2, quantiles="bundle")
    first = riskpo.estimate(given, bundle, {})[0].values
    assert torch.equal(riskpo.estimate(given, bundle, state)[0].values, first)


@pytest.mark.parametrize("quantiles", ["run", "mix"])
def test_riskpo_without_a_rate_keeps_its_first_quantiles(quantiles):
    config = riskpo.Config(bundle_size=2, quantile_rate=0.0, quantiles=quantiles)
    _, first = riskpo.estimate(given_to("riskpo"), config, {})
    state = first
    for factor in (3.0, -2.0):
        given = given_to("riskpo")
        given = replace(given, combined=factor * given.combined)
        _, state = riskpo.estimate(given, config, state)
        assert state["quantiles"] == first["quantiles"]
    assert state["range"] != first["range"], "the scores were others"


# --- BNPO -----------------------------------------------------------------------------------------


def test_bnpo_1_equal_success_rates_are_reinforce():
    given = scores([1.0, 0, 0, 0], [0.0, 1, 0, 0])
    found = bnpo.estimate(given, bnpo.Config(), {})[0]
    base = group.estimate(given, group.Config(deviation="none"), {})[0]
    assert torch.equal(found.values, base.values)
    assert found.metrics["bnpo/alpha"] == found.metrics["bnpo/beta"] == 1.0


def test_bnpo_2_three_halves_are_a_share_of_grpo():
    for p in (0.125, 0.5, 0.75):
        weight = 1 / _beta.density(float64([p]), 1.5, 1.5).item()
        assert weight == pytest.approx(math.pi / 8 / math.sqrt(p * (1 - p)))


def test_bnpo_2_and_its_advantage_is_that_share(monkeypatch):
    monkeypatch.setattr(bnpo, "fitted", lambda rates: (1.5, 1.5))
    given = scores([1.0, 0, 0, 0], [0.0, 1, 1], [1.0, 1, 1, 0, 1], [1.0, 1])
    found = bnpo.estimate(given, bnpo.Config(), {})[0].values
    grpo = group.Config(deviation="group", ddof=0, eps=0.0)
    close(found, (math.pi / 8 * group.estimate(given, grpo, {})[0].values).tolist())
    assert found[:-2].all()
    assert not found[-2:].any()


def test_bnpo_3_uniform_success_rates():
    """Mean 1/2 and variance 1/12: a = b = 1."""
    rates = float64([0.5 - math.sqrt(1 / 12) / math.sqrt(2) * s for s in (1, -1)])
    assert rates.var() == pytest.approx(1 / 12)
    assert _beta.fitted(rates) == pytest.approx((4 / 3, 4 / 3))


def test_bnpo_the_fitted_density_makes_the_variance_least():
    """E[p (1 - p) / f(p)^2] for p ~ Beta(2, 3) is least at 1 + 2/3 and 2 (spec: on a grid)."""
    p = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000

    def variance(alpha: float, beta: float) -> float:
        f = _beta.density(p, alpha, beta)
        return (p * (1 - p) / f.square() * _beta.density(p, 2.0, 3.0)).mean().item()

    best = variance(5 / 3, 2.0)
    for alpha, beta in ((1.5, 2.0), (1.8, 2.0), (5 / 3, 1.85), (5 / 3, 2.15), (1.5, 1.5)):
        assert variance(alpha, beta) > best


# --- GDPO -----------------------------------------------------------------------------------------


def test_gdpo_1_one_reward_without_the_second_line_is_grpo():
    given = random_scores()
    alone = replace(given, by_name={"a": given.by_name["a"]})
    config = gdpo_decoupled.Config(batch="none")
    found = gdpo_decoupled.estimate(alone, config, {})[0].values
    grpo = group.estimate(given, group.Config(deviation="group", ddof=1), {})[0].values
    assert torch.equal(found, grpo)
    whitened = gdpo_decoupled.estimate(alone, gdpo_decoupled.Config(eps=0.0), {})[0]
    kept = whitened.values[whitened.keep]
    close([kept.mean().item(), kept.std().item()], [0, 1])


def test_gdpo_without_the_second_line_is_per_reward_bit_for_bit():
    given, weights = random_scores(), {"a": 2.0, "b": 0.5}
    base = per_reward.Config(deviation="group", ddof=1, weights=weights)
    expected = per_reward.estimate(given, base, {})[0]
    config = gdpo_decoupled.Config(batch="none", weights=weights)
    found = gdpo_decoupled.estimate(given, config, {})[0]
    assert torch.equal(found.values, expected.values)
    assert found.metrics == expected.metrics


def test_gdpo_2_scale_and_shift_of_a_reward_do_not_matter():
    given = random_scores()
    config = gdpo_decoupled.Config(eps=0.0)
    expected = gdpo_decoupled.estimate(given, config, {})[0].values.tolist()
    by_group = 5.0 + given.group.double()
    columns = {"a": given.by_name["a"], "b": by_group * given.by_name["b"] - by_group}
    close(
        gdpo_decoupled.estimate(replace(given, by_name=columns), config, {})[0].values,
        expected,
        1e-9,
    )
    constant = {**given.by_name, "c": torch.full((13,), 0.1).double()}
    kept = gdpo_decoupled.estimate(replace(given, by_name=given.by_name), config, {})[0].values
    weights = {"a": 1.0, "b": 1.0, "c": 3.0}
    with_c = gdpo_decoupled.Config(eps=0.0, batch="none", weights=weights)
    without = gdpo_decoupled.Config(eps=0.0, batch="none")
    close(
        gdpo_decoupled.estimate(replace(given, by_name=constant), with_c, {})[0].values[
            given.valid
        ],
        gdpo_decoupled.estimate(given, without, {})[0].values[given.valid].tolist(),
    )
    assert kept.tolist() == expected


def test_gdpo_3_totals_that_a_sum_confuses():
    given = scores(
        [0.0, 1], [0.0, 2], by_name={"x": float64([0, 1, 0, 1]), "y": float64([0, 0, 0, 1])}
    )
    config = gdpo_decoupled.Config(batch="none", eps=0.0)
    r = math.sqrt(0.5)
    close(gdpo_decoupled.estimate(given, config, {})[0].values, [-r, r, -2 * r, 2 * r])


def test_gdpo_long_samples_weigh_more_over_decisions():
    facts = {"by_name": {"x": float64([0, 1, 0, 1])}, "length": torch.tensor([1, 9, 1, 9])}
    given = scores([0.0, 1], [0.0, 1], **facts)
    found = gdpo_decoupled.estimate(given, gdpo_decoupled.Config(batch="decision"), {})[0].values
    assert (found * given.length).sum().abs() < 1e-9
    assert found[0] < -2
    even = replace(given, length=torch.full((4,), 3))
    close(
        gdpo_decoupled.estimate(even, gdpo_decoupled.Config(batch="decision"), {})[0].values,
        [-1, 1, -1, 1],
        1e-6,
    )


# --- COPO -----------------------------------------------------------------------------------------


def copo(given: Scores, **config) -> torch.Tensor:
    return copo_consistency.estimate(given, copo_consistency.Config(**config), {})[0].values


def test_copo_1_both_ends_of_the_blend():
    given = random_scores()
    grpo = group.Config(deviation="group", ddof=1, eps=1e-6)
    local = group.estimate(given, grpo, {})[0].values
    assert torch.equal(copo(given, threshold=-100.0), local)
    between = copo(given, threshold=100.0)
    for each in given.group.unique():
        rows = (given.group == each) & given.valid
        assert len(between[rows].unique()) == 1
    firsts = [between[(given.group == g) & given.valid][0].item() for g in (2, 4, 7, 9)]
    assert abs(sum(firsts)) < 1e-10


def test_copo_2_groups_of_equal_rewards_still_teach():
    given = scores([1.0] * 3, [0.0] * 3, answer=["1"] * 3 + ["2"] * 3)
    found = copo(given)
    assert found[0] > 0.5
    close(found, [found[0].item()] * 3 + [-found[0].item()] * 3)


@pytest.mark.parametrize(
    ("answers", "entropy", "weight"),
    [
        ("abcdef", math.log(6), 0.997),
        ("aabcde", 1.561, 0.771),
        ("aabbcd", 1.330, 0.032),
        ("aaaaaa", 0.0, 9e-14),
    ],
)
def test_copo_3_published_weights(answers, entropy, weight):
    given = scores([0.0, 1, 0, 0, 1, 0], [1.0] * 6, answer=[*answers, *"zzzzzz"])
    result = copo_consistency.estimate(given, copo_consistency.Config(), {})[0]
    close(2 * result.metrics["copo/entropy"], entropy, 1e-3)
    # Of two groups; the second agrees, and so weighs 9e-14 itself.
    local = 2 * result.metrics["copo/local"]
    assert local == pytest.approx(weight, abs=6e-4, rel=0)
    assert 0 < local < 1e-12 or entropy > 0
    explicit = copo_consistency.Config(threshold=1.5)
    close(copo_consistency.estimate(given, explicit, {})[0].values, result.values.tolist())


# --- optimal baseline -----------------------------------------------------------------------------


def test_optimal_baseline_1_equal_weights_are_rloo_or_the_mean():
    given = replace(random_scores(), length=torch.full((13,), 7))
    for leave, base in (
        (True, leave_one_out.estimate(given, leave_one_out.Config(), {})[0]),
        (False, group.estimate(given, group.Config(deviation="none"), {})[0]),
    ):
        config = optimal_baseline.Config(leave_one_out=leave)
        close(optimal_baseline.estimate(given, config, {})[0].values, base.values.tolist())


def test_optimal_baseline_2_no_other_baseline_varies_less():
    given = random_scores()
    config = optimal_baseline.Config(leave_one_out=False)
    found = optimal_baseline.estimate(given, config, {})[0].values
    weight = given.length.double()
    for each in given.group.unique():
        rows = (given.group == each) & given.valid
        best = (weight * found.square())[rows].sum()
        for other in (given.combined[rows].mean(), 0.0, given.combined[rows].median()):
            assert (weight * (given.combined - other).square())[rows].sum() >= best - 1e-12


def test_optimal_baseline_3_the_norm_at_the_logits():
    """1 - 2 pi(y) + sum pi^2, in expectation 1 - sum pi^2; 0 for what was not drawn."""
    logits = float64([0.3, -1.0, 0.8, 0.1]).requires_grad_()
    p = logits.softmax(0)
    norms = []
    for y in range(4):
        (slope,) = torch.autograd.grad(logits.log_softmax(0)[y], logits)
        norms.append(slope.square().sum())
    close((p * torch.stack(norms)).sum(), (1 - p.square().sum()).item())
    squares = p.square().sum().expand(1, 4)
    terms = PolicyTerms(logp=p.log()[None], sum_squares=squares)
    drawn = torch.tensor([[True, True, True, False]])
    found = facts.score_norm(terms, drawn)[0]
    close(found, [*(norm.item() for norm in norms[:3]), 0.0])


# --- Gaussian process -----------------------------------------------------------------------------


def gp(given: Scores, **config) -> torch.Tensor:
    return gp_loo.estimate(given, gp_loo.Config(**config), {})[0].values


def test_gp_loo_5_its_limits():
    given = scores([0.0, 1, 0.5], [2.0, 0.3], [0.2, 0.4, 0.9, 0.7])
    rloo = leave_one_out.estimate(given, leave_one_out.Config(), {})[0].values
    close(gp(given, common=0.0, between=1e8), rloo.tolist(), 1e-7)
    close(gp(given, common=0.0, between=0.0), given.combined.tolist())
    everyone = replace(given, group=torch.zeros(9, dtype=torch.int64))
    total = leave_one_out.estimate(everyone, leave_one_out.Config(), {})[0].values
    close(gp(given, common=1e8, between=0.0), total.tolist(), 1e-6)


def test_gp_loo_5_the_residual_form_shrinks_the_mean():
    given = scores([0.0, 1, 0.5, 0.3], [2.0, 0.3, 0.1, 0.6])
    from mmrl.advantages._groups import group_statistics

    groups = group_statistics(given)
    for between, within in ((0.0, 0.4), (0.7, 0.4), (1e9, 0.4)):
        weights, _ = gp_loo.solved(given.combined, groups, 0.0, between, within)
        share = between * 4 / (within + 4 * between)
        close(
            within * weights, (given.combined - share * groups.mean[groups.member]).tolist(), 1e-7
        )


def test_gp_loo_is_unbiased():
    """Two prompts with two arms, two samples each: over all outcomes, the exact gradient."""
    p, r = float64([[0.3, 0.7], [0.6, 0.4]]), float64([[1.0, 0.2], [0.0, 0.8]])
    total = torch.zeros(2).double()
    for arms in itertools.product(range(2), repeat=4):
        prompts = (0, 0, 1, 1)
        chance = math.prod(p[q, a].item() for q, a in zip(prompts, arms, strict=True))
        rewards = [r[q, a].item() for q, a in zip(prompts, arms, strict=True)]
        found = gp(scores(rewards[:2], rewards[2:]), common=0.8, between=0.3, within=0.2, mean=0.1)
        for q, a, advantage in zip(prompts, arms, found.tolist(), strict=True):
            total[q] += chance * advantage * ((a == 0) - p[q, 0].item()) / 2
    exact = p[:, 0] * p[:, 1] * (r[:, 0] - r[:, 1])
    close(total, exact.tolist())


def test_gp_loo_helps_small_groups():
    """16 prompts of 8 arms, 2 samples each: nearer to the true direction than RLOO (spec 1g)."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 8, dtype=torch.float64, generator=draw)
    means = torch.rand(16, 8, dtype=torch.float64, generator=draw)
    p = logits.softmax(1)
    exact = (p * (means - (p * means).sum(1, keepdim=True))).flatten()
    cosines = {"rloo": 0.0, "gp": 0.0}
    for _ in range(150):
        arms = torch.multinomial(p, 2, replacement=True, generator=draw)
        rewards = torch.bernoulli(means.gather(1, arms), generator=draw)
        given = scores(*rewards.tolist())
        score = torch.nn.functional.one_hot(arms, 8).double() - p[:, None]
        for name, found in (
            ("rloo", leave_one_out.estimate(given, leave_one_out.Config(), {})[0].values),
            ("gp", gp(given)),
        ):
            slope = (found.view(16, 2, 1) * score).mean(1).flatten()
            cosines[name] += torch.cosine_similarity(slope, exact, dim=0).item() / 150
    assert cosines["gp"] > cosines["rloo"] + 0.03


# --- SubPO ----------------------------------------------------------------------------------------


def pool(*indices: int) -> _sets.Pool:
    rows = list(indices)
    return _sets.Pool(
        rewards=float64(POOL_REWARDS)[rows],
        answers=[POOL_ANSWERS[i] for i in rows],
        kernel=_sets.cosines(pool_features()[rows]),
    )


@pytest.mark.parametrize("name", _sets.FUNCTIONS)
def test_subpo_2_gains_shrink_as_the_set_grows(name):
    function, everything = _sets.FUNCTIONS[name], pool(0, 1, 2, 3, 4)
    for size in range(4):
        for small in itertools.combinations(range(5), size):
            for extra in set(range(5)) - set(small):
                large = [*small, extra]
                for new in set(range(5)) - set(large):
                    early = function(everything, [*small, new]) - function(everything, small)
                    late = function(everything, [*large, new]) - function(everything, large)
                    assert late <= early + 1e-10
                    assert late >= -1e-10


@pytest.mark.parametrize("name", _sets.FUNCTIONS)
def test_subpo_3_leaving_one_out(name):
    function, everything = _sets.FUNCTIONS[name], pool(0, 1, 2, 3, 4)
    whole = function(everything, range(5))
    gains = _sets.leave_one_out(function, everything)
    assert gains.sum() <= whole + 1e-10
    shapley = sum(
        function(everything, order[: i + 1]) - function(everything, order[:i])
        for order in itertools.permutations(range(5))
        for i in range(5)
    )
    close(shapley / math.factorial(5), whole, 1e-10)
    twice = _sets.leave_one_out(function, pool(0, 1, 1, 4))
    if name == "log_det":  # its diagonal leaves a copy less than the first one added, not nothing
        assert twice[1] < 0.6 * function(pool(1), [0])
    else:
        assert twice[1:3].abs().max() < 1e-10


@pytest.mark.parametrize("name", ["max", "distinct", "log_det"])
def test_subpo_the_gradient_is_unbiased(name):
    """Three samples of a policy over five outputs, over all outcomes, against autograd."""
    logits = float64([0.2, -0.4, 0.9, 0.0, -0.1]).requires_grad_()
    p, function = logits.softmax(0), _sets.FUNCTIONS[name]
    worth, slope = torch.zeros(()).double(), torch.zeros(5).double()
    for drawn in itertools.product(range(5), repeat=3):
        group_of = pool(*drawn)
        chance = p[list(drawn)].prod()
        worth = worth + chance * function(group_of, range(3))
        gains = _sets.leave_one_out(function, group_of)
        for i, y in enumerate(drawn):
            score = (torch.arange(5) == y).double() - p.detach()
            slope += chance.item() * gains[i] * score
    (exact,) = torch.autograd.grad(worth, logits)
    close(slope, exact.tolist(), 1e-10)


def test_subpo_1_a_modular_worth_is_the_reward_itself():
    gains = _sets.leave_one_out(lambda p, s: float(p.rewards[list(s)].sum()), pool(0, 1, 2))
    close(gains, list(POOL_REWARDS[:3]))


def test_subpo_only_a_single_success_is_credited():
    found = subpo.estimate(scores([0.0, 1, 0], [1.0, 1, 0], [0.0, 0]), subpo.Config(), {})[0]
    assert found.values.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    close(found.metrics["subpo/value"], 2 / 3)


# --- ADORA ----------------------------------------------------------------------------------------

RULES = (("vlm", "low"), ("llm", "low"), ("paper", "high"))


@pytest.mark.parametrize(("rule", "key"), RULES)
def test_adora_1_a_weight_of_one_changes_nothing(rule, key):
    given = adora_scores(3)
    base = group.estimate(given, group.Config(), {})[0]
    found = adora.modulate(base, given, adora.Config(rule=rule, **{key: 1.0}))
    assert torch.equal(found.values, base.values)
    assert found.metrics == {**base.metrics, "adora/weight": 1.0}


@pytest.mark.parametrize(("rule", "key"), RULES)
def test_adora_2_groups_still_sum_to_zero(rule, key):
    given = adora_scores(5)
    base = group.estimate(given, group.Config(deviation="group"), {})[0]
    found = adora.modulate(base, given, adora.Config(rule=rule)).values
    for each in given.group.unique():
        rows = given.group == each
        assert found[rows].sum().abs() < 1e-12
        ratio = found[rows][base.values[rows] != 0] / base.values[rows][base.values[rows] != 0]
        assert len(ratio) == 0 or ratio.max() - ratio.min() < 1e-12
    assert key in adora.Config.model_fields


def test_adora_3_a_longer_right_answer_can_only_help():
    seen = []
    for length in range(1, 12):
        facts = {
            "length": torch.tensor([length, 2, 5, 8, 3]),
            "truncated": torch.zeros(5, dtype=torch.bool),
        }
        given = scores([1.0, 1, 0, 0, 0], **facts)
        advantages = replace(some_advantages(), values=torch.ones(5).double(), keep=given.valid)
        seen.append(adora.modulate(advantages, given, adora.Config()).values[0].item())
    assert seen == sorted(seen)
    assert set(seen) == {0.1, 1.0}


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
        (riskpo, {"bundle_size": 0}),
        (riskpo, {"alpha": 0.8, "beta": 0.8}),
        (riskpo, {"quantile_rate": -0.1}),
        (riskpo, {"credit": "mean"}),
        (riskpo, {"form": "printed"}),
        (riskpo, {"quantiles": "batch"}),
        (bnpo, {"max_weight": 0}),
        (gdpo_decoupled, {"batch": "token"}),
        (gdpo_decoupled, {"only_if": {"a": {"reward": "b"}}}),
        (copo_consistency, {"sharpness": -1}),
        (copo_consistency, {"unparsed": "none"}),
        (optimal_baseline, {"weight": "equal"}),
        (subpo, {"function": "sum"}),
        (subpo, {"reward_weight": -1}),
        (gp_loo, {"within": 0}),
        (gp_loo, {"between": -1}),
        (adora, {"rule": "code"}),
        (adora, {"combine": "xor"}),
        (adora, {"low": -0.1}),
        (adora, {"hard_rate": 1.1}),
    ],
)
def test_configurations_refuse(module, wrong):
    with pytest.raises(ValidationError):
        module.Config(**wrong)
