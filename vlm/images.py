"""The images of a prompt, opened and resized."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mmrl.errors import UserError
from mmrl.types import Prompt
from vlm.config import ImageConfig


def images_of(prompt: Prompt, config: ImageConfig, patch_size: int) -> list[Image.Image]:
    """RGB images in sizes that the model's patches divide, by qwen-vl-utils' rule.

    ``UserError`` that names the prompt, for an image that is missing or cannot be read.
    """
    from qwen_vl_utils import fetch_image

    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    limits: Any = {name: value for name, value in limits.items() if value is not None}
    try:
        return [
            fetch_image({"image": open_image(entry), **limits}, image_patch_size=patch_size)
            for entry in entries(prompt, config)
        ]
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise UserError(
            f"images.column = {config.column!r}: prompt {prompt.text!r:.60} has an image that "
            f"cannot be read: {error}"
        ) from error


def refuse_missing(prompt: Prompt, config: ImageConfig) -> None:
    """``UserError`` for a path of an image where no file is; nothing is opened."""
    for entry in entries(prompt, config):
        if isinstance(entry, str) and not entry.startswith("data:") and not Path(entry).is_file():
            raise UserError(
                f"images.column = {config.column!r}: prompt {prompt.text!r:.60} names {entry!r}, "
                f"which is no file (from {Path.cwd()})"
            )


def entries(prompt: Prompt, config: ImageConfig) -> list[Any]:
    """What stands in the column: a list, or one alone."""
    value = prompt.columns.get(config.column)
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def open_image(entry: Any) -> Any:
    """A picture, or what qwen-vl-utils opens itself: a path or a ``data:`` address.

    ``ValueError`` for anything else; nothing is fetched from the network.
    """
    if isinstance(entry, Mapping) and entry.get("bytes"):  # as datasets stores images
        return Image.open(io.BytesIO(entry["bytes"]))
    if isinstance(entry, Mapping):
        entry = entry.get("path")
    if isinstance(entry, Image.Image):
        return entry
    if not isinstance(entry, str) or entry.startswith(("http://", "https://", "file://")):
        raise ValueError(f"{entry!r:.80} is neither a picture nor a path")
    return entry
