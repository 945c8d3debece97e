"""The ``backend`` section of a vision-language run: that of a text run, images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from mmrl.errors import UserError
from mmrl.schema import StrictModel, nearest
from mmrl.text import config as text
from mmrl.types import Prompt

TRL_COLUMN = "image"
"""Where data sets made for TRL have the one image of a prompt."""


class ModelConfig(text.ModelConfig):
    """Which model is trained, and in what form."""

    family: str = Field(
        default="qwen2_5_vl",
        description="A file in vlm/models.",
    )
    train_vision: bool = Field(
        default=False,
        description="Train the tower that reads images and videos too: adapters in it, or all its "
        "parameters where lora is null. false: it stays as it is.",
    )


class _Pixels(StrictModel):
    """Sizes of pictures."""

    SECTION: ClassVar[str]

    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Smaller pictures are enlarged; null: qwen-vl-utils' own, or max_pixels if "
        "that is less.",
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Larger pictures are reduced; null: qwen-vl-utils' own."
    )

    @model_validator(mode="after")
    def _consistent(self) -> _Pixels:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise UserError(
                f"{self.SECTION}.min_pixels = {self.min_pixels} is more than "
                f"max_pixels = {self.max_pixels}"
            )
        return self


class ImageConfig(_Pixels):
    """How images reach the model."""

    SECTION = "images"

    column: str = Field(
        default="images",
        min_length=1,
        description="Column with a prompt's image or list of images: paths, or what a dataset "
        "holds. A prompt without any is text alone. Where it is 'images', a prompt without that "
        "column may have its image in 'image', as TRL calls it.",
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Where images may stand: in the first of these columns that a prompt has."""
        usual = type(self).model_fields["column"].default
        return (self.column, TRL_COLUMN) if self.column == usual else (self.column,)


class VideoConfig(_Pixels):
    """How videos reach the model; pixels are those of a frame."""

    SECTION = "videos"

    column: str = Field(
        default="videos",
        min_length=1,
        description="Column with a prompt's video or list of videos: each a path, or a list of "
        "pictures, which are its frames.",
    )
    fps: float = Field(
        default=2.0,
        gt=0,
        description="Frames a second that are looked at, at least 4 in all; those that a list of "
        "pictures has.",
    )
    max_frames: int | None = Field(
        default=None,
        ge=2,
        multiple_of=2,
        description="Frames of a video at most, evenly spaced; null: 768 of a file, all of a list. "
        "Even, for two frames are read together.",
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Where videos may stand."""
        return (self.column,)


class Config(text.Config):
    """Everything under ``backend`` but its name."""

    model: ModelConfig
    images: ImageConfig = ImageConfig()
    videos: VideoConfig = VideoConfig()

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Where a prompt has its pictures: in the first of these that it has."""
        return self.images.columns

    def refuse_prompts(self, prompts: Sequence[Prompt]) -> None:
        """``UserError`` for a column that somebody named and no prompt has."""
        names = sorted({name for prompt in prompts for name in prompt.columns})
        for section in (self.images, self.videos):
            usual = type(section).model_fields["column"].default
            if section.column != usual and section.column not in names:
                raise UserError(
                    f"backend.{section.SECTION}.column = {section.column!r}: no prompt has this "
                    f"column; {nearest(section.column, names)}"
                )

    def refuse_missing_files(self, prompts: Sequence[Prompt]) -> None:
        """``UserError`` for a path of an image or a video where no file is; nothing is opened."""
        from vlm import images, videos  # they read this module

        for prompt in prompts:
            images.refuse_missing(prompt, self.images)
            videos.refuse_missing(prompt, self.videos)

    def prompt_notes(self, prompts: Sequence[Prompt], key: str) -> list[str]:
        """A line where no prompt of ``key`` has anything to look at."""
        from vlm import images, videos  # they read this module

        if any(
            images.images_in(prompt, self.images) or videos.videos_in(prompt, self.videos)
            for prompt in prompts
        ):
            return []
        columns = ", ".join(map(repr, (*self.images.columns, self.videos.column)))
        return [
            f"{key}: no prompt has an image or a video (columns {columns}; see "
            "backend.images.column, backend.videos.column): the model sees text alone"
        ]
