"""Replay of stale rollouts: groups of the last steps, trained again beside those of the step.

A group is kept as it was when it was fresh: its samples, their log-probabilities under the policy
that drew them, and its advantages.  Nothing of it is asked again, so the ratio of a kept sample is
that of the present policy to the one that drew it, however long ago.

The advantages stay for three reasons.  They compare samples of one policy, the one the ratio starts
from; those of estimators that look at the whole step, or at quantiles of the run, would mix
policies; and an estimator with a state would learn from the same rewards twice.

Every process knows which groups are kept, and draws the same ones; the samples stay where they were
drawn.  All of it is in the checkpoint: ``stale.json``, and ``stale-R.safetensors`` of process R.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmrl.backend import Backend
from mmrl.config import RunConfig, StaleConfig
from mmrl.distributed import agree_or_raise, owner
from mmrl.divergences import clamp_log_ratio, raw_log_ratio
from mmrl.errors import UserError
from mmrl.loss_parts import Signals
from mmrl.metrics import Means
from mmrl.noise import generator
from mmrl.reduction import tallies
from mmrl.replay import Anchors
from mmrl.rollouts import Trainable
from mmrl.types import (
    Advantages,
    Metric,
    PolicyTerms,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Scores,
    UpdateBatch,
)
from mmrl.windows import MicroBatch

RECORD = "stale.json"
PAYLOAD = "payload."
"""Before the names of a backend's own tensors."""
NUMBERS = ("group_size", "seed", "stream", "index", "first_sample")
"""Fields of a request beside its prompt; ``stream`` is the step."""


class Update(NamedTuple):
    """What the optimizer steps of one step train on."""

    rolled: Trainable
    scores: Scores
    advantages: Advantages
    signals: Signals


