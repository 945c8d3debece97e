"""What estimators and modulators may read of samples beside their rewards.

A part names it in ``reads(config)``; what no part reads is not found out.  Facts are found on the
process that owns a group and gathered with the scores (``rollouts.with_facts``).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.config import Part, RunConfig
from mmrl.errors import UserError
from mmrl.reduction import where_active
from mmrl.types import PolicyTerms, RolloutGroup
from rewards.combine import RewardSpec

SCORE_NORM = "score_norm"
SCORE_NORM_NEEDS = frozenset({"logp", "sum_squares"})
"""The one fact that the policy must be asked about, and by which terms."""
TEXT_BINS, GRAM, THUMBNAIL = 512, 3, 8
"""Size of the feature vector of a text, letters of a gram, side of a picture's thumbnail."""


def reads(part: Part) -> frozenset[str]:
    """Facts that a part reads."""
    ask = getattr(part.module, "reads", None)
    return ask(part.config) if ask else frozenset()


def read_by(config: RunConfig) -> frozenset[str]:
    """Facts that a run reads."""
    return frozenset().union(*map(reads, (config.advantage, *config.modulators)))


def found_in(config: RunConfig) -> frozenset[str]:
    """Facts that there are in a run."""
    answers = {"answer"} if draws_texts(config) and answerer(config.rewards) else set[str]()
    return frozenset({"length", "truncated", "features", SCORE_NORM} | answers)


def draws_texts(config: RunConfig) -> bool:
    """Whether the samples of a run can have answers."""
    return getattr(config.backend.config, "draws_texts", False)


def answerer(specs: Sequence[RewardSpec]) -> Callable[[Any], str | None] | None:
    """How the first reward that knows where an answer stands reads it."""
    known = (getattr(spec.config, "canonical", None) for spec in specs)
    return next(filter(None, known), None)


def of_group(
    group: RolloutGroup, names: frozenset[str], specs: Sequence[RewardSpec]
) -> dict[str, Any]:
    """The named facts of the G samples of a group; ``UserError`` if they have none such."""
    size = group.request.group_size
    found: dict[str, Any] = {}
    if "length" in names:
        found["length"] = group.drawn.sum(1).cpu()
    if "truncated" in names:
        cut = group.truncated
        found["truncated"] = torch.zeros(size, dtype=torch.bool) if cut is None else cut.cpu()
    if "answer" in names:
        found["answer"] = _answers(group.outputs, answerer(specs))
    if "features" in names:
        found["features"] = torch.stack([features(output) for output in group.outputs])
    return found


def score_norm(terms: PolicyTerms, drawn: Tensor) -> Tensor:
    """[B, K] float64: 1 - 2 pi(y) + sum_v pi(v)^2, the squared norm of d log pi(y) / d logits.

    0 where no decision was ``drawn`` [B, K].
    """
    logp, squares = (x.detach().cpu().double() for x in (terms.logp, terms.need("sum_squares")))
    return where_active(1.0 - 2.0 * logp.exp() + squares, drawn)


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts of all samples from those of their groups, in order."""
    return {name: _concatenated([part[name] for part in parts]) for name in parts[0]}


def features(output: Any) -> Tensor:
    """[D] float64 of length 1: what is alike has a small angle; 0 for an empty text.

    A text: counts of its runs of three letters, hashed.  A picture: its thumbnail.  Numbers: as
    they are.  Likeness of form, not of meaning.
    """
    if isinstance(output, str):
        letters = f"  {' '.join(output.casefold().split())} ".encode()
        grams = [zlib.crc32(letters[i : i + GRAM]) for i in range(len(letters) - GRAM + 1)]
        bins = torch.tensor(grams, dtype=torch.int64) % TEXT_BINS
        point = torch.bincount(bins, minlength=TEXT_BINS).double()
    elif hasattr(output, "convert"):
        small = output.convert("RGB").resize((THUMBNAIL, THUMBNAIL))
        point = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).double() - 127.5
    else:
        try:
            point = torch.as_tensor(output, dtype=torch.float64).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(output).__name__
            message = f"samples of type {kind} have no features; allowed: texts, pictures, numbers"
            raise UserError(message) from error
    return torch.nn.functional.normalize(point, dim=0)


def _answers(
    outputs: Sequence[Any], answer_of: Callable[[Any], str | None] | None
) -> list[str | None]:
    assert answer_of is not None, "refused before training"
    try:
        return [answer_of(output) for output in outputs]
    except TypeError as error:
        raise UserError(f"answers of samples: {error}") from error


def _concatenated(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [value for each in values for value in each]
