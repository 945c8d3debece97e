"""Is the completion about to run out of tokens? A penalty that grows along the last of them.

    0                                  up to max_tokens - buffer tokens
    (max_tokens - buffer - n) / buffer  at n tokens from there on
    -1                                 beyond max_tokens

DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13), to be added to another
reward.  Range: [-1, 0], higher is better.  It applies to every prompt.  Tokens are counted as they
were sampled, the end included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from mmrl.errors import UserError
from mmrl.schema import StrictModel
from rewards._answers import text_of
from rewards._signatures import sampled_tokens

PAPER = "Yu et al. 2025, arXiv:2503.14476"


class Config(StrictModel):
    """Where the penalty starts and where it is full, in tokens."""

    max_tokens: int = Field(
        default=20480,
        ge=1,
        description="-1 from this length on; as a rule rollout.max_tokens of the backend",
    )
    buffer: int = Field(
        default=4096, ge=1, description="tokens before max_tokens along which the penalty grows"
    )

    @model_validator(mode="after")
    def _inside(self) -> Config:
        if self.buffer > self.max_tokens:
            raise UserError(
                f"buffer: {self.buffer} is more than max_tokens = {self.max_tokens}; "
                f"allowed: 1 to {self.max_tokens}"
            )
        return self

    counts_tokens: ClassVar[bool] = True

    @property
    def free_tokens(self) -> int:
        """The longest completion that costs nothing."""
        return self.max_tokens - self.buffer


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in [-1, 0].

    Raises ``TypeError`` for anything but texts, and without the rollout that knows their tokens.
    """

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        texts = [text_of(output) for output in outputs]
        return penalty(sampled_tokens(texts, columns), config)

    reward.reads_group = True  # type: ignore[attr-defined]
    return reward


def penalty(lengths: Tensor, config: Config) -> Tensor:
    """Equation 13 at ``lengths`` [N], float32."""
    return ((config.free_tokens - lengths.float()) / config.buffer).clamp(-1.0, 0.0)
