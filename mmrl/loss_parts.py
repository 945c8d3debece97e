"""What an objective or a regulariser may ask for beside its terms; every such function is optional.

    signals(scores, advantages, config)     numbers for each sample of a step, [N] float64 by name
    survey(config)                          whose sample log-ratios ``couple`` reads: "old",
                                            "reference", or none
    couple(survey, config)                  numbers for each sample of an optimizer step, [W]
    initial_state(config)                   what it keeps between optimizer steps, JSON-able
    update_state(state, metrics, config)    the same after one, from the means it logged itself

An objective with ``WHOLE_GROUPS = True`` has the samples of a group in one optimizer step, and one
whose ``needs_whole_samples(config)`` is true all decisions of a sample in one micro-batch.

A part with ``TAKES_STALE = True`` may be given the samples of earlier policies that
``training.stale`` keeps: an objective weighs them by their ratio, a regulariser reads a closed form
or weighs its estimate.  One with ``TAKES_DEMONSTRATIONS = True`` is right about completions that no
policy sampled; see ``mmrl.demonstrations``.

``signals`` and ``couple`` see all processes and answer the same on each; ``loss`` finds both in
``batch.signals``.  A loss that couples samples is written with the numbers of ``couple`` as
constant coefficients of its own decisions, so it needs neither whole groups in a micro-batch nor
samples in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmrl.config import Part, RunConfig
from mmrl.divergences import raw_log_ratio
from mmrl.errors import require
from mmrl.needs import asks_survey
from mmrl.reduction import where_active
from mmrl.types import Advantages, PolicyTerms, Scores, Survey, UpdateBatch
from mmrl.windows import MicroBatch, Window

Signals = Mapping[str, Mapping[str, Tensor]]
"""By the key of a part, then by name: [N] float64, a number for each sample of the step."""


def loss_parts(config: RunConfig) -> dict[str, Part]:
    """Parts of a run's loss by the key under which they stand in YAML; none of weight 0."""
    parts = {"objective": config.objective}
    for i, part in enumerate(config.regularisers):
        if part.config.coef:  # type: ignore[attr-defined]
            parts[f"regularisers[{i}]"] = part
    return parts


def step_signals(
    parts: Mapping[str, Part], scores: Scores, advantages: Advantages
) -> dict[str, dict[str, Tensor]]:
    """Signals of every part; ``ValueError`` for one that is not [N] float64 or not finite."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, part in parts.items():
        ask = getattr(part.module, "signals", None)
        found[key] = dict(ask(scores, advantages, part.config)) if ask else {}
        for name, value in found[key].items():
            _checked(value, len(scores.combined), f"{key}: signal {name!r}")
    return found


def sample_sums(
    window: Window,
    names: Sequence[str],
    evaluate: Callable[[MicroBatch], tuple[PolicyTerms, UpdateBatch]],
    size: int,
) -> Tensor:
    """[1 + R, size] float64 of this process's samples: decisions, and log-ratios by ``names``.

    ``evaluate`` is asked for ``logp``, and for ``logp_ref`` with the name "reference"; it is not
    called without names.  0 at samples of other processes.
    """
    sums = torch.zeros(1 + len(names), size, dtype=torch.float64)
    for rows in window.micro_batches:
        places = torch.tensor([sample.position for sample in rows.samples])
        real = (rows.weights > 0).double()  # a sample counts once here, whatever its weight
        if rows.decisions.start == 0:
            # All that a loss sees, whatever a selection leaves of them in the sum.
            counts = torch.tensor([int(s.group.mask[s.index].sum()) for s in rows.samples])
            sums[0].index_add_(0, places, counts * real)
        if names:
            terms, batch = evaluate(rows)
            for i, name in enumerate(names, 1):
                gaps = _log_ratio(terms, batch, name).detach().double().sum(1).cpu()
                sums[i].index_add_(0, places, gaps * real)
    return sums


def survey_of(
    sums: Tensor, names: Sequence[str], asked: frozenset[str], group: Tensor
) -> tuple[Survey, Tensor]:
    """The survey in ``sample_sums`` over all processes, and the places [W] of its samples.

    A log-ratio that is ``asked`` for but not among ``names`` is 0.
    """
    places = sums[0].nonzero().flatten()
    zero = torch.zeros(len(places), dtype=torch.float64)
    found = {name: sums[i, places] for i, name in enumerate(names, 1)}
    ratios = {name: zero for name in asked} | found
    return Survey(group=group[places], length=sums[0, places], log_ratio=ratios), places


def coupled(
    parts: Mapping[str, Part], signals: Signals, survey: Survey, places: Tensor, size: int
) -> dict[str, dict[str, Tensor]]:
    """``signals`` and what ``couple`` of each part adds, 0 at samples that are not surveyed.

    ``places`` [W] int64: positions of the surveyed samples among all ``size`` of the step.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, part in parts.items():
        found[key] = dict(signals[key])
        if not asks_survey(part):
            continue
        own = {name: value[places] for name, value in signals[key].items()}
        answer = part.module.couple(replace(survey, signals=own), part.config)
        for name, value in answer.items():
            _checked(value, len(places), f"{key}: {name!r} of couple")
            everywhere = torch.zeros(size, dtype=torch.float64)
            found[key][name] = everywhere.index_copy(0, places, value)
    return found


# What a part keeps between optimizer steps


States = Mapping[str, Mapping[str, Any]]
"""By the key of a part: what it keeps; parts that keep nothing are absent."""


def initial_states(parts: Mapping[str, Part], known: States) -> dict[str, dict[str, Any]]:
    """The state of each part that has one: as ``known``, else its first."""
    return {
        key: dict(known.get(key) or part.module.initial_state(part.config))
        for key, part in parts.items()
        if hasattr(part.module, "initial_state")
    }


def updated_states(
    parts: Mapping[str, Part], states: States, metrics: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """States after an optimizer step; ``metrics``: what each part logged in it, over processes."""
    return {
        key: parts[key].module.update_state(dict(state), metrics[key], parts[key].config)
        for key, state in states.items()
    }


def view(
    batch: UpdateBatch, key: str, places: Sequence[int], signals: Signals, states: States
) -> UpdateBatch:
    """``batch`` as the part of that key reads it; ``places``: its rows among all samples."""
    own = signals.get(key, {})
    if not own and key not in states:
        return batch
    device = batch.advantages.device
    values = {name: value[list(places)].to(device) for name, value in own.items()}
    return replace(batch, signals=values, state=states.get(key, {}))


def _log_ratio(terms: PolicyTerms, batch: UpdateBatch, name: str) -> Tensor:
    if name == "old":
        return raw_log_ratio(terms, batch)
    return where_active(terms.logp - terms.need("logp_ref"), batch.mask)


def _checked(value: Tensor, size: int, what: str) -> None:
    require(value.shape == (size,), f"{what} is {tuple(value.shape)}, not ({size},)")
    require(value.dtype == torch.float64, f"{what} is {value.dtype}, not float64")
    require(bool(value.isfinite().all()), f"{what} is not finite")
