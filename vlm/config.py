"""The ``backend`` section of a vision-language run: that of a text run, and images."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmrl.errors import UserError
from mmrl.schema import StrictModel
from mmrl.text import config as text


class ModelConfig(text.ModelConfig):
    """Which model is trained, and in what form; its vision tower stays as it is."""

    family: str = Field(
        default="qwen2_5_vl",
        description="A file in vlm/models.",
    )


class ImageConfig(StrictModel):
    """How images reach the model."""

    column: str = Field(
        default="images",
        min_length=1,
        description="Column with a prompt's image or list of images: paths, or what a dataset "
        "holds. A prompt without any is text alone.",
    )
    min_pixels: int | None = Field(
        default=None, ge=1, description="Smaller images are enlarged; null: qwen-vl-utils' own."
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Larger images are reduced; null: qwen-vl-utils' own."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ImageConfig:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise UserError(
                f"images.min_pixels = {self.min_pixels} is more than max_pixels = {self.max_pixels}"
            )
        return self


class Config(text.Config):
    """Everything under ``backend`` but its name."""

    model: ModelConfig
    images: ImageConfig = ImageConfig()

    @property
    def image_column(self) -> str | None:
        """Where a prompt has its pictures."""
        return self.images.column
