"""The images of a prompt, opened and resized."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mmrl.errors import UserError
from mmrl.types import Prompt
from vlm.config import ImageConfig, VideoConfig


def images_of(prompt: Prompt, config: ImageConfig, patch_size: int) -> list[Image.Image]:
    """RGB images in sizes that the model's patches divide, by qwen-vl-utils' rule.

    ``UserError`` that names the prompt, for an image that is missing or cannot be read.
    """
    from qwen_vl_utils import fetch_image
    from qwen_vl_utils.vision_process import IMAGE_MIN_TOKEN_NUM

    limits = pixel_limits(config, IMAGE_MIN_TOKEN_NUM, patch_size)
    try:
        return [
            fetch_image({"image": open_image(entry), **limits}, image_patch_size=patch_size)
            for entry in images_in(prompt, config)
        ]
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise UserError(
            f"{place(prompt, config)} has an image that cannot be read: {error}"
        ) from error


def refuse_missing(prompt: Prompt, config: ImageConfig) -> None:
    """``UserError`` for a path of an image where no file is; nothing is opened."""
    for entry in images_in(prompt, config):
        refuse_no_file(entry, prompt, config)


def images_in(prompt: Prompt, config: ImageConfig) -> list[Any]:
    """What stands in the column: a list, or one alone."""
    value = prompt.columns.get(column_of(prompt, config))
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def column_of(prompt: Prompt, config: ImageConfig | VideoConfig) -> str:
    """Where a prompt has its pictures, or would have them."""
    return next((name for name in config.columns if name in prompt.columns), config.column)


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


# What videos share


def pixel_limits(
    config: ImageConfig | VideoConfig, least_tokens: int, patch_size: int
) -> dict[str, Any]:
    """Those that were given; with ``max_pixels`` alone, the default of the other is no more."""
    from qwen_vl_utils.vision_process import SPATIAL_MERGE_SIZE

    given = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    limits = {name: value for name, value in given.items() if value is not None}
    if config.max_pixels is not None:
        least = least_tokens * (SPATIAL_MERGE_SIZE * patch_size) ** 2
        limits.setdefault("min_pixels", min(least, config.max_pixels))
    return limits


def refuse_no_file(entry: Any, prompt: Prompt, config: ImageConfig | VideoConfig) -> None:
    """``UserError`` for a path where no file is."""
    if isinstance(entry, str) and not entry.startswith("data:") and not Path(entry).is_file():
        raise UserError(
            f"{place(prompt, config)} names {entry!r}, which is no file (from {Path.cwd()})"
        )


def place(prompt: Prompt, config: ImageConfig | VideoConfig) -> str:
    """Start of a message about a column of a prompt."""
    return f"{config.SECTION}.column = {column_of(prompt, config)!r}: prompt {prompt.text!r:.60}"
