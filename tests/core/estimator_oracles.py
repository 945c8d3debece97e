"""Loop oracles of estimators and modulators from the literature of verifiable rewards."""

from __future__ import annotations

import itertools
import math
import statistics
from types import ModuleType

import pytest
import torch
from core_oracles import close, float64, random_scores, rewards_by_group
from pydantic import ValidationError

from mmrl.errors import UserError
from mmrl.types import Scores

# --- risk -----------------------------------------------------------------------------------------

LAW = (0.3, -1.2, 2.0, 0.7, 0.1)
CHANCES = (0.11, 0.23, 0.29, 0.2, 0.17)


def quantile_of(rewards, chances, u: float) -> float:
    """Least reward up to which the law has at least u."""
    total = 0.0
    for reward, chance in sorted(zip(rewards, chances, strict=True)):
        total += chance
        if total >= u - 1e-12:
            return reward
    return max(rewards)


def average(rewards, chances, f) -> float:
    return sum(chance * f(reward) for reward, chance in zip(rewards, chances, strict=True))


def mean_between(rewards, chances, low: float, high: float, density=lambda a, b: b - a) -> float:
    """int of the quantile function from low to high, ``density(a, b)`` the mass of (a, b)."""
    edges = [low, high]
    edges += [
        e for e in itertools.accumulate(c for _, c in sorted(zip(rewards, chances, strict=True)))
    ]
    edges = sorted(e for e in edges if low - 1e-12 <= e <= high + 1e-12)
    pieces = itertools.pairwise(edges)
    return sum(density(a, b) * quantile_of(rewards, chances, (a + b) / 2) for a, b in pieces)


def expected_value(name: str, rewards, chances) -> float:
    """rho by its definition, with the numbers of ``risks``."""
    tail = mean_between(rewards, chances, 0.0, 0.25) / 0.25
    middle = mean_between(rewards, chances, 0.25, 0.8) / 0.55
    mean = average(rewards, chances, lambda r: r)
    return {
        "mean": mean,
        "cvar": tail,
        "rvar": middle,
        "mixed_var": (1.5 * tail + middle) / 2.5,
        "pass_at_k": mean_between(rewards, chances, 0.0, 1.0, lambda a, b: b**3 - a**3),
        "entropic": math.log(average(rewards, chances, lambda r: math.exp(-2 * r))) / -2,
        "mean_variance": mean - 0.4 * average(rewards, chances, lambda r: (r - mean) ** 2),
    }[name]


def risks(module: ModuleType) -> dict:
    return {
        "mean": module.MEAN,
        "cvar": module.cvar(0.25),
        "rvar": module.rvar(0.25, 0.8),
        "mixed_var": module.mixed_var(0.25, 0.8, 1.5),
        "pass_at_k": module.Power(3),
        "entropic": module.Entropic(-2.0),
        "mean_variance": module.MeanVariance(0.4),
    }


def towards(chances, i: int, step: float) -> list[float]:
    """The law a step nearer to what is certain to be the i-th reward."""
    return [(1 - step) * c + step * (j == i) for j, c in enumerate(chances)]


def check_risk_interface(module: ModuleType) -> None:
    for name, risk in risks(module).items():
        for mirrored in (False, True):
            rewards = [-r for r in LAW] if mirrored else list(LAW)
            sign = -1.0 if mirrored else 1.0
            tested = module.Mirrored(risk) if mirrored else risk
            check_risk(tested, name, rewards, sign)
    check_piecewise(module)
    check_credit(module)
    check_risk_names(module)


