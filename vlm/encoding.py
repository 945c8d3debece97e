"""Prompts with images as a network reads them, made when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from mmrl.errors import UserError
from mmrl.text.layout import Encoded
from mmrl.types import Prompt
from vlm.config import Config
from vlm.images import images_of, refuse_missing

MARK = "<image>"
KEPT = 256
"""Prompts whose pixels stay in memory."""


class Prompts(Mapping[str, Encoded]):
    """By prompt id.  Only the last ``KEPT`` are held: pixels of a whole data set would not fit."""

    def __init__(
        self, prompts: Sequence[Prompt], config: Config, processor: Any, family: Any, limit: int
    ) -> None:
        """``limit``: of tokens.  ``UserError`` for an image that is not there."""
        self._prompts = {prompt.id: prompt for prompt in prompts}
        for prompt in prompts:
            refuse_missing(prompt, config.images)

        def encoded(prompt_id: str) -> Encoded:
            return encode(self._prompts[prompt_id], config, processor, family, limit)

        self._encoded = lru_cache(maxsize=KEPT)(encoded)

    def __getitem__(self, prompt_id: str) -> Encoded:
        return self._encoded(prompt_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)


def encode(prompt: Prompt, config: Config, processor: Any, family: Any, limit: int) -> Encoded:
    """Tokens, positions and pixels of a prompt.

    ``UserError`` for images that do not fit the marks in the text, and for too many tokens.
    """
    images = images_of(prompt, config.images, processor.image_processor.patch_size)
    messages = conversation(prompt, len(images))
    if config.prompts.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.prompts.system})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    options = {"images": images, "do_resize": False} if images else {}
    found = processor(text=[text], return_tensors="pt", **options)
    ids = found["input_ids"][0].tolist()
    if len(ids) > limit:
        raise UserError(f"prompts: {prompt.text!r:.80} has {len(ids)} tokens; allowed: {limit}")
    positions, after = family.positions(found)
    inputs = {name: found[name] for name in family.INPUTS if name in found}
    return Encoded(ids=ids, positions=positions, after=after, inputs=inputs)


def conversation(prompt: Prompt, num_images: int) -> list[dict[str, Any]]:
    """The messages of a prompt, with a part for each image.

    Images stand where a message has parts or ``MARK`` for them, or else before the first message of
    the user.  ``UserError`` if there are more or fewer places than images.
    """
    messages = [dict(message) for message in prompt.messages]
    messages = messages or [{"role": "user", "content": prompt.text}]
    for message in messages:
        if isinstance(message["content"], str) and message["role"] == "user":
            message["content"] = parts_of(message["content"])
    places = sum(part.get("type") == "image" for part in _parts(messages))
    if not places and num_images:
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * num_images + list(_parts([first]))
    elif places != num_images:
        raise UserError(
            f"prompts: {prompt.text!r:.80} has places for {places} images and {num_images} images"
        )
    return messages


def parts_of(text: str) -> list[dict[str, str]]:
    """Parts of a message: text, and an image wherever it has ``MARK``."""
    return [
        {"type": "image"} if piece == MARK else {"type": "text", "text": piece}
        for piece in re.split(f"({re.escape(MARK)})", text)
        if piece
    ]


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_positions(count: int, axes: int) -> torch.Tensor:
    """[axes, count]: one after another in every axis."""
    return torch.arange(count).expand(axes, -1)