@dataclass(frozen=True, kw_only=True)
class Own:
    """What only the owner of a group has: its ``request``, as it was, and its samples.

    ``tensors``: ``mask`` [G, K] bool and ``logp_old`` [G, K] as it came from the backend, and the
    backend's own by ``PAYLOAD``; on the CPU.
    """

    request: RolloutRequest
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A group of an earlier ``step``, as every process knows it.

    ``owner``: the process that has ``own``.  ``rewards`` and ``values`` [G] float64, ``keep`` [G]
    bool and ``signals`` [G] float64 of each part: as they were in its step.
    """

    step: int
    owner: int
    rewards: Tensor
    values: Tensor
    keep: Tensor
    signals: Signals
    own: Own | None


@dataclass(kw_only=True)
class Stale:
    """The groups that are ``kept``, oldest first, and what a step does with them."""

    config: RunConfig
    accelerator: Accelerator
    backend: Backend
    prompts: Sequence[Prompt]
    kept: list[Kept] = field(default_factory=list)

    @property
    def _section(self) -> StaleConfig:
        assert self.config.training.stale is not None, "only made where it is set"
        return self.config.training.stale

    def joined(self, fresh: Update, step: int, means: Means) -> Update:
        """``fresh`` and the groups drawn for ``step``, numbered on behind it.

        Metrics: ``stale/share`` of the trained samples, and their mean ``stale/age`` in steps.
        """
        self.kept = [k for k in self.kept if step - k.step <= self._section.steps]
        chosen = drawn(self.kept, self._section.groups, self.config.seed, step)
        first = len(fresh.rolled.owners)
        found = [self._group(k, number, step) for number, k in enumerate(chosen, first)]
        owners = [*fresh.rolled.owners, *(k.owner for k in chosen)]
        groups = [*fresh.rolled.groups, *(group for group in found if group is not None)]
        keep = _joined(fresh.advantages.keep, [k.keep for k in chosen])
        count = sum(float(k.keep.sum()) for k in chosen)
        ages = sum(float(k.keep.sum()) * (step - k.step) for k in chosen)
        means.add({"stale/share": (count, float(keep.sum())), "stale/age": (ages, count)})
        values = _joined(fresh.advantages.values, [k.values for k in chosen])
        return Update(
            rolled=replace(fresh.rolled, groups=groups, owners=owners),
            scores=_scores(fresh.scores, chosen, first),
            advantages=replace(fresh.advantages, values=values, keep=keep),
            signals={
                key: {n: _joined(x, [k.signals[key][n] for k in chosen]) for n, x in named.items()}
                for key, named in fresh.signals.items()
            },
        )

    def _group(self, kept: Kept, number: int, step: int) -> RolloutGroup | None:
        """The group as number ``number`` of ``step``, where its samples are."""
        if kept.own is None:
            return None
        request, tensors = kept.own.request, kept.own.tensors
        payload = {k[len(PAYLOAD) :]: x for k, x in tensors.items() if k.startswith(PAYLOAD)}
        return RolloutGroup(
            # Of a request only the number is new: noise follows from all the rest.
            request=replace(request, index=number),
            outputs=[None] * request.group_size,  # rewarded long ago
            payload=self.backend.load_samples(request, payload),
            mask=tensors["mask"],
            logp_old=tensors["logp_old"],
            age=step - kept.step,
        )

    def add(self, fresh: Update, step: int, anchors: Anchors) -> None:
        """Keep the groups of a step; not those of which nothing is trained.

        ``anchors``: those of its update; empty where the rollout's log-probabilities are trusted.
        """
        rank, owners = self.accelerator.process_index, fresh.rolled.owners
        mine = {g.request.index: g for g in fresh.rolled.groups if owners[g.request.index] == rank}
        for number, holder in enumerate(owners):
            places = (fresh.scores.group == number).nonzero()[:, 0]
            keep = fresh.advantages.keep[places]
            if not bool(keep.any()):
                continue
            own = None
            if holder == rank:
                own = self._own(mine[number], places.tolist(), anchors)
            kept = Kept(
                step=step,
                owner=holder,
                rewards=fresh.scores.combined[places],
                values=fresh.advantages.values[places],
                keep=keep,
                signals={
                    key: {name: value[places] for name, value in named.items()}
                    for key, named in fresh.signals.items()
                },
                own=own,
            )
            self.kept.append(kept)

    def _own(self, group: RolloutGroup, places: list[int], anchors: Anchors) -> Own:
        payload = self.backend.save_samples(group.payload)
        tensors = {
            "mask": group.mask,
            "logp_old": _anchored(group, places, anchors) if anchors else group.logp_old,
            **{f"{PAYLOAD}{name}": value for name, value in payload.items()},
        }
        # Copies: safetensors writes no memory twice, and a view would keep all that it is part of.
        found = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
        return Own(request=group.request, tensors=found)

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Write this process's samples, and the main process what all know of the groups."""
        rank = self.accelerator.process_index
        mine = {i: kept.own for i, kept in enumerate(self.kept) if kept.own is not None}
        requests = {str(i): _request_record(own.request) for i, own in mine.items()}
        tensors = {f"{i}/{name}": x for i, own in mine.items() for name, x in own.tensors.items()}
        path = folder / f"stale-{rank}.safetensors"
        save_file(tensors, path, metadata={"requests": json.dumps(requests)})
        if self.accelerator.is_main_process:
            record = {
                "processes": self.accelerator.num_processes,
                "groups": [_record(kept) for kept in self.kept],
            }
            (folder / RECORD).write_text(json.dumps(record))

    def load(self, folder: Path) -> None:
        """Inverse of ``save``, of a verified checkpoint.

        With another number of processes the groups are dealt anew.  ``UserError`` where the prompt
        of a group is no longer there.
        """
        record = json.loads((folder / RECORD).read_text())
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        owners: list[int] = [data["owner"] for data in record["groups"]]
        if record["processes"] != world:
            owners = [owner(i, world) for i in range(len(owners))]
        wanted = {i for i, holder in enumerate(owners) if holder == rank}
        mine: dict[int, Own] = {}
        error: Exception | None = None
        try:
            for file in range(record["processes"]):
                mine |= self._read(folder / f"stale-{file}.safetensors", wanted)
        except UserError as refusal:
            error = refusal
        agree_or_raise(self.accelerator, error)
        self.kept = [
            _kept(data, holder, mine.get(i))
            for i, (data, holder) in enumerate(zip(record["groups"], owners, strict=True))
        ]

    def _read(self, path: Path, wanted: set[int]) -> dict[int, Own]:
        """Of the groups in a file those that are ``wanted``, by their number."""
        prompts = {prompt.id: prompt for prompt in self.prompts}
        tensors: dict[int, dict[str, Tensor]] = {}
        with safe_open(path, "pt") as file:
            requests = json.loads(file.metadata()["requests"])
            for key in file.keys():
                number, _, name = key.partition("/")
                if int(number) in wanted:
                    tensors.setdefault(int(number), {})[name] = file.get_tensor(key)
        found = {}
        for i, named in tensors.items():
            data: dict[str, Any] = requests[str(i)]
            prompt = prompts.get(data["prompt"])
            if prompt is None:
                raise UserError(
                    f"prompts.source: the prompt {data['text']!r:.80} of a group that "
                    f"training.stale kept is not among them any more, so {path.parent} cannot be "
                    "resumed; put it back"
                )
            request = RolloutRequest(prompt=prompt, **{name: data[name] for name in NUMBERS})
            found[i] = Own(request=request, tensors=named)
        return found


