"""Which samples share an optimizer step and a forward, dealt the same by every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from mmrl import reduction
from mmrl.preflight import MicroBatchShape
from mmrl.types import RolloutGroup

NOTHING: Mapping[int, torch.Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Sample:
    """A trained sample of this process: where it is, and its place among all samples of the step.

    ``weight``: how often it counts; 0 marks work done only to keep the processes in step.  ``kept``
    [K] bool: which of its decisions are trained, ``None``: those of its group's mask.
    """

    group: RolloutGroup
    index: int
    position: int
    weight: float = 1.0
    kept: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """[K] bool: the decisions that are trained."""
        mask = self.group.mask[self.index]
        return mask if self.kept is None else mask & self.kept


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward see: some decisions of some samples."""

    samples: list[Sample]
    decisions: slice

    @property
    def keys(self) -> list[tuple[int, int]]:
        """Of each row, its sample's position in the step and its first decision."""
        return [(sample.position, self.decisions.start) for sample in self.samples]

    @property
    def whole_mask(self) -> torch.Tensor:
        """[B, K] with all trained decisions of the samples, K those of the longest."""
        return reduction.side_by_side([sample.mask for sample in self.samples])

    @property
    def drawn(self) -> torch.Tensor:
        """[B, K] with the decisions of the batch that exist, trained or not."""
        rows = [sample.group.drawn[sample.index] for sample in self.samples]
        return reduction.side_by_side(rows)[:, self.decisions]

    @property
    def weights(self) -> torch.Tensor:
        """[B] float64."""
        return torch.tensor([s.weight for s in self.samples], dtype=torch.float64)


@dataclass(frozen=True)
class Window:
    """What one optimizer step consumes on this process: equally many micro-batches on each."""

    micro_batches: list[MicroBatch]


def plan_windows(
    groups: Sequence[RolloutGroup],
    owners: Sequence[int],
    group_of: torch.Tensor,
    order: Sequence[int],
    *,
    num_windows: int,
    shape: MicroBatchShape,
    rank: int,
    world: int,
    whole_groups: bool = False,
    counts: torch.Tensor | None = None,
    kept: Mapping[int, torch.Tensor] = NOTHING,
) -> list[Window]:
    """Deal samples ``order`` (positions among all samples of the step) into optimizer steps.

    ``groups`` are those of this process; a sample belongs to the process that owns its group, by
    ``owners``.  ``counts`` [N]: how often each counts; ``None``: once.  ``kept``: of this process's
    samples by position, the decisions that are trained, where not all of them are.
    Which samples share an optimizer step depends on ``order`` alone; with ``whole_groups`` those of
    one group do.  Every process gets equally many micro-batches in a window; a short one repeats
    work with weight 0.
    """
    first = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(group_of).cumsum(0)])
    mine = {group.request.index: group for group in groups}
    filler = Sample(groups[0], 0, int(first[groups[0].request.index]), weight=0.0)
    windows = []
    for chunk in _chunks(order, group_of, num_windows, whole_groups):
        by_rank: list[list[int]] = [[] for _ in range(world)]
        for position in chunk:
            by_rank[owners[int(group_of[position])]].append(position)
        count = max(1, *(-(-len(positions) // shape.samples) for positions in by_rank))
        samples = []
        for position in by_rank[rank]:
            index = int(group_of[position])
            weight = 1.0 if counts is None else float(counts[position])
            place = position - int(first[index])
            samples.append(Sample(mine[index], place, position, weight, kept.get(position)))
        rows = [samples[i : i + shape.samples] for i in range(0, len(samples), shape.samples)]
        rows += [[filler]] * (count - len(rows))
        windows.append(
            Window([MicroBatch(r, decisions) for r in rows for decisions in shape.decisions])
        )
    return windows


def _chunks(
    order: Sequence[int], group_of: torch.Tensor, count: int, whole_groups: bool
) -> list[list[int]]:
    """``order`` in at most ``count`` parts of about one size, none of them empty."""
    units = [[position] for position in order]
    if whole_groups:
        by_group: dict[int, list[int]] = {}
        for position in order:
            by_group.setdefault(int(group_of[position]), []).append(position)
        units = list(by_group.values())
    parts = torch.tensor_split(torch.arange(len(units)), count)
    return [[i for unit in part.tolist() for i in units[unit]] for part in parts if len(part)]
