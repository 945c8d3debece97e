"""Trains on samples whose rank in their group makes their reward trustworthy.

    weights by rank     bon: best 1              bw: best 1, worst 1
                        br: best 1, one other 1  (as weights: best 0.4, each other 0.1)
                        pow: |reward|^power

PF-PPO, policy filtration (arXiv:2409.06957): learned rewards order the extremes more reliably than
the middle.  Either the marked samples are kept, or as many as the group has are drawn with
replacement by weight; one drawn twice counts twice.  Advantages stay those of the whole group, and
nothing corrects for the filter, which is biased by design.  ``_reliability`` compares strategies
where true scores are known, as the authors choose one.

Ranks are within groups, as in the authors' code; a re-implementation ranks over the whole batch.
Little is to be expected where the reward is an exact verifier.  A filtered run should be compared
at equal numbers of samples drawn: for each one kept it draws several.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmrl.errors import UserError
from mmrl.noise import generator
from mmrl.schema import StrictModel
from mmrl.selection._kept import narrowed
from mmrl.typed import distinct, integers
from mmrl.types import Advantages, Moment, Scores

PAPER = "Shen and Zhang 2024, arXiv:2409.06957"
EVIDENCE = "code"
MIN_GROUP_SIZE = 2
REPEATS_SAMPLES = True
BEST, OTHER = 0.4, 0.1
"""Weights of ``br`` where samples are drawn, as published for five samples."""


class Config(StrictModel):
    """Which ranks are trained."""

    strategy: Literal["bon", "bw", "br", "pow"] = Field(
        default="br",
        description="bon: the best. bw: best and worst. br: the best and a random other. pow: by "
        "|reward|^power.",
    )
    mode: Literal["keep", "draw"] = Field(
        default="keep",
        description="keep: the samples with a weight, once. draw: as many samples as a group has, "
        "with replacement, in proportion to the weights.",
    )
    power: float = Field(default=2.0, ge=0, description="Exponent of pow; 0: all alike.")

    @model_validator(mode="after")
    def _marks_some(self) -> Config:
        if self.strategy == "pow" and self.mode == "keep":
            raise UserError("mode: 'keep' keeps every sample with strategy 'pow'; allowed: draw")
        return self


def needs(config: Config) -> frozenset[str]:
    """Terms of the policy that sampled: none."""
    del config
    return frozenset()


def select(advantages: Advantages, scores: Scores, moment: Moment, config: Config) -> Advantages:
    """Unchanged advantages, fewer of them kept; equal rewards are ranked at random.

    Metrics of ``narrowed``.
    """
    counts = torch.zeros_like(advantages.values)
    for group in integers(distinct(scores.group[advantages.keep])):
        rows = (advantages.keep & (scores.group == group)).nonzero()[:, 0]
        draw = generator(moment.seed, moment.step, "pf_ppo", group)
        counts[rows] = times(scores.combined[rows], config, draw)
    if advantages.counts is not None:
        counts = counts * advantages.counts
    keep = counts > 0
    repeated = bool((counts[keep] != 1).any())
    return narrowed(advantages, keep, counts if repeated else None)


def times(rewards: Tensor, config: Config, draw: torch.Generator) -> Tensor:
    """How often each sample of a group is trained, by its ``rewards`` [n]; float64 [n]."""
    number = len(rewards)
    # A stable sort of a shuffle: equal rewards have a random order.
    shuffle = torch.randperm(number, generator=draw)
    order = shuffle[rewards[shuffle].argsort(descending=True, stable=True)]
    if config.mode == "keep":
        other = 1 + int(torch.randint(max(number - 1, 1), (), generator=draw))
        ranks = {"bon": {0}, "bw": {0, number - 1}, "br": {0, min(other, number - 1)}}
        found = torch.zeros(number, dtype=torch.float64)
        found[order[sorted(ranks[config.strategy])]] = 1.0
        return found
    weights = _weights(rewards, order, config)
    drawn = weights.multinomial(number, replacement=True, generator=draw)
    return drawn.bincount(minlength=number).double()


def _weights(rewards: Tensor, order: Tensor, config: Config) -> Tensor:
    """[n] float64 weights of a draw by ``order``, best first; all alike where all would be 0."""
    if config.strategy == "pow":
        weights = rewards.abs() ** config.power
        return weights if bool(weights.any()) else torch.ones_like(weights)
    weights = torch.full_like(rewards, OTHER if config.strategy == "br" else 0.0)
    weights[order[0]] = BEST
    if config.strategy == "bw":
        weights[order[-1]] = BEST
    return weights