def check_risk(risk, name: str, base, sign: float) -> None:
    """``base``: what the definition of ``name`` is given, ``sign`` times the rewards."""
    rewards, h = float64([sign * r for r in base]), 1e-6
    for chances in (CHANCES, (0.2,) * 5):
        weights = float64(chances)
        close(risk.value(rewards, weights), sign * expected_value(name, base, chances), 1e-10)
    close(risk.value(rewards), risk.value(rewards, float64([0.2] * 5)).item(), 1e-10)
    found = risk.advantage(rewards, rewards, float64(CHANCES))
    centre = sum(c * a for c, a in zip(CHANCES, found.tolist(), strict=True))
    for i in range(5):
        ahead, behind = (
            sign * expected_value(name, base, towards(CHANCES, i, step)) for step in (h, -h)
        )
        close(found[i] - centre, (ahead - behind) / (2 * h), 1e-6)
    both = risk.advantage(rewards.expand(2, 5), torch.stack([rewards, rewards + 1]))
    close(both[0], risk.advantage(rewards, rewards).tolist())
    close(both[1], risk.advantage(rewards, rewards + 1).tolist())
    # Between two atoms, and outside all: the slope is the spectrum at the probability up to there.
    for u in (0.1, 0.3, 0.5, 0.7, 0.9):
        at = quantile_of(rewards.tolist(), (0.2,) * 5, u)
        if name in ("entropic", "mean_variance"):
            pair = float64([at - h, at + h])
        else:
            below = max([r for r in rewards.tolist() if r < at], default=at - 1)
            pair = float64([0.5 * (at + below) - h, 0.5 * (at + below) + h])
        low, high = risk.advantage(pair, rewards).tolist()
        levels = float64([u]) if name in ("entropic", "mean_variance") else float64([step_below(u)])
        if levels[0] == 0 and sign < 0:
            continue  # the mirrored spectrum has no left end
        close(risk.spectrum(levels, rewards)[..., 0], (high - low) / (2 * h), 1e-6)
    assert risk.spectrum(float64([0.3, 0.5]), torch.stack([rewards, rewards])).shape == (2, 2)


def step_below(u: float) -> float:
    """Probability of a law of five equal atoms up to the one before its u-quantile."""
    return math.floor(u * 5) / 5


def check_piecewise(module: ModuleType) -> None:
    """RiskPO's printed form: omega 1.5, quantiles 1 and 3, rewards 0 to 4."""
    printed = module.Piecewise((0.2, 0.8), (2.5, 1.0, 0.0))
    points = float64([0, 0.5, 1, 2, 3, 4])
    close(printed.at(points, float64([1, 3])), [-4.5, -3.25, -2, -1, 0, 0])
    two = printed.at(points.expand(2, 6), float64([[1, 3], [0, 1]]))
    close(two[1], [-1, -0.5, 0, 0, 0, 0])
    q = float64([0.5, 2.0])
    close(module.tracked(q, float64([0.2, 0.8]), float64([0, 0.5, 1, 3]), 0.1), [0.495, 2.005])
    levels = float64([0.2, 0.21, 0.6, 1.0])
    close(module.quantiles(levels, float64(LAW)), [-1.2, 0.1, 0.3, 2.0])
    close(module.quantiles(float64([1.0]), float64(LAW), float64(CHANCES) - 1e-9), [2.0])
    top = module.Piecewise((0.5,), (0.0, 2.0))
    close(top.advantage(float64([0, 1, 2]), float64([0, 1])), [0, 2, 4])
    close(top.value(float64([0, 1, 2, 3])), 2.5)


def check_credit(module: ModuleType) -> None:
    risk = module.Entropic(-2.0)
    close(module.credit(risk, float64(LAW), "none"), [influence(x, LAW) for x in LAW])
    close(module.credit(risk, float64(LAW), "mean"), [influence(x, LAW) for x in LAW])
    expected = []
    for i, x in enumerate(LAW):
        rest = [r for j, r in enumerate(LAW) if j != i]
        expected.append(influence(x, rest) - statistics.fmean(influence(r, rest) for r in rest))
    close(module.credit(risk, float64(LAW), "leave_one_out"), expected)
    for flat in ([0.3], [0.1] * 3):
        assert not module.credit(risk, float64(flat), "leave_one_out").any()


