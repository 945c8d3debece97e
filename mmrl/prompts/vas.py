"""Variance-aware sampling: more often the prompts whose samples differ in reward and in wording.

A prompt's score is alpha Var(reward) + beta diversity; for rewards of 0 and 1 the variance is
P (1 - P).  Of a step, a share is drawn in proportion to the scores, with replacement, and the rest
uniformly: seeded shuffles of all prompts, one after another (Leng et al. 2025, arXiv:2509.21268;
the Variance Promotion Score and its mixed sampler).

Scores come from a pass over all prompts every ``refresh_every`` steps, as published, or without one
from the rollouts that are trained on anyway.  Equal scores, or none yet, make it uniform.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from mmrl.errors import UserError
from mmrl.noise import generator
from mmrl.prompts._outcomes import by_prompt, usable_rewards
from mmrl.prompts.uniform import permutation
from mmrl.schema import StrictModel
from mmrl.types import Outcome, Prompt, RolloutGroup

PAPER = "Leng et al. 2025, arXiv:2509.21268"
EVIDENCE = "code"


class Config(StrictModel):
    """Which share is drawn by score, and what makes a score."""

    weighted_share: float = Field(
        default=0.5, ge=0, le=1, description="Share of a step that is drawn by score (lambda)."
    )
    alpha: float = Field(default=0.8, ge=0, description="Weight of the variance of the reward.")
    beta: float = Field(
        default=0.2,
        ge=0,
        description="Weight of the diversity of the samples, which only texts have.",
    )
    diversity: Literal["distinct", "self_bleu"] = Field(
        default="distinct",
        description="distinct: different n-grams of all samples over all of them. self_bleu: 1 - "
        "the mean BLEU of a sample against the others.",
    )
    ngram: int = Field(default=3, ge=1, description="Words of the longest n-grams.")
    reward: str | None = Field(
        default=None,
        description="Label of the reward whose variance counts; null: the weighted sum.",
    )
    refresh_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between passes that score all prompts anew; null: scores follow from "
        "the training samples, at no cost.",
    )
    refresh_samples: int = Field(
        default=8, ge=2, description="Samples of each prompt in such a pass."
    )
    momentum: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the old score that a new one keeps."
    )


def take(
    prompts: Sequence[Prompt],
    count: int,
    step: int,
    seed: int,
    config: Config,
    state: dict[str, Any],
) -> tuple[list[Prompt], dict[str, Any]]:
    """``count`` prompts for ``step``, those drawn by score first, and the next state.

    ``state``: ``scores`` by prompt id, and ``taken``, the number of uniform draws so far.
    """
    weighted = math.floor(config.weighted_share * count)
    taken = state.get("taken", 0)
    drawn = _by_score(prompts, weighted, step, seed, state.get("scores", {}))
    for position in range(taken, taken + count - weighted):
        epoch, index = divmod(position, len(prompts))
        drawn.append(prompts[permutation(len(prompts), seed, epoch)[index]])
    return drawn, {**state, "taken": taken + count - weighted}


def _by_score(
    prompts: Sequence[Prompt], count: int, step: int, seed: int, scores: Mapping[str, float]
) -> list[Prompt]:
    """Draws in proportion to the scores; a prompt without one counts as the mean of the others."""
    if not count:
        return []
    known = [scores[prompt.id] for prompt in prompts if prompt.id in scores]
    mean = sum(known) / len(known) if known else 1.0
    weights = torch.tensor([scores.get(p.id, mean) for p in prompts], dtype=torch.float64)
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    chosen = torch.multinomial(
        weights, count, replacement=True, generator=generator(seed, step, "vas")
    )
    return [prompts[i] for i in chosen.tolist()]


def refresh_samples(step: int, config: Config) -> int:
    """Samples of every prompt to score before ``step``; 0 where none are due."""
    due = config.refresh_every is not None and step % config.refresh_every == 0
    return config.refresh_samples if due else 0


def measure(group: RolloutGroup, config: Config) -> float:
    """Diversity of a group's texts in [0, 1]; 0 where ``beta`` is.

    ``UserError`` for samples that are no texts.
    """
    if config.beta == 0:
        return 0.0
    texts = [text for text in group.outputs if isinstance(text, str)]
    if len(texts) < len(group.outputs):
        raise UserError(
            f"prompts.sampler.beta = {config.beta:g} weighs the diversity of texts, and these "
            "samples are none; allowed: 0"
        )
    words = [text.split() for text in texts]
    if config.diversity == "distinct":
        return distinct(words, config.ngram)
    return 1.0 - self_bleu(words, config.ngram)


def learn(outcomes: Sequence[Outcome], config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """The state with new scores of the prompts of ``outcomes``.

    Groups of one prompt are taken together.  A prompt without two usable rewards keeps its score.
    ``UserError`` if ``config.reward`` is no label.
    """
    scores = dict(state.get("scores", {}))
    for prompt_id, mine in by_prompt(outcomes).items():
        rewards = usable_rewards(mine, config.reward, "prompts.sampler.reward")
        if len(rewards) < 2:
            continue
        variety = sum(outcome.measure for outcome in mine) / len(mine)
        new = config.alpha * float(rewards.var(unbiased=False)) + config.beta * variety
        old = scores.get(prompt_id, new)
        scores[prompt_id] = config.momentum * old + (1 - config.momentum) * new
    return {**state, "scores": scores}


def metrics(state: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of the scores."""
    scores = list(state.get("scores", {}).values())
    if not scores:
        return {}
    return {
        "sampler/mean_score": sum(scores) / len(scores),
        "sampler/zero_scores": sum(score == 0 for score in scores) / len(scores),
    }


# Diversity


def distinct(samples: Sequence[Sequence[str]], ngram: int) -> float:
    """Different n-grams of all samples over the number of all (Li et al. 2016, arXiv:1510.03055).

    Samples shorter than ``ngram`` words count as one n-gram.  0 without any word.
    """
    grams = [gram for words in samples for gram in _grams(words, ngram)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(samples: Sequence[Sequence[str]], ngram: int) -> float:
    """Mean BLEU of each sample against the others (Zhu et al. 2018, arXiv:1802.01886), in [0, 1].

    n-grams up to ``ngram`` words, equal weights, brevity penalty; no smoothing, so one order
    without a match makes 0.
    """
    if len(samples) < 2:
        return 0.0
    scores = [
        _bleu(words, [*samples[:i], *samples[i + 1 :]], ngram) for i, words in enumerate(samples)
    ]
    return sum(scores) / len(scores)


def _bleu(words: Sequence[str], references: Sequence[Sequence[str]], ngram: int) -> float:
    logs = []
    for n in range(1, min(ngram, max(1, len(words))) + 1):
        found = Counter(_grams(words, n))
        known: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            known |= Counter(_grams(reference, n))
        matched = sum((found & known).values())
        if not matched:
            return 0.0
        logs.append(math.log(matched / sum(found.values())))
    nearest_length = min((len(r) for r in references), key=lambda k: (abs(k - len(words)), k))
    brevity = min(0.0, 1.0 - nearest_length / len(words))
    return math.exp(brevity + sum(logs) / len(logs))


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    if not words:
        return []
    n = min(n, len(words))
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
