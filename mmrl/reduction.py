"""Masked sums and global denominators: the only place where a loss is averaged.

An objective returns an unreduced loss.  Here every average is written as

    sum over decisions of coefficient * loss  /  denominator of the whole optimizer step,

where the coefficient of a decision depends on its own sample alone and the denominator is a plain
sum over samples.  Hence the result is the same for every split of a step into micro-batches and
processes: sum ``denominator`` over all of them *before* the first backward, call
``step_denominator`` once, and divide each ``weighted_sum`` by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmrl.errors import UserError, require
from mmrl.schema import nearest
from mmrl.types import Greatest, Least, Metric, UpdateBatch

Aggregation = Literal[
    "decision_mean",
    "decision_sum",
    "sample_mean_of_means",
    "sample_mean_of_sums",
    "sample_sum_over_horizon",
]
"""How decisions become one number.

``decision_mean``: every decision counts the same (token mean; DAPO).  ``decision_sum``: no division
at all.  ``sample_mean_of_means``: mean over its decisions, then over samples (GRPO).
``sample_mean_of_sums``: sum over its decisions, mean over samples.  ``sample_sum_over_horizon``:
sum over its decisions divided by a constant, mean over samples (Dr. GRPO, arXiv:2503.20783).
"""

OVER_SAMPLES = tuple(how for how in get_args(Aggregation) if how.startswith("sample_"))
"""Aggregations that are means over samples, where one without decisions counts or does not."""

EXTREMES = {"/min": Least, "/max": Greatest}
"""How the name of a metric ends that is not a mean."""


def decision_weights(
    mask: Tensor, weights: Tensor, aggregation: Aggregation, horizon: int | None = None
) -> Tensor:
    """Coefficient of every decision, float64 [B, K], exactly 0 where ``mask`` is false.

    Args:
        mask: [B, K] bool, decisions that exist.
        weights: [B] float64, weight of each sample, 0 for padding.
        aggregation: how decisions become one number.
        horizon: constant number of decisions; needed by ``sample_sum_over_horizon`` only.

    Raises:
        UserError: unknown ``aggregation``, or a ``horizon`` that is missing or not positive.
    """
    coefficients = mask.double() * weights.double()[:, None]
    if _checked(aggregation) == "sample_mean_of_means":
        return coefficients / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if aggregation == "sample_sum_over_horizon":
        return coefficients / _checked_horizon(horizon)
    return coefficients


def denominator(
    mask: Tensor, weights: Tensor, aggregation: Aggregation, *, count_empty: bool = False
) -> float:
    """What these samples add to the denominator of the step; see ``step_denominator``.

    Args:
        mask: [B, K] bool, decisions that exist.
        weights: [B], weight of each sample, 0 for padding.
        aggregation: how decisions become one number.
        count_empty: whether a sample without any decision counts in a mean over samples
            (``OVER_SAMPLES``).  Systems differ here: ``training.count_empty``.

    Raises:
        UserError: unknown ``aggregation``.
    """
    weights = weights.double()
    if _checked(aggregation) == "decision_sum":
        return 0.0
    if aggregation == "decision_mean":
        return float((mask.sum(dim=1) * weights).sum())
    return float(weights.sum() if count_empty else weights[mask.any(dim=1)].sum())


def step_denominator(total: float) -> float:
    """Divisor of a whole step from the sum of all its ``denominator`` contributions.

    A total of 0 means that nothing is divided (``decision_sum``) or that nothing is trained (every
    coefficient is 0); both divide by 1.
    """
    return total if total != 0 else 1.0


def weighted_sum(loss: Tensor, coefficients: Tensor) -> Tensor:
    """Sum of ``coefficients * loss``, a float64 scalar differentiable in ``loss``.

    Args:
        loss: [B, K], or [B, 1] for one value a sample.  The latter stands for the same value at
            each decision of the sample, so a mean over samples is the mean of its values.
        coefficients: [B, K] from ``decision_weights``.  Where 0, the loss may be anything, NaN
            included: it reaches neither the value nor the gradient.
    """
    require(
        loss.shape in (coefficients.shape, (coefficients.shape[0], 1)),
        f"loss {tuple(loss.shape)} does not fit coefficients {tuple(coefficients.shape)}",
    )
    if loss.shape != coefficients.shape:
        coefficients = coefficients.sum(dim=1, keepdim=True)
    return (where_active(loss.double(), coefficients != 0) * coefficients).sum()


def where_active(values: Tensor, active: Tensor) -> Tensor:
    """``values`` with 0, and a gradient of 0, where ``active`` is false; shapes broadcast."""
    return torch.where(active, values, torch.zeros_like(values))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the decisions of each sample, [B, K] -> [B, 1]; 0 for a sample without any."""
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return where_active(values, mask).sum(dim=1, keepdim=True) / count


