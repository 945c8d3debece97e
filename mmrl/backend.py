"""What a backend is: the only thing the trainer knows about models.

A backend turns prompts into samples and samples into differentiable log-probabilities.  It never
sees a reward, an advantage or a loss; the trainer never sees a model family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mmrl.types import Anchor, PolicyTerms, RolloutGroup, RolloutRequest, UpdateBatch


class BackendConfig(Protocol):
    """What the core asks of a backend's ``Config``; it answers without loading a model."""

    @property
    def provides(self) -> frozenset[str]:
        """Terms of ``PolicyTerms`` that the configured likelihood computes."""
        ...

    @property
    def comes_with(self) -> Mapping[str, str]:
        """Settings, in words, under which terms that may be missing are computed; optional."""
        ...

    @property
    def num_decisions(self) -> int | None:
        """Decisions of every sample, if they can be evaluated apart; ``None`` if they cannot."""
        ...

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """Precision of the model, in accelerate's words."""
        ...

    @property
    def draws_texts(self) -> bool:
        """Whether samples are texts, in which answers may stand; optional, else not."""
        ...

    @property
    def keeps_samples(self) -> bool:
        """Whether the backend has ``save_samples`` and ``load_samples``; optional, else not."""
        ...


class Backend(Protocol):
    """Everything a backend offers.

    ``model``: the module to be wrapped by accelerate; the trainer assigns the wrapped one back.
    ``off_policy``: samples come from another policy than the one being updated.  ``notes``: lines
    on how the backend was set up here, such as the attention kernel that was picked.
    """

    model: torch.nn.Module
    off_policy: bool
    notes: Sequence[str]

    def rollout(
        self, requests: Sequence[RolloutRequest], *, evaluation: bool = False
    ) -> Iterator[RolloutGroup]:
        """Yield one group for each request, in order, as each becomes ready (no gradient)."""
        ...

    def collate(
        self, rows: Sequence[tuple[RolloutGroup, int]], decisions: slice = slice(None)
    ) -> tuple[Any, Tensor]:
        """Payload and mask [B, K] of some ``decisions`` of samples ``(group, index in group)``."""
        ...

    def evaluate(self, batch: UpdateBatch, needs: frozenset[str]) -> PolicyTerms:
        """Differentiable terms of a micro-batch, at least those in ``needs``."""
        ...

    def anchor(self, batch: UpdateBatch, needs: frozenset[str]) -> Sequence[Anchor]:
        """Each row under the present weights, for later updates to compare with (no gradient)."""
        ...

    def save_samples(self, payload: Any) -> dict[str, Tensor]:
        """The payload of a group as tensors on the CPU, for ``training.stale`` and checkpoints."""
        ...

    def load_samples(self, request: RolloutRequest, tensors: Mapping[str, Tensor]) -> Any:
        """Inverse of ``save_samples``, of the group that was drawn for ``request``."""
        ...

    def behaviour(self) -> AbstractContextManager[None]:
        """Within it the weights are those that sample (differs from the policy off-policy only)."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the weights are the running average used for evaluation and export."""
        ...

    def after_update(self, step: int) -> None:
        """Move running averages, once after each trained step."""
        ...

    def auxiliary_state(self) -> dict[str, Tensor]:
        """Tensors beyond the trained parameters that a checkpoint must hold (averages, anchors)."""
        ...

    def load_auxiliary_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``auxiliary_state``."""
        ...

    def export(self, folder: Path, card: str) -> None:
        """Write weights that the upstream library loads unchanged, with a model card.

        Sharded parameters are gathered, so every process calls this, each with its own folder.
        """
        ...
