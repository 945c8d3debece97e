"""Completions that a data set shows, as token ids: what is trained on in place of samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmrl.errors import UserError
from mmrl.text.config import RolloutConfig
from mmrl.text.generation import Completion
from mmrl.types import Prompt

Demonstrations = Mapping[str, Completion]
"""By prompt id."""


def encode_demonstrations(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    forbidden: Collection[int] = (),
) -> Demonstrations:
    """Of the prompts that have one in the column ``config.demonstrations``; none without such.

    A text is tokenised by itself, without the tokenizer's own marks, and the end token follows
    unless it ends so already.  No policy drew the tokens: their log-probabilities are 0.

    Raises:
        UserError: a demonstration that is no text, has more than ``config.max_tokens`` tokens or
            one of ``forbidden``, or a tokenizer without an end token.
    """
    column, found = config.demonstrations, {}
    if column is None:
        return found
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            f"rollout.demonstrations = {column!r}: this tokenizer has no end token (eos_token) to "
            "put after them; allowed: null"
        )
    for prompt in (prompt for prompt in prompts if column in prompt.columns):
        where = f"{prompt.named}: its demonstration in the column {column!r}"
        text = _text(prompt.columns[column], where)
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        ids += [] if ids[-1:] == [end] else [end]
        if len(ids) > config.max_tokens:
            raise UserError(
                f"{where} has {len(ids)} tokens with its end; allowed: rollout.max_tokens = "
                f"{config.max_tokens}"
            )
        if not set(forbidden).isdisjoint(ids):
            raise UserError(f"{where} has tokens that stand for pictures; allowed: text")
        found[prompt.id] = Completion(ids=ids, logp=[0.0] * len(ids), finished=True)
    return found


def _text(value: Any, where: str) -> str:
    """A text, or that of the only message of a list, as TRL's conversations have it."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        message = value[0]
        value = message.get("content") if message.get("role") == "assistant" else value
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where} is {value!r:.80}; allowed: a text that is not empty, or a list of one "
            "message with role 'assistant' and a text as content"
        )
    return value
