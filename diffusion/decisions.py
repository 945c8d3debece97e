"""What a likelihood must do: draw samples, keep what it needs of them, and score them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion.sampling import Velocity
from mmrl.noise import NoiseKey

OTHER_POLICIES = {
    "logp_ref": "reference",
    "velocity_gap_reference": "reference",
    "mean_gap_reference": "reference",
    "velocity_gap_ema": "ema",
    "implicit_positive": "ema",
    "implicit_negative": "ema",
    "mean_gap_teacher": "teacher",
}
"""Whose velocities a term compares with, at the same states; ``mean_gap_old`` has its own kept."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of one batch: clean ``latents`` [B, C, h, w], the record of each, ``logp`` [B, K].

    ``logp``: of the decisions under the policy that sampled, where sampling tells.
    """

    latents: Tensor
    records: Sequence[Any]
    logp: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """K decisions of B samples folded into one batch: row k B + b is decision k of sample b.

    ``states`` [R, C, h, w] and ``sigma`` [R]: where the network is asked.  ``keys``: of the B
    samples.  ``detail``: what the likelihood compares with.
    """

    states: Tensor
    sigma: Tensor
    keys: Sequence[NoiseKey]
    detail: Any

    @property
    def num_decisions(self) -> int:
        """K."""
        return len(self.sigma) // len(self.keys)

    def unfold(self, values: Tensor) -> Tensor:
        """[R, ...] as [B, K, ...]."""
        return values.unflatten(0, (self.num_decisions, len(self.keys))).transpose(0, 1)


class Decisions(Protocol):
    """One of the two likelihoods.  ``guided``: the policy is the network under guidance."""

    guided: bool
    num_decisions: int

    def draw(self, keys: Sequence[NoiseKey], velocity: Velocity, latents: Tensor) -> Drawn:
        """Samples that start from pure noise ``latents``."""
        ...

    def pack(self, records: Sequence[Any]) -> Any:
        """Payload of a group from the records of its samples."""
        ...

    def save(self, payload: Any) -> dict[str, Tensor]:
        """The payload of a group as tensors on the CPU."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> Any:
        """Inverse of ``save``."""
        ...

    def collate(self, rows: Sequence[tuple[Any, int, NoiseKey]], decisions: slice) -> Any:
        """Payload of a micro-batch: of each row the group's payload, the index in it, the key."""
        ...

    def fold(self, payload: Any, device: torch.device) -> Rows:
        """The network's inputs for a micro-batch."""
        ...

    def terms(
        self, rows: Rows, velocity: Tensor, others: Mapping[str, Tensor], needs: frozenset[str]
    ) -> dict[str, Tensor]:
        """Terms of ``mmrl.types.PolicyTerms`` by name, each [R]: ``logp`` and those in ``needs``.

        ``others``: velocities by policy (``OTHER_POLICIES``, and "old" where remembered).
        """
        ...


def fold(values: Tensor) -> Tensor:
    """[B, K, ...] as rows [K B, ...]."""
    return values.transpose(0, 1).flatten(0, 1)
