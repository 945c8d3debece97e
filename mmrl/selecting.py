"""Which decisions of the selected samples are trained: those with the largest keys of a whole step.

A part of ``selection`` gives each decision a key.  The threshold is one for all processes; which
decisions reach it is known where their samples are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor

from mmrl.config import Part
from mmrl.distributed import gather_items
from mmrl.types import Metric, Moment, PolicyTerms
from mmrl.windows import MicroBatch

Kept = dict[int, Tensor]
"""By a sample's position in the step, [K] bool."""
Keys = dict[int, Tensor]
"""By a sample's position in the step, [K] float32; -inf at decisions that are not trained."""


def decision_share(part: Part, moment: Moment) -> float:
    """Share of the decisions that ``part`` keeps; 1 of one that looks at samples alone."""
    found = getattr(part.module, "decision_share", None)
    return 1.0 if found is None else found(moment, part.config)


def keys_of(part: Part, asked: Iterable[tuple[MicroBatch, PolicyTerms]], values: Tensor) -> Keys:
    """Keys of all decisions of this process's samples, whose advantages are ``values`` [N]."""
    found: dict[int, list[Tensor]] = {}
    for rows, terms in asked:
        mine = values[[sample.position for sample in rows.samples]].to(terms.logp.device)
        keys = part.module.decision_keys(mine, terms, part.config).float().cpu()
        for sample, row in zip(rows.samples, keys, strict=True):
            if sample.weight > 0:
                mask = sample.group.mask[sample.index][rows.decisions]
                row = row[: len(mask)].masked_fill(~mask, -torch.inf)
                found.setdefault(sample.position, []).append(row)
    return {position: torch.cat(parts) for position, parts in found.items()}


def largest(accelerator: Accelerator, keys: Keys, kept: Kept, share: float) -> Kept:
    """Of the decisions ``kept`` so far, the ``share`` of all processes with the largest keys.

    Equal keys stay or go together, so that it may be more.
    """
    left = {
        i: row.masked_fill(~kept[i], -torch.inf) if i in kept else row for i, row in keys.items()
    }
    mine = torch.cat([torch.empty(0), *left.values()])
    everything = torch.cat(gather_items(accelerator, [mine[mine > -torch.inf]]))
    if not len(everything):
        return kept
    count = max(1, math.ceil(share * len(everything)))
    threshold = everything.kthvalue(len(everything) - count + 1).values
    return {i: row >= threshold for i, row in left.items()}


def metrics(keys: Keys, kept: Kept) -> dict[str, Metric]:
    """``selection/decisions``: share of the decisions of the selected samples that is trained."""
    total = sum(float((row > -torch.inf).sum()) for row in keys.values())
    left = sum(float(kept[i].sum()) for i in keys if i in kept)
    return {"selection/decisions": (left, total)}
