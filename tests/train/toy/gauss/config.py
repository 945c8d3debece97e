"""The ``backend`` section of the toy backend."""

from __future__ import annotations

from pydantic import Field

from mmrl.schema import StrictModel


class Config(StrictModel):
    """``drift``: added to replayed log-probabilities, to provoke the preflight.

    ``draws_texts``: whether the numbers pass for texts.
    """

    decisions: int = Field(3, ge=1)
    drift: float = 0.0
    draws_texts: bool = True
    keeps: bool = True
    knows_logp: bool = False
    off_policy: bool = False
    poison_step: int | None = None
    terms: list[str] = Field(default=["logp", "logp_ref"])

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(self.terms)

    @property
    def num_decisions(self) -> int:
        return self.decisions

    @property
    def keeps_samples(self) -> bool:
        return self.keeps

    @property
    def mixed_precision(self) -> str:
        return "no"
