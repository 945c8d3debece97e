"""Each reward normalised in its group, their weighted sum normalised over the step.

    S_i = sum_k weight_k (r_ki - mean_k) / (std_k + eps)        (``per_reward``)
    A_i = (S_i - mean S) / (std S + eps)                        ``batch: sample``
    A_i = (S_i - mean S) / sqrt(var S + 1e-8)                   ``batch: decision``

GDPO (Liu et al. 2026, arXiv:2601.05242): sums of rewards confuse combinations of equal total and
lose the rarer rewards.  Two releases differ in the second line: means over samples, or over all
decisions (tokens), where a long sample counts more.  ``only_if`` is its form for priorities: a
reward counts as 0 for samples whose ruling reward falls short.

There a reward that is NaN counts as 0; here it enters neither sums nor statistics.  A reward of
which one sample of a group has its only success gets the same scale as a balanced one.  Without the
second line some published runs did not converge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.advantages import per_reward
from mmrl.advantages._groups import size_metrics
from mmrl.advantages._standardise import over_decisions, over_samples
from mmrl.errors import UserError
from mmrl.schema import StrictModel, nearest
from mmrl.types import Advantages, Scores

PAPER = "Liu et al. 2026, arXiv:2601.05242"
EVIDENCE = "code"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = per_reward.MIN_GROUP_SIZE


class Ruling(StrictModel):
    """Of which reward another one depends."""

    reward: str = Field(description="Label of the reward that rules.")
    least: float = Field(description="From this value on the other reward counts.")


class Config(per_reward.Config):
    """As ``per_reward``, and how the sum is normalised."""

    deviation: Literal["group", "global", "none"] = Field(
        default="group", description="As in group (published: group)."
    )
    ddof: Literal[0, 1] = Field(default=1, description="As in group (published: 1).")
    batch: Literal["sample", "decision", "none"] = Field(
        default="sample",
        description="Mean and deviation of the sum over samples, or over decisions; none: as "
        "per_reward.",
    )
    only_if: dict[str, Ruling] = Field(
        default={}, description="What a reward depends on, by label."
    )


def reads(config: Config) -> frozenset[str]:
    """Facts about samples that are needed."""
    return frozenset({"length"} if config.batch == "decision" else ())


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    Kept are the samples of ``per_reward``, over which they have mean 0.  All are 0 where the sums
    are equal.  Metrics are those of ``per_reward``, with the sizes of what comes out.

    Raises:
        UserError: ``weights`` or ``only_if`` and the rewards of the run differ in names.
    """
    reward_weights(config, scores.by_name)
    given = replace(scores, by_name=ruled(scores.by_name, config))
    summed, state = per_reward.estimate(given, config, state)
    if config.batch == "none":
        return summed, state
    kept = summed.keep.double()
    if config.batch == "decision":
        values = over_decisions(summed.values, kept * scores.need("length"))
    else:
        values = over_samples(summed.values, kept, config.eps)
    metrics = {**summed.metrics, **size_metrics(values[summed.keep])}
    return replace(summed, values=values, metrics=metrics), state


def reward_weights(config: Config, labels: Iterable[str]) -> dict[str, float]:
    """As in ``per_reward``; ``UserError`` also for a name in ``only_if`` that is no reward."""
    labels = list(labels)
    for name in [*config.only_if, *(ruling.reward for ruling in config.only_if.values())]:
        if name not in labels:
            raise UserError(f"advantage.only_if: no reward {name!r}; {nearest(name, labels)}")
    return per_reward.reward_weights(config, labels)


def ruled(by_name: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Rewards [N], 0 where the ruling one is below its least value, NaN where either is."""
    found = dict(by_name)
    for name, ruling in config.only_if.items():
        ruler = by_name[ruling.reward]
        found[name] = torch.where(ruler.isnan(), ruler, by_name[name] * (ruler >= ruling.least))
    return found