def drawn(kept: Sequence[Kept], count: int, seed: int, step: int) -> list[Kept]:
    """``count`` of the groups, or all where there are fewer, oldest first.

    Each is as likely as any other, without repetition; ``seed`` and ``step`` decide.
    """
    order = torch.randperm(len(kept), generator=generator(seed, step, "stale"))
    return [kept[i] for i in sorted(order[:count].tolist())]


def spread(terms: PolicyTerms, batch: UpdateBatch, rows: MicroBatch) -> dict[str, Metric]:
    """Means of (r - 1)^2 over decisions: ``stale/ratio_variance``, ``stale/ratio_variance_fresh``.

    r: the ratio to the policy that sampled.
    """
    old = torch.tensor([s.group.age > 0 for s in rows.samples], device=batch.mask.device)[:, None]
    with torch.no_grad():
        square = (clamp_log_ratio(raw_log_ratio(terms, batch)).exp() - 1.0).square()
    return {
        **tallies({"stale/ratio_variance": square}, batch.mask & old, batch.weights),
        **tallies({"stale/ratio_variance_fresh": square}, batch.mask & ~old, batch.weights),
    }


def _anchored(group: RolloutGroup, places: list[int], anchors: Anchors) -> Tensor:
    """[G, K] from the anchors of its samples; 0 of those that are not trained, which have none."""
    width = group.mask.shape[1]
    found: dict[int, list[tuple[int, Tensor]]] = {place: [] for place in places}
    for (place, start), anchor in anchors.items():
        if place in found:
            found[place].append((start, anchor.logp))
    # A row has been as wide as the longest that stood beside it.
    rows = [
        torch.cat([x for _, x in sorted(parts, key=lambda part: part[0])])[:width]
        if parts
        else None
        for parts in found.values()
    ]
    empty = next(row for row in rows if row is not None).new_zeros(width)
    return torch.stack([empty if row is None else row for row in rows])


def _joined(fresh: Tensor, kept: Sequence[Tensor]) -> Tensor:
    return torch.cat([fresh, *kept])


def _scores(fresh: Scores, chosen: Sequence[Kept], first: int) -> Scores:
    """What an update reads of the scores: groups and rewards, not their names nor facts."""
    sizes = torch.tensor([len(k.keep) for k in chosen], dtype=torch.int64)
    numbers = torch.repeat_interleave(torch.arange(first, first + len(chosen)), sizes)
    return Scores(
        combined=_joined(fresh.combined, [k.rewards for k in chosen]),
        group=torch.cat([fresh.group, numbers]),
        valid=_joined(fresh.valid, [k.keep for k in chosen]),
    )


# Records in JSON, which keeps every finite float64


def _request_record(request: RolloutRequest) -> dict[str, Any]:
    numbers = {name: getattr(request, name) for name in NUMBERS}
    return {"prompt": request.prompt.id, "text": request.prompt.text, **numbers}


def _record(kept: Kept) -> dict[str, Any]:
    return {
        "step": kept.step,
        "owner": kept.owner,
        "rewards": kept.rewards.tolist(),
        "values": kept.values.tolist(),
        "keep": kept.keep.tolist(),
        "signals": {
            key: {name: value.tolist() for name, value in named.items()}
            for key, named in kept.signals.items()
        },
    }


def _kept(data: Mapping[str, Any], holder: int, own: Own | None) -> Kept:
    return Kept(
        step=data["step"],
        owner=holder,
        rewards=torch.tensor(data["rewards"], dtype=torch.float64),
        values=torch.tensor(data["values"], dtype=torch.float64),
        keep=torch.tensor(data["keep"], dtype=torch.bool),
        signals={
            key: {name: torch.tensor(x, dtype=torch.float64) for name, x in named.items()}
            for key, named in data["signals"].items()
        },
        own=own,
    )
