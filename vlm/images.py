"""The images of a prompt, opened and resized."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmrl.errors import UserError
from mmrl.types import Prompt
from vlm.config import ImageConfig, VideoConfig


def images_of(prompt: Prompt, config: ImageConfig, patch_size: int) -> list[Image.Image]:
    """RGB images in sizes that the model's patches divide, by qwen-vl-utils' rule.

    ``UserError`` that names the prompt's row and the image, for one that cannot be read.
    """
    from qwen_vl_utils import fetch_image
    from qwen_vl_utils.vision_process import IMAGE_MIN_TOKEN_NUM

    limits = pixel_limits(config, IMAGE_MIN_TOKEN_NUM, patch_size)
    found = []
    for entry in images_in(prompt, config):
        try:
            asked = {"image": open_image(entry), **limits}
            found.append(fetch_image(asked, image_patch_size=patch_size))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{place(prompt, config)} has an image that cannot be read, {described(entry)}: "
                f"{error}"
            ) from error
    return found


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
    if isinstance(entry, Mapping) and not entry.get("bytes"):
        entry = entry.get("path")
    if isinstance(entry, str) and not entry.startswith("data:") and not Path(entry).is_file():
        raise UserError(
            f"{place(prompt, config)} names {entry!r}, which is no file (from {Path.cwd()})"
        )


def described(entry: Any) -> str:
    """A picture or a video for a message: its path, else what it is."""
    path = entry.get("path") if isinstance(entry, Mapping) else entry
    if isinstance(path, str):
        return f"{path!r:.200}"
    return f"list of {len(path)}" if isinstance(path, list) else type(entry).__name__


def place(prompt: Prompt, config: ImageConfig | VideoConfig) -> str:
    """Start of a message about a column of a prompt."""
    return f"{prompt.named}: backend.{config.SECTION}.column = {column_of(prompt, config)!r}"
