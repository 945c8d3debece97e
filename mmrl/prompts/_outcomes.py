"""What samplers and budgets read of the groups of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.schema import nearest
from mmrl.types import Outcome


def by_prompt(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by prompt id: a step may have several groups of one prompt."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.prompt_id, []).append(outcome)
    return found


def usable_rewards(outcomes: Sequence[Outcome], label: str | None, key: str) -> Tensor:
    """Usable rewards [n] float64 of some groups: of the named reward, or of all together.

    ``UserError`` that names ``key`` if no reward has this ``label``.
    """
    return torch.cat([_usable(outcome, label, key) for outcome in outcomes])


def _usable(outcome: Outcome, label: str | None, key: str) -> Tensor:
    if label is None:
        return outcome.combined[outcome.valid]
    if label not in outcome.by_name:
        hint = nearest(label, sorted(outcome.by_name))
        raise UserError(f"{key}: no reward has the label {label!r}; {hint}")
    values = outcome.by_name[label]
    return values[torch.isfinite(values)]
