"""RiskPO's mixed value at risk of scores: its two forms, and the quantiles that they judge by."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmrl.advantages import _risk
from mmrl.advantages._groups import group_statistics
from mmrl.typed import distinct, floats
from mmrl.types import Scores

Form = Literal["code", "paper"]
Quantiles = Literal["run", "bundle", "mix"]

LEAST_DEVIATION = 1e-6
"""A bundle whose scores deviate less gets nothing: to divide by it would only amplify rounding."""


def printed(
    marks: Tensor, bundle: Tensor, thresholds: Tensor, config: _risk.LevelsConfig, natural: bool
) -> Tensor:
    """[P] -(1 + omega) (q_lo - S)^+ + (S - q_lo)^+ - (S - q_hi)^+ + q_lo - q_hi of scores [P].

    ``thresholds`` [P, 2]: q_lo and q_hi of each; ``bundle`` [P] and ``natural`` play no part.
    """
    del bundle, natural
    levels = (config.alpha, config.beta)
    form = _risk.Piecewise(levels, (1 + config.omega, 1.0, 0.0))
    return form.at(marks[:, None], thresholds)[:, 0]


def released(
    marks: Tensor, bundle: Tensor, thresholds: Tensor, config: _risk.LevelsConfig, natural: bool
) -> Tensor:
    """[P] (omega CVaR + RVaR) / (omega + 1) at scores [P], over the deviation of their bundle.

    ``thresholds`` [P, 2] as in ``printed``, ``bundle`` [P] int64.  Without ``natural`` baseline
    RVaR's part is (S - q_lo)^+ - (S - q_hi)^+, which is above by q_hi - q_lo.
    """
    form = _risk.mixed_var(config.alpha, config.beta, config.omega)
    values = form.at(marks[:, None], thresholds)[:, 0]
    if not natural:
        values = values + (thresholds[:, 1] - thresholds[:, 0]) * form.slopes[1]
    everyone = torch.ones_like(bundle, dtype=torch.bool)
    bundles = group_statistics(Scores(combined=marks, group=bundle, valid=everyone))
    deviation = bundles.deviation(1)[bundles.member]
    return torch.where(deviation < LEAST_DEVIATION, 0.0, values / deviation)


FORMS = {"code": released, "paper": printed}


def first_state(marks: Tensor, levels: Tensor) -> dict[str, Any]:
    """``quantiles`` [lower, upper] and ``range`` [least, greatest] of the first scores."""
    ends = [float(marks.min()), float(marks.max())]
    return {"quantiles": floats(marks.quantile(levels)), "range": ends}


def followed(marks: Tensor, levels: Tensor, rate: float, state: dict[str, Any]) -> dict[str, Any]:
    """The state after these scores; quantiles neither leave the range of scores nor cross."""
    low = min(state["range"][0], float(marks.min()))
    high = max(state["range"][1], float(marks.max()))
    quantiles = torch.tensor(state["quantiles"], dtype=torch.float64)
    moved = _risk.tracked(quantiles, levels, marks, rate).clamp(low, high).sort().values
    return {"quantiles": floats(moved), "range": [low, high]}


def judging(
    marks: Tensor, bundle: Tensor, levels: Tensor, how: Quantiles, state: dict[str, Any]
) -> Tensor:
    """[P, 2] quantiles by which each score [P] is judged."""
    run = torch.tensor(state["quantiles"], dtype=torch.float64).expand(len(marks), 2)
    if how == "run":
        return run
    own = torch.empty(len(marks), 2, dtype=torch.float64)
    for each in distinct(bundle):
        own[bundle == each] = marks[bundle == each].quantile(levels)
    return own if how == "bundle" else (run + own) / 2
