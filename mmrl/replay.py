"""Samples of a step asked again: as batches, and under the policy that sampled them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from mmrl import per_decision, reduction
from mmrl.backend import Backend
from mmrl.config import RunConfig
from mmrl.distributed import gather_items
from mmrl.needs import needs_of
from mmrl.replay_gaps import Gaps, clip_range, refuse_gaps
from mmrl.types import Advantages, Anchor, PolicyTerms, RolloutGroup, Tempering, UpdateBatch
from mmrl.windows import MicroBatch, Sample, Window

ANCHORED = frozenset({"logp", "mean_gap_old"})
"""Terms by which an objective compares the policy with the one that sampled."""

Anchors = dict[tuple[int, int], Anchor]
"""By the key of a micro-batch's row; empty: the ratio is 1."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Asks ``backend`` about the samples of this process again."""

    config: RunConfig
    accelerator: Accelerator
    backend: Backend

    @property
    def off_policy(self) -> bool:
        """Whether a part will compare with a policy that is not the present one."""
        config, training = self.config, self.config.training
        several = training.num_epochs * training.updates_per_epoch > 1
        needs = config.objective.module.needs(config.objective.config)
        parts = config.regularisers
        weighted = any(getattr(part.config, "ratio_weighted", False) for part in parts)
        weighted |= config.correction is not None
        other = several or self.backend.off_policy or training.stale is not None
        return (bool(needs & ANCHORED) or weighted) and other

    def trusts(self, group: RolloutGroup) -> bool:
        """Whether log-probabilities of the rollout are as good as those of a replay.

        In half precision they are not: batches of other shapes are rounded differently.
        """
        remembered = needs_of(self.config) & {"mean_gap_old", per_decision.TERM}
        return self._exact and group.logp_old is not None and not remembered

    @property
    def _exact(self) -> bool:
        """Whether a sample gives the same whatever stands beside it in a batch."""
        return self.config.backend.config.mixed_precision == "no"  # type: ignore[attr-defined]

    def needs(self, batch: UpdateBatch) -> frozenset[str]:
        """Terms that the loss reads of ``batch``."""
        unused = () if batch.tempering is not None else (per_decision.TERM,)
        return needs_of(self.config).difference(unused)

    def asked(
        self, windows: Sequence[Window], needs: frozenset[str]
    ) -> list[tuple[MicroBatch, PolicyTerms]]:
        """What the policy that sampled says of the samples of some windows, without gradient."""
        with torch.no_grad(), self.backend.behaviour():
            return [
                (rows, self.backend.evaluate(self.collate(rows), needs))
                for window in windows
                for rows in window.micro_batches
            ]

    def gaps(self, windows: Sequence[Window]) -> Gaps:
        """The largest change of each decision's log-probability when it is asked for again.

        Against the rollout wherever it recorded them, and against another replay where ratios do
        not start from the rollout's.  One number for all where samples differ in their decisions.
        ``UserError`` if it is too large to train.  Of stale samples, which other weights drew,
        nothing is expected.
        """
        decisions = self.config.backend.config.num_decisions  # type: ignore[attr-defined]
        unmeasured = torch.full((decisions or 1,), -torch.inf, dtype=torch.float64)
        gaps = {"rollout": unmeasured.clone(), "replay": unmeasured.clone()}
        needs = frozenset({"logp"})
        with self.backend.behaviour():
            for rows in (rows for window in windows for rows in window.micro_batches):
                batch, known = self.collate(rows), {}
                if all(sample.group.logp_old is not None for sample in rows.samples):
                    known["rollout"] = _of_rollout(rows).to(self.accelerator.device)
                if not all(self.trusts(sample.group) for sample in rows.samples):
                    with torch.no_grad():
                        known["replay"] = self.backend.evaluate(batch, needs).logp
                replayed = self.backend.evaluate(batch, needs).logp.detach()
                fresh = torch.tensor([not s.group.age for s in rows.samples])
                if not fresh.any():
                    continue
                looked_at = batch.mask & fresh[:, None].to(batch.mask.device)
                for other, logp in known.items():
                    gap = (replayed - logp).double().masked_fill(~looked_at, 0.0).abs()
                    gap = gap.amax() if decisions is None else gap.amax(0)
                    # Every maximum here keeps a NaN.
                    so_far = gaps[other][rows.decisions]
                    gaps[other][rows.decisions] = torch.maximum(so_far, gap.cpu())
        everywhere = gather_items(self.accelerator, [torch.stack([*gaps.values()])])
        largest = torch.stack(everywhere).amax(0)
        measured = {
            other: None if bool((gap == -torch.inf).all()) else gap.tolist()
            for other, gap in zip(gaps, largest, strict=True)
        }
        found = Gaps(**measured)
        precision = self.config.backend.config.mixed_precision  # type: ignore[attr-defined]
        refuse_gaps(found, precision, clip_range(self.config) if self.off_policy else None)
        return found

    def anchors(
        self, plans: Sequence[Sequence[Window]], group: RolloutGroup, tempering: Tempering | None
    ) -> list[Anchors]:
        """For the windows of each epoch what the policy that sampled says of their rows.

        In half precision each epoch is asked about in its own batches, so that only a change of the
        weights changes a ratio.  Empty where nothing has to be asked: ``group`` is one of the step.
        """
        if not self.off_policy or self.trusts(group):
            return [{} for _ in plans]
        first = self.anchor(plans[0], tempering)
        shuffled = self.config.training.updates_per_epoch > 1
        if self._exact or not shuffled:
            return [first for _ in plans]
        return [first, *(self.anchor(windows, tempering) for windows in plans[1:])]

    def anchor(self, windows: Sequence[Window], tempering: Tempering | None) -> Anchors:
        """Every row of the step under the policy that sampled.

        Stale rows are in the batch, so that fresh ones are rounded as they will be in the update,
        but keep what was stored when they were fresh.
        """
        anchors: Anchors = {}
        with torch.no_grad(), self.backend.behaviour():
            for rows in (rows for window in windows for rows in window.micro_batches):
                batch = self.collate(rows, tempering=tempering)
                found = self.backend.anchor(batch, self.needs(batch))
                weights = rows.weights.tolist()
                for key, sample, anchor, weight in zip(
                    rows.keys, rows.samples, found, weights, strict=True
                ):
                    if sample.group.age:
                        stored = _recorded(sample)[rows.decisions]
                        anchor = Anchor(logp=stored.to(anchor.logp.device))
                    # A row that only fills a batch up may be asked about elsewhere in earnest.
                    if weight or key not in anchors:
                        anchors[key] = anchor
        return anchors

    def collate(
        self,
        rows: MicroBatch,
        advantages: Advantages | None = None,
        anchors: Anchors | None = None,
        tempering: Tempering | None = None,
        progress: float = 0.0,
    ) -> UpdateBatch:
        """The batch of some rows.  Only with ``anchors`` it knows the policy that sampled."""
        places = [sample.position for sample in rows.samples]
        pairs = [(s.group, s.index) for s in rows.samples]
        payload, mask = self.backend.collate(pairs, rows.decisions)
        device = self.accelerator.device
        values = torch.zeros(len(pairs), dtype=torch.float64)
        logp_old, memory = None, None
        if advantages is not None:
            values, tempering = advantages.values[places], advantages.tempering
        if anchors is not None:
            if anchors:
                # Padding may have met no anchor pass; its loss has weight 0 whatever stands here.
                filler = next(
                    x for (_, start), x in anchors.items() if start == rows.decisions.start
                )
                found = [anchors.get(key, filler) for key in rows.keys]
                # Longer or shorter ones may have stood beside them than in this batch.
                logps = [anchor.logp for anchor in found]
                logp_old = reduction.side_by_side(logps, mask.shape[1])
                memory = [anchor.memory for anchor in found]
            elif self.off_policy:
                logp_old = _of_rollout(rows).to(device)
        return UpdateBatch(
            payload=payload,
            mask=mask.to(device),
            advantages=values.to(device),
            weights=rows.weights.to(device),
            logp_old=logp_old,
            memory=memory,
            tasks=[sample.group.request.prompt.task for sample in rows.samples],
            progress=progress,
            tempering=per_decision.of_samples(tempering, places, device),
        )


def _of_rollout(rows: MicroBatch) -> torch.Tensor:
    """[B, K] log-probabilities that the rollout recorded, or that a stale group was kept with."""
    known = [_recorded(sample) for sample in rows.samples]
    return reduction.side_by_side(known)[:, rows.decisions]


def _recorded(sample: Sample) -> torch.Tensor:
    """[K] of all decisions of a sample."""
    assert sample.group.logp_old is not None, "only asked where somebody recorded them"
    return sample.group.logp_old[sample.index]
