"""The ``backend`` section of ``toy.cascade``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from toy.gauss.config import Config as GaussConfig


class Config(GaussConfig):
    """``start``: a finished run of the toy.  ``precision``: what accelerate is told."""

    start: Path | None = None
    precision: Literal["no", "bf16"] = "no"

    @property
    def mixed_precision(self) -> str:
        return self.precision