def influence(x: float, law) -> float:
    """Of the entropic functional with the rate -2."""
    return math.exp(-2 * x) / statistics.fmean(math.exp(-2 * r) for r in law) / -2


def check_risk_names(module: ModuleType) -> None:
    numbers = {"alpha": 0.25, "beta": 0.8, "omega": 1.5, "k": 3, "rate": -2.0, "penalty": 0.4}
    for name, risk in risks(module).items():
        config = module.RiskConfig(measure=name, **numbers)
        assert config.functional() == risk
        upper = module.RiskConfig(measure=name, tail="upper", **numbers)
        assert upper.functional() == module.Mirrored(risk)
    for neutral in ({"measure": "pass_at_k", "k": 1}, {"measure": "entropic", "rate": 0.0}):
        assert module.RiskConfig(**neutral).functional() == module.MEAN
    neutral = module.RiskConfig(measure="mean_variance", penalty=0.0)
    assert neutral.functional() == module.MEAN
    assert module.RiskConfig(measure="pass_at_k", k=2).functional() == module.Power(2)
    assert module.RiskConfig().rate == -1.0
    with pytest.raises(ValidationError, match=r"greater than alpha, 0\.3"):
        module.RiskConfig(alpha=0.3, beta=0.3)


def check_risk_estimator(module: ModuleType) -> None:
    scores = random_scores()
    config = module.Config(measure="entropic", rate=-2.0, baseline="leave_one_out")
    for scope in ("group", "batch"):
        for baseline in ("none", "mean", "leave_one_out"):
            config = config.model_copy(update={"scope": scope, "baseline": baseline})
            result, state = module.estimate(scores, config, {"kept": 1})
            close(result.values, expected_entropic(scores, scope, baseline), 1e-10)
            assert (result.keep.tolist(), state) == (scores.valid.tolist(), {"kept": 1})
            laws = [law for law in law_rows(scores, scope).values() if law]
            wanted = statistics.fmean(
                math.log(statistics.fmean(math.exp(-2 * r) for r in law.values())) / -2
                for law in laws
            )
            close(result.metrics["risk/value"], wanted, 1e-10)
    four = module.Config(measure="pass_at_k", k=4)
    module.refuse(four, 1, 4)
    module.refuse(module.Config(measure="pass_at_k", k=4, scope="batch"), 1, 2)
    module.refuse(module.Config(measure="cvar", k=4), 1, 2)
    with pytest.raises(UserError, match=r"advantage.k: 4 draws are more than the 3 samples"):
        module.refuse(four, 1, 3)


def law_rows(scores: Scores, scope: str) -> dict[int, dict[int, float]]:
    """Rewards by sample in each law; over the step less the means of the groups."""
    groups, found = rewards_by_group(scores), {}
    for i, (reward, group) in enumerate(
        zip(scores.combined.tolist(), scores.group.tolist(), strict=True)
    ):
        if scores.valid[i]:
            shift = statistics.fmean(groups[group]) if scope == "batch" else 0.0
            if scope == "batch" and len(set(groups[group])) == 1:
                shift = reward
            found.setdefault(0 if scope == "batch" else group, {})[i] = reward - shift
    return found


def expected_entropic(scores: Scores, scope: str, baseline: str) -> list[float]:
    values = [0.0] * 13

    for law in law_rows(scores, scope).values():
        whole = list(law.values())
        for i, x in law.items():
            rest = [r for j, r in law.items() if j != i]
            if baseline == "none":
                values[i] = influence(x, whole)
            elif len(set(whole)) > 1 and baseline == "mean":
                values[i] = influence(x, whole) - statistics.fmean(
                    influence(r, whole) for r in whole
                )
            elif len(set(whole)) > 1:
                values[i] = influence(x, rest) - statistics.fmean(influence(r, rest) for r in rest)
    return values
