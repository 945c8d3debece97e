"""Weighs the advantages of a prompt by what its own samples say about its use at the moment.

    A'_i = w_s A_i,       P: r > success,      F: r <= success and not cut off
    longer:  max of lengths over P > mean of lengths over F        (its length helps)
    hard:    share of P among the samples <= hard_rate

ADORA (Ren et al. 2026, arXiv:2602.10019) in three rules:

    vlm    w = 1 if P is empty or ``longer``, else ``low``; an empty F counts as infinitely long
    llm    w = 1 if ``longer``, else ``low``; an empty P counts as infinitely short, an empty F too
    paper  w = ``high`` for a prompt that helps by ``combine`` of ``longer`` and ``hard``, else 1

The first two are released code, the third is known from reviews that do not say how its criteria
combine, nor what empty sets mean (here: not ``longer``).  All favour long answers: cap the length.
With 5 to 8 samples the criteria flip from step to step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Ren et al. 2026, arXiv:2602.10019"
EVIDENCE = "code"


class Config(StrictModel):
    """The rule, and what counts as a success."""

    rule: Literal["vlm", "llm", "paper"] = Field(default="vlm", description="As above.")
    low: float = Field(
        default=0.1, ge=0, description="Weight of a prompt that does not help (vlm, llm: 0.1)."
    )
    high: float = Field(default=2.0, ge=0, description="Weight of one that helps (paper: 2).")
    success: float = Field(
        default=0.5,
        description="A sample succeeds above this reward, on its scale (VLM 0.5, Logic-RL 1.01).",
    )
    reward: str | None = Field(
        default=None,
        description="Label of the reward that decides, as it came; null: the weighted sum.",
    )
    combine: Literal["and", "or", "length", "difficulty"] = Field(
        default="and", description="Of rule paper: which criteria a prompt must meet."
    )
    hard_rate: float = Field(
        default=0.5, ge=0, le=1, description="Of rule paper: largest success rate of a hard prompt."
    )


def reads(config: Config) -> frozenset[str]:
    """Facts about samples that are needed."""
    del config
    return frozenset({"length", "truncated"})


def modulate(advantages: Advantages, scores: Scores, config: Config) -> Advantages:
    """Weighted advantages; metric ``adora/weight``, its mean over prompts with a scored sample."""
    rewards = scores.combined if config.reward is None else scores.by_name[config.reward]
    scored = scores.valid & rewards.isfinite()
    factor, found = torch.ones_like(advantages.values), list[float]()
    for group in sorted({int(each) for each in scores.group[scored]}):
        mine = scores.group == group
        found.append(weight_of(scores, rewards, scored & mine, config))
        factor[mine] = found[-1]
    metrics = {**advantages.metrics, "adora/weight": sum(found) / len(found) if found else 1.0}
    return replace(advantages, values=advantages.values * factor, metrics=metrics)


def weight_of(scores: Scores, rewards: Tensor, mine: Tensor, config: Config) -> float:
    """Weight of the prompt whose scored samples are ``mine`` [N] bool."""
    length = scores.need("length").double()
    success = mine & (rewards > config.success)
    failure = mine & ~success & ~scores.need("truncated")
    some, none = bool(success.any()), not bool(failure.any())
    longer = some and not none and bool(length[success].max() > length[failure].mean())
    if config.rule == "paper":
        hard = float(success.sum()) / float(mine.sum()) <= config.hard_rate
        found = {"and": longer and hard, "or": longer or hard, "length": longer, "difficulty": hard}
        return config.high if found[config.combine] else 1.0
    helps = longer or (not some if config.rule == "vlm" else some and none)
    return 1.0 if helps else config.low