# Losses that couple samples


def differentiated(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """A scalar function of ``at`` and its derivative, both without gradient."""
    with torch.enable_grad():
        variable = at.detach().requires_grad_()
        value = function(variable)
        slope = torch.zeros_like(variable)
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value, variable)
    return value.detach(), slope


def linearised(value: Tensor, slope: Tensor, variable: Tensor) -> Tensor:
    """``value`` with the gradient ``slope`` in ``variable``; shapes broadcast.

    The loss of a sample that depends on others: ``value`` and ``slope`` were found with all of
    them, and are constants here.
    """
    return value.detach() + slope.detach() * (variable - variable.detach())


def coupled_loss(batch: UpdateBatch, variable: Tensor) -> Tensor:
    """``linearised`` in ``variable`` [B, K] by the batch's signals ``value`` and ``slope``."""
    value, slope = (batch.signal(name).to(variable.dtype) for name in ("value", "slope"))
    return linearised(value, slope, variable)


# Rows of several lengths, and the log


def side_by_side(rows: Sequence[Tensor], width: int | None = None) -> Tensor:
    """[K_b] tensors, of samples that differ in their decisions, as one [B, width], 0 beyond.

    ``width``: that of the longest, or another one, to which longer rows are cut.
    """
    found = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return found if width is None else nn.functional.pad(found, (0, width - found.shape[1]))


def tallies(values: Mapping[str, Tensor], mask: Tensor, weights: Tensor) -> dict[str, Metric]:
    """(sum, count) of each of ``values`` over the decisions that are trained.

    Trained are decisions with a true ``mask`` [B, K] in samples of positive ``weights`` [B].  A
    value is [B, K], or [B, 1] when it is counted once a sample.  One whose name ends in ``/min`` or
    ``/max`` gives the least or the greatest instead, and is left out where nothing is trained.
    Everything crosses from the device in a single transfer.
    """
    decisions = mask & (weights > 0)[:, None]
    samples = decisions.any(dim=1, keepdim=True)
    parts: list[Tensor] = []
    for name, value in values.items():
        active = decisions if value.shape == decisions.shape else samples
        parts += _tally(name, value.detach().double(), active)
    numbers = [float(number) for number in torch.stack(parts).cpu()]
    found: dict[str, Metric] = {}
    for name, number, count in zip(values, numbers[::2], numbers[1::2], strict=True):
        kind = _extreme(name)
        if kind is None:
            found[name] = (number, count)
        elif count:
            found[name] = kind(number)
    return found


def _extreme(name: str) -> type[Least] | type[Greatest] | None:
    return next((kind for ending, kind in EXTREMES.items() if name.endswith(ending)), None)


def _tally(name: str, value: Tensor, active: Tensor) -> list[Tensor]:
    """What ``tallies`` gives for one value, as scalars on its device."""
    kind = _extreme(name)
    if kind is None:
        return [where_active(value, active).sum(), active.sum().double()]
    sign = 1.0 if kind is Greatest else -1.0
    found = active.any()
    extreme = sign * (sign * value).masked_fill(~active, -torch.inf).amax()
    return [where_active(extreme, found), found.double()]


def _checked(aggregation: Aggregation) -> Aggregation:
    allowed = list(get_args(Aggregation))
    if aggregation not in allowed:
        raise UserError(
            f"aggregation: unknown value {aggregation!r}: {nearest(aggregation, allowed)}"
        )
    return aggregation


def _checked_horizon(horizon: int | None) -> int:
    if horizon is None or horizon < 1:
        raise UserError(
            f"horizon: {horizon!r} is not allowed; aggregation 'sample_sum_over_horizon' "
            "needs a whole number of at least 1"
        )
    return horizon
