"""Columns without which rewards score nothing: refused where no prompt has anything in them."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl.errors import UserError
from mmrl.schema import nearest
from mmrl.types import Prompt
from rewards._answers import is_missing
from rewards.combine import RewardSpec


def refuse_missing_columns(
    specs: Sequence[RewardSpec], prompts: Sequence[Prompt], key: str
) -> None:
    """``UserError`` for a column without which a reward scores none of its prompts."""
    for i, spec in enumerate(specs):
        judged = [prompt for prompt in prompts if spec.judges(prompt)]
        for column in _read_by(spec):
            if not judged or len(_without(spec, column, judged)) < len(judged):
                continue
            known = sorted({name for prompt in judged for name in prompt.columns})
            who = f"{key}[{i}]: {spec.label!r} reads the column {column!r}, which"
            if column not in known:
                hint = nearest(column, known) if known else "they have `prompt` only"
                raise UserError(f"{who} no prompt has; {hint}")
            others = ", ".join(name for name in known if name != column) or "none"
            raise UserError(
                f"{who} is empty in each of its {len(judged)} prompts (null, white space or an "
                f"empty list), first in {judged[0].named}; other columns: {others}"
            )


def notes(specs: Sequence[RewardSpec], prompts: Sequence[Prompt], key: str) -> list[str]:
    """A line for each column that rewards read and some of their prompts have nothing in."""
    found: dict[str, list[str]] = {}
    for spec in specs:
        judged = [prompt for prompt in prompts if spec.judges(prompt)]
        for column in _read_by(spec):
            without = _without(spec, column, judged)
            if without:
                what = (
                    f"column {column!r} is empty or missing in {len(without)} of {len(judged)} "
                    f"prompts, first in {without[0].named}"
                )
                found.setdefault(what, []).append(repr(spec.label))
    return [f"{key}: {', '.join(labels)}: {what}" for what, labels in found.items()]


def _read_by(spec: RewardSpec) -> Sequence[str]:
    return getattr(spec.config, "reads", ())


def _without(spec: RewardSpec, column: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in which a reward finds nothing under ``column``."""
    own = getattr(spec.config, "read", None)  # a reward may look elsewhere too
    return [
        prompt
        for prompt in prompts
        if is_missing(own(prompt.columns) if own else prompt.columns.get(column))
    ]
