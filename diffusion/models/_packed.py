"""Families whose transformer reads latents packed: each 2 x 2 square is one token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffusion.models.base import Family, pixel_sizes

PATCH = 2
DEFAULT_LATENTS = 128
"""Side of the latents of an image of default size."""


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w / 4, 4 C], squares in reading order, channel first within one."""
    squares = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h/2, 2, w/2, 2]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of ``pack`` for latents of ``height`` x ``width``."""
    squares = tokens.unflatten(1, (height // PATCH, width // PATCH))
    squares = squares.unflatten(3, (-1, PATCH, PATCH))  # [B, h/2, w/2, C, 2, 2]
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class PackedFamily(Family):
    """Sizes of a family with packed latents."""

    @classmethod
    def latent_shape_of(
        cls, config: Any, scale: int, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """See ``Family.latent_shape_of``."""
        height, width = pixel_sizes(height, width, DEFAULT_LATENTS * scale, PATCH * scale)
        return config["in_channels"] // PATCH**2, height // scale, width // scale

    @classmethod
    def image_tokens(cls, config: Any, shape: tuple[int, int, int]) -> int:
        """See ``Family.image_tokens``."""
        return shape[1] * shape[2] // PATCH**2
