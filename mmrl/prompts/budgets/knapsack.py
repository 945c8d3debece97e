"""Samples where they are likeliest to show both outcomes: a knapsack filled by marginal value.

    V(n, p) = (1 - p^n - (1 - p)^n) p (1 - p)^2

is what n samples of a prompt of success rate p are worth: the probability of seeing successes and
failures, without which a group has no gradient, times what the update gains.  Of a step's fixed
number of samples each prompt first gets ``min_size``; the rest goes where sum V becomes largest
(Knapsack RL, Li et al. 2025, arXiv:2509.25849).  V is concave in n, so that giving sample after
sample to the largest marginal value is exact.  Prompts that always succeed or always fail keep
their least, unless the others have all they can use: the remainder then tries those that fail.

As released: a prompt counts once ``min_count`` rewards are known; p is the mean of those of its
latest step, or of the last ``window`` where that step has fewer; a share that stays at ``min_size``
is valued 0.  The released code keeps p by epochs, in which a prompt comes once; here by steps.
Success rates are as old as a prompt's last visit.  The aggregation decides whether prompts with
more samples weigh more: with ``decision_mean`` they do.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from mmrl.errors import UserError
from mmrl.prompts._outcomes import by_prompt, usable_rewards
from mmrl.schema import StrictModel
from mmrl.typed import floats
from mmrl.types import Outcome, Prompt

PAPER = "Li et al. 2025, arXiv:2509.25849"
EVIDENCE = "code"


class Config(StrictModel):
    """Bounds of a group, and when a success rate is known. Defaults are those of the release."""

    min_size: int = Field(
        default=2, ge=1, description="Samples of a prompt that sometimes succeeds, at least."
    )
    min_size_certain: int = Field(
        default=2, ge=1, description="Samples of one that has always succeeded or failed, at least."
    )
    max_size: int = Field(default=128, ge=1, description="Samples of a prompt, at most.")
    min_count: int = Field(
        default=8,
        ge=1,
        description="Rewards of a prompt before it is judged; until then it gets group_size.",
    )
    window: int = Field(
        default=16, ge=1, description="Rewards of which the success rate is the mean, at least."
    )
    confidence: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="Probability in [0, 1] of seeing both outcomes beyond which more samples of a "
        "prompt are of no use.",
    )
    success_above: float = Field(
        default=0.5, description="A reward above it is a success, in units of the reward."
    )
    reward: str | None = Field(
        default=None, description="Label of the reward that says so; null: the weighted sum."
    )

    @model_validator(mode="after")
    def _leaves_a_range(self) -> Config:
        if max(self.min_size, self.min_size_certain) > self.max_size:
            raise UserError(
                f"max_size {self.max_size} is less than min_size {self.min_size} or "
                f"min_size_certain {self.min_size_certain}"
            )
        return self


def bounds(config: Config, mean_size: int) -> tuple[int, int]:
    """Samples of the smallest and the largest group; ``UserError`` if the mean does not fit."""
    least = max(config.min_size, config.min_size_certain)
    if not least <= mean_size <= config.max_size:
        raise UserError(
            f"training.group_size: {mean_size} is the mean size of a group, but prompts.budget "
            f"allows {least} (min_size, min_size_certain) to {config.max_size} (max_size)"
        )
    return min(config.min_size, config.min_size_certain), config.max_size


def allocate(
    prompts: Sequence[Prompt], mean_size: int, config: Config, state: dict[str, Any]
) -> list[int]:
    """Samples of each of ``prompts``; they add up to ``mean_size`` for each.

    ``state``: ``rewards`` by prompt id, a 1 or 0 for each of the last, oldest first, and
    ``counts``, how many there ever were.
    """
    counts = state.get("counts", {})
    known = [counts.get(prompt.id, 0) >= config.min_count for prompt in prompts]
    bits = [state["rewards"][p.id] if k else "" for p, k in zip(prompts, known, strict=True)]
    rates = [row.count("1") / len(row) if row else None for row in bits]
    return knapsack(rates, mean_size, config)


def learn(outcomes: Sequence[Outcome], config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """The state with the rewards of these groups; ``UserError`` if ``reward`` is no label."""
    rewards, counts = dict(state.get("rewards", {})), dict(state.get("counts", {}))
    for prompt_id, mine in by_prompt(outcomes).items():
        found = floats(usable_rewards(mine, config.reward, "prompts.budget.reward"))
        if found:
            new = "".join("1" if value > config.success_above else "0" for value in found)
            kept = max(len(new), config.window)
            rewards[prompt_id] = (rewards.get(prompt_id, "") + new)[-kept:]
            counts[prompt_id] = counts.get(prompt_id, 0) + len(new)
    return {**state, "rewards": rewards, "counts": counts}


def metrics(state: Mapping[str, Any]) -> dict[str, float]:
    """``budget/uncertain``: share of the known prompts that both succeed and fail."""
    known = list(state.get("rewards", {}).values())
    if not known:
        return {}
    return {"budget/uncertain": sum(len(set(row)) == 2 for row in known) / len(known)}


# The knapsack


def knapsack(rates: Sequence[float | None], mean_size: int, config: Config) -> list[int]:
    """Samples of prompts by their success rates in [0, 1], ``None`` where it is not known."""
    effective = [i for i, rate in enumerate(rates) if rate is not None and 0 < rate < 1]
    failing = [i for i, rate in enumerate(rates) if rate == 0]
    others = [i for i in range(len(rates)) if i not in {*effective, *failing}]
    if not effective and not failing:
        return [mean_size] * len(rates)
    sizes = [_least(rate, mean_size, config) for rate in rates]
    left = mean_size * len(rates) - sum(sizes)
    if not effective:
        left = _evenly(sizes, failing, left, config.max_size)
    # What the others cannot use tries prompts that have failed so far, else any that are certain.
    excess = left - sum(_useful(rates[i], config) for i in effective)
    if effective and excess > 0 and (failing or others):
        left -= excess - _evenly(sizes, failing or others, excess, config.max_size)
    left = _greedy(sizes, {i: rates[i] or 0.0 for i in effective}, left, config)
    left = _evenly(sizes, range(len(sizes)), left, config.max_size)
    assert left == 0, "the mean of the sizes is within their bounds"
    return sizes


def value(size: int, rate: float) -> float:
    """V(n, p), what ``size`` samples of a prompt of success ``rate`` are worth."""
    return (1 - rate**size - (1 - rate) ** size) * rate * (1 - rate) ** 2


def _least(rate: float | None, mean_size: int, config: Config) -> int:
    if rate is None:
        return mean_size
    return config.min_size if 0 < rate < 1 else config.min_size_certain


def _useful(rate: float | None, config: Config) -> int:
    """Samples after which both outcomes have shown with probability ``confidence``, if allowed."""
    assert rate is not None, "the rates of effective prompts are known"
    needed = math.log(1 - config.confidence) / math.log(max(rate, 1 - rate))
    return math.floor(min(config.max_size, needed))


def _greedy(sizes: list[int], rates: Mapping[int, float], left: int, config: Config) -> int:
    """Hand out ``left`` samples by marginal value, ties to the smaller group; what is not used."""
    start = [(-value(sizes[i] + 1, p), sizes[i], i) for i, p in rates.items()]
    heap = [entry for entry in start if entry[1] < config.max_size]
    heapq.heapify(heap)
    while heap and left:
        _, size, i = heapq.heappop(heap)
        sizes[i], left = size + 1, left - 1
        if sizes[i] < config.max_size:
            heapq.heappush(heap, (-_marginal(sizes[i], rates[i]), sizes[i], i))
    return left


def _marginal(size: int, rate: float) -> float:
    """V(n + 1, p) - V(n, p), without the cancellation."""
    other = 1 - rate
    return (rate**size * other + other**size * rate) * rate * other**2


def _evenly(sizes: list[int], places: Sequence[int], left: int, largest: int) -> int:
    """Hand out ``left`` samples in turn to ``places``; what finds no place."""
    while left and (open_places := [i for i in places if sizes[i] < largest]):
        for i in open_places[:left]:
            sizes[i], left = sizes[i] + 1, left - 1
    return left
