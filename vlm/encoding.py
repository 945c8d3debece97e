"""Prompts with images and videos as a network reads them, made when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from mmrl.errors import UserError
from mmrl.text.layout import Encoded
from mmrl.text.loading import Room
from mmrl.types import Prompt
from vlm import images, videos
from vlm.config import Config

MARKS = {"<image>": "image", "<video>": "video"}
KEPT = 256
"""Prompts whose pixels stay in memory."""


class Prompts(Mapping[str, Encoded]):
    """By prompt id.  Only the last ``KEPT`` are held: pixels of a whole data set would not fit.

    ``kinds``: of pictures that there are, ``image`` and ``video``.
    """

    def __init__(
        self, prompts: Sequence[Prompt], config: Config, processor: Any, family: Any, room: Room
    ) -> None:
        """``room``: that prompts have.  ``UserError`` for an image or a video that is not there."""
        self._prompts = {prompt.id: prompt for prompt in prompts}
        config.refuse_missing_files(prompts)
        has_images = any(images.images_in(prompt, config.images) for prompt in prompts)
        has_videos = any(videos.videos_in(prompt, config.videos) for prompt in prompts)
        self.kinds = ("image",) * has_images + ("video",) * has_videos

        def encoded(prompt_id: str) -> Encoded:
            return encode(self._prompts[prompt_id], config, processor, family, room)

        self._encoded = lru_cache(maxsize=KEPT)(encoded)

    def __getitem__(self, prompt_id: str) -> Encoded:
        return self._encoded(prompt_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)


def encode(prompt: Prompt, config: Config, processor: Any, family: Any, room: Room) -> Encoded:
    """Tokens, positions and pixels of a prompt.

    ``UserError`` that names its row, for images and videos that do not fit the marks in the text,
    and where there is no ``room`` for it.
    """
    patch_size = processor.image_processor.patch_size
    pictures = images.images_of(prompt, config.images, patch_size)
    films = videos.videos_of(prompt, config.videos, patch_size)
    messages = conversation(prompt, len(pictures), len(films))
    if config.prompts.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.prompts.system})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for token, given in ((processor.image_token, pictures), (processor.video_token, films)):
        if text.count(token) != len(given):
            raise UserError(
                f"{prompt.named} has {token} {text.count(token)} times in the chat template, for "
                f"{len(given)}"
            )
    options: dict[str, Any] = {"images": pictures} if pictures else {}
    if films:
        options["videos"] = [film.frames for film in films]
        options["video_metadata"] = [film.metadata for film in films]
        options["do_sample_frames"] = False
    options |= {"do_resize": False} if options else {}
    found = processor(text=[text], return_tensors="pt", **options)
    ids = found["input_ids"][0].tolist()
    room.refuse(prompt, len(ids))
    inputs = {name: found[name] for name in family.INPUTS if name in found}
    family.refuse_mismatch(ids, inputs, prompt)
    positions, after = family.positions(found)
    return Encoded(ids=ids, positions=positions, after=after, inputs=inputs)


def conversation(prompt: Prompt, num_images: int, num_videos: int = 0) -> list[dict[str, Any]]:
    """The messages of a prompt, with a part for each image and each video.

    They stand where a message has parts or ``MARKS`` for them, or else before the first message of
    the user.  ``UserError`` if there are more or fewer places than images, or than videos.
    """
    messages = [dict(message) for message in prompt.messages]
    messages = messages or [{"role": "user", "content": prompt.text}]
    for message in messages:
        if isinstance(message["content"], str) and message["role"] == "user":
            message["content"] = parts_of(message["content"])
    first = next((m for m in messages if m["role"] == "user"), messages[0])
    for kind, count in (("video", num_videos), ("image", num_images)):
        places = sum(part.get("type") == kind for part in _parts(messages))
        if not places and count:
            first["content"] = [{"type": kind}] * count + list(_parts([first]))
        elif places != count:
            raise UserError(f"{prompt.named} has places for {places} {kind}s and {count} {kind}s")
    return messages


def parts_of(text: str) -> list[dict[str, str]]:
    """Parts of a message: text, and an image or a video wherever it has one of ``MARKS``."""
    return [
        {"type": MARKS[piece]} if piece in MARKS else {"type": "text", "text": piece}
        for piece in re.split(f"({'|'.join(map(re.escape, MARKS))})", text)
        if piece
    ]


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_positions(count: int, axes: int) -> torch.Tensor:
    """[axes, count]: one after another in every axis."""
    return torch.arange(count).expand(axes, -1)
