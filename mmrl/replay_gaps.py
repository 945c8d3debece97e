"""How far is a replay at unchanged weights from what ratios start from, and is that too far?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmrl.config import RunConfig
from mmrl.errors import UserError

# Largest |log ratio| of unchanged weights: zero in exact arithmetic.  In half precision two kernels
# (with and without gradients), or batches of other shapes (in rollout and replay), may round a
# log-probability of order 1 differently in the last bits.
REPLAY_BUDGET = {"no": 1e-6, "bf16": 1e-2, "fp16": 2e-3}

CLIP_SHARE = 0.1
"""Largest part of the clip range that the gap may take up."""


def clip_range(config: RunConfig) -> float | None:
    """The narrower side of the objective's clip range, if it has one."""
    bounds = (getattr(config.objective.config, name, None) for name in ("clip_low", "clip_high"))
    return min((bound for bound in bounds if bound), default=None)


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """Largest |log-ratio| of unchanged weights: of each decision, or one for all of them.

    ``rollout``: of a replay to what the rollout recorded, ``None`` where it recorded nothing.
    ``replay``: to another replay, where ratios start from one; ``None`` where they start from the
    rollout's own log-probabilities.
    """

    rollout: Sequence[float] | None = None
    replay: Sequence[float] | None = None


def refuse_gaps(gaps: Gaps, mixed_precision: str, clip: float | None = None) -> None:
    """``UserError`` as of ``refuse_gap``; ``clip`` binds the gap to what ratios start from.

    In half precision that is a replay, in the batches of the update.  How far the rollout, with a
    cache and in batches of its own, is rounded otherwise depends on the model and changes no ratio,
    so it is only printed, unless it is no number.
    """
    if gaps.replay is None:
        refuse_gap(_largest(gaps.rollout or [0.0]), mixed_precision, clip)
        return
    refuse_gap(_largest(gaps.replay), mixed_precision, clip)
    other = 0.0 if gaps.rollout is None else _largest(gaps.rollout)
    if mixed_precision == "no" or math.isnan(other):
        refuse_gap(other, mixed_precision)


def refuse_gap(largest: float, mixed_precision: str, clip: float | None = None) -> None:
    """``UserError`` if replayed log-probabilities differ by more than the budget of the dtype.

    ``clip``: the clip range of a ratio that is about to be trained on; the gap must also be within
    ``CLIP_SHARE`` of it, or rounding alone would decide what is clipped.
    """
    budget = REPLAY_BUDGET[mixed_precision]
    if clip is not None:
        budget = min(budget, CLIP_SHARE * clip)
    # Written so that NaN is refused as well.
    if not largest <= budget:
        raise UserError(
            f"replaying a rollout at unchanged weights gives a log-ratio of {largest:.3g}, more "
            f"than {budget:.0e}: the update would not start from the policy that sampled; "
            "use dtype fp32, or look for dropout or other randomness in the model"
        )


def gap_line(gaps: Gaps) -> str:
    """What a person sees of the replay: the largest gap, of each decision where they differ."""
    found = {"the rollout": gaps.rollout, "another replay": gaps.replay}
    parts = [f"{_gap(gap)} to {other}" for other, gap in found.items() if gap is not None]
    return f"replay of a rollout: largest |log-ratio| {'; '.join(parts)}"


def _gap(gaps: Sequence[float]) -> str:
    largest = f"{_largest(gaps):.1e}"
    if len(gaps) == 1 or _largest(gaps) == 0:
        return largest
    return f"{largest} (by decision: {' '.join(f'{gap:.0e}' for gap in gaps[:32])})"


def _largest(gaps: Sequence[float]) -> float:
    """The largest, NaN if there is one: of ``max`` it would depend on its place."""
    return next((gap for gap in gaps if math.isnan(gap)), max(gaps))
