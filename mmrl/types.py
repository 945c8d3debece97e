"""The records that flow between samplers, backends, rewards, estimators and objectives.

Shape letters: N samples in a step, B samples in a micro-batch, G samples in a group, K decisions of
a sample.  A decision is one thing the policy chose and can be asked about again: a token, a
denoising transition, or a noise level drawn for a clean sample.  Records are frozen and keyword
only; their constructors check ranks, shapes and dtypes, so a mistake surfaces where it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats by their names in YAML."""

TASK = "task"
"""Column in which prompts of several tasks say which is theirs."""


class Least(float):
    """A metric of which the least is logged."""


class Greatest(float):
    """A metric of which the greatest is logged."""


class Total(float):
    """A metric of which the sum is logged."""


Metric = tuple[float, float] | Least | Greatest | Total
"""What parts report to be logged; a pair is (sum, count), of which the mean is logged."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One conditioning input.

    ``id`` is derived from the content, so it survives reordering of the file.  ``columns`` holds
    every other column of the data set; rewards receive them under their own names.  ``messages``:
    where the prompt is a conversation, its messages with ``role`` and ``content``; ``text`` is then
    that of the user's last one.  ``where``: the configuration key, file and row it was read from,
    for messages alone, "" for one that was typed in.
    """

    id: str
    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()
    where: str = field(default="", compare=False)

    @property
    def named(self) -> str:
        """How a message names it: where it stands, and how it begins."""
        place = f"{self.where}: " if self.where else ""
        return f"{place}prompt {self.text!r:.60}"

    @property
    def task(self) -> str:
        """What its column ``task`` says, "" without one."""
        return str(self.columns.get(TASK, ""))


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """An order for one group: draw ``group_size`` samples for ``prompt``.

    ``seed`` and ``stream`` (the step number, or a negative number for evaluation) together with the
    prompt id and the sample index determine all noise, whatever process or micro-batch draws it.
    ``index`` is the position of the group among all groups of the step, over all processes.
    ``first_sample``: the number of its first sample, above 0 where earlier groups of the step have
    the same prompt, so that no two samples share their noise.  ``moment``: where in a run it is
    made, or ``None`` outside of one; rewards may read it, no sample depends on it.
    """

    prompt: Prompt
    group_size: int
    seed: int
    stream: int
    index: int
    first_sample: int = 0
    moment: Moment | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """G samples for one prompt.

    ``outputs``: what a reward reads (PIL images or strings), length G.  ``payload``: what the
    backend needs to evaluate the samples again; opaque to everybody else.  ``logp_old`` [G, K]:
    log-probabilities under the sampling policy where the sampler knows them, else ``None``.
    ``mask`` [G, K] bool: decisions that exist and are trained.  ``everything`` [G, K] bool: those
    that exist, or ``None`` where all are trained.  ``truncated`` [G] bool: samples that were cut
    off before they ended, or ``None`` where none was.  ``tokens``: ids of each sample without
    padding, its end included, or ``None`` where samples have none.  ``metrics``: what is logged of
    them.
    ``age``: steps since it was drawn.  Above 0 ``logp_old`` is what its samples are compared with,
    and nobody may ask for it again.
    """

    request: RolloutRequest
    outputs: Sequence[Any]
    payload: Any
    mask: Tensor
    logp_old: Tensor | None = None
    everything: Tensor | None = None
    truncated: Tensor | None = None
    tokens: Sequence[Sequence[int]] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    age: int = 0

    @property
    def drawn(self) -> Tensor:
        """[G, K] bool: decisions that exist, whether they are trained or not."""
        return self.mask if self.everything is None else self.everything

    def __post_init__(self) -> None:
        size = self.request.group_size
        require(len(self.outputs) == size, f"{len(self.outputs)} outputs for {size} samples")
        _check(self.mask, "mask", 2, torch.bool)
        require(self.mask.shape[0] == size, f"mask has {self.mask.shape[0]} rows, not {size}")
        if self.logp_old is not None:
            _check(self.logp_old, "logp_old", 2, torch.float32, torch.float64)
            require(self.logp_old.shape == self.mask.shape, "logp_old and mask differ in shape")
        if self.everything is not None:
            _check(self.everything, "everything", 2, torch.bool)
            require(self.everything.shape == self.mask.shape, "everything and mask differ in shape")
        require(not self.age or self.logp_old is not None, "a stale group has no logp_old")
        if self.truncated is not None:
            _check(self.truncated, "truncated", 1, torch.bool)
            require(len(self.truncated) == size, f"truncated has {len(self.truncated)} values")
        if self.tokens is not None:
            require(len(self.tokens) == size, f"tokens of {len(self.tokens)} samples, not {size}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a prompt sampler may learn from one group.

    ``combined`` [G] float64, ``valid`` [G] bool and ``by_name`` as in ``Scores``.  ``measure``: the
    number that the sampler's own ``measure`` gave the group.
    """

    prompt_id: str
    combined: Tensor
    valid: Tensor
    by_name: Mapping[str, Tensor]
    measure: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards of all samples of a step, gathered over processes, in group order.

    ``combined`` [N] float64: weighted sum, 0 where invalid.  ``by_name``: raw values [N] float64 of
    each reward, NaN where it did not apply or failed.  ``group`` [N] int64: index of the group of
    each sample.  ``valid`` [N] bool: samples that carry a usable reward.  ``task``: that of the
    prompt of each sample, length N; empty: all are of one.

    Facts, each there only where a part ``reads`` it: ``length`` [N] int64: decisions that exist.
    ``truncated`` [N] bool: cut off before its end.  ``answer``: of each sample its final answer in
    one spelling, ``None`` where it has none, length N.  ``features`` [N, D] float64: a point that
    says what the sample is like.  ``score_norm`` [N] float64: squared norm of the gradient of its
    log-probability, summed over its decisions.
    """

    combined: Tensor
    group: Tensor
    valid: Tensor
    by_name: Mapping[str, Tensor] = field(default_factory=dict)
    task: Sequence[str] = ()
    length: Tensor | None = None
    truncated: Tensor | None = None
    answer: Sequence[str | None] | None = None
    features: Tensor | None = None
    score_norm: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self.combined, "combined", 1, torch.float64)
        _check(self.group, "group", 1, torch.int64)
        _check(self.valid, "valid", 1, torch.bool)
        for name, value in {"group": self.group, "valid": self.valid, **self.by_name}.items():
            require(value.shape == self.combined.shape, f"{name} and combined differ in shape")
        size = len(self.combined)
        require(len(self.task) in (0, size), f"{len(self.task)} tasks for {size} samples")
        require(
            bool(torch.isfinite(self.combined[self.valid]).all()), "a valid reward is not finite"
        )
        for name in FACTS:
            value = getattr(self, name)
            if value is not None:
                require(len(value) == size, f"{len(value)} values of {name} for {size} samples")
        for name, (rank, dtype) in FACT_TENSORS.items():
            if getattr(self, name) is not None:
                _check(getattr(self, name), name, rank, dtype)

    def need(self, name: str) -> Any:
        """The named fact; ``ValueError`` if nobody found it out."""
        value = getattr(self, name)
        require(value is not None, f"nobody found out {name!r} of the samples")
        return value


FACT_TENSORS = {
    "length": (1, torch.int64),
    "truncated": (1, torch.bool),
    "features": (2, torch.float64),
    "score_norm": (1, torch.float64),
}
"""Facts about samples that are tensors: rank and dtype."""
FACTS = ("answer", *FACT_TENSORS)
"""What ``Scores`` may know of samples beside their rewards."""


@dataclass(frozen=True, kw_only=True)
class Tempering:
    """What is added to the advantage of each decision: ``scale`` times a weight of its own.

    ``scale`` [N] float64 (or [B], of a micro-batch).  The weight is p_T / p, at most ``cap``: the
    probability of the decision under the policy that sampled, the logits of which are divided by
    ``temperature`` once more, over its probability without that.
    """

    scale: Tensor
    temperature: float
    cap: float | None = None

    def __post_init__(self) -> None:
        _check(self.scale, "scale", 1, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """``values`` [N] float64, exactly 0 where not kept; ``keep`` [N] bool: trained samples.

    ``counts`` [N] float64: how often each of these counts, above 0 where kept; ``None``: once.
    ``tempering``: where the decisions of a sample differ in advantage.  ``metrics``: named scalars
    for the log.
    """

    values: Tensor
    keep: Tensor
    counts: Tensor | None = None
    tempering: Tempering | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.values, "values", 1, torch.float64)
        _check(self.keep, "keep", 1, torch.bool)
        require(self.values.shape == self.keep.shape, "values and keep differ in shape")
        require(bool(torch.isfinite(self.values).all()), "an advantage is not finite")
        if self.counts is not None:
            _check(self.counts, "counts", 1, torch.float64)
            require(self.counts.shape == self.keep.shape, "counts and keep differ in shape")
            require(bool((self.counts[self.keep] > 0).all()), "a kept sample counts nothing")
        if self.tempering is not None:
            scale = self.tempering.scale
            require(scale.shape == self.keep.shape, "scale and keep differ in shape")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in a run something is decided: ``step``, counted from 0, of ``num_steps``.

    ``seed``: that of the run.
    """

    step: int
    num_steps: int
    seed: int

    @property
    def progress(self) -> float:
        """Share of the run in [0, 1) that lies behind."""
        return self.step / self.num_steps


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """One row of a batch under the policy that sampled: ``logp`` [K] and the backend's ``memory``.

    ``memory`` is whatever else its terms compare with, such as means [K, D]; opaque to others.
    """

    logp: Tensor
    memory: Any = None


@dataclass(frozen=True, kw_only=True)
class UpdateBatch:
    """One micro-batch of samples on their way into the loss.

    K counts the decisions in this batch, which may be fewer than the samples have.

    ``payload``: made by the backend's ``collate``.  ``mask`` [B, K] bool.  ``advantages`` [B].
    ``weights`` [B] float64: 1 for a trained sample, 0 for padding of a short process.
    ``logp_old`` [B, K] or ``None``: ``None`` means strictly on-policy, ratio 1 by construction.
    ``memory``: length B or ``None``: of each row, what the backend's ``anchor`` remembered of the
    policy that sampled.  ``tasks``: length B, that of each sample's prompt, or empty.
    ``progress``: share of the run's steps that are done, in [0, 1).  ``tempering``: as in
    ``Advantages``, of these samples.

    Of the part that reads the batch: ``signals``: its numbers for each sample, [B] float64 each,
    and ``state``, what it keeps between optimizer steps; empty for a part without.
    """

    payload: Any
    mask: Tensor
    advantages: Tensor
    weights: Tensor
    logp_old: Tensor | None = None
    memory: Sequence[Any] | None = None
    tasks: Sequence[str] = ()
    progress: float = 0.0
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    tempering: Tempering | None = None

    def __post_init__(self) -> None:
        _check(self.mask, "mask", 2, torch.bool)
        _check(self.advantages, "advantages", 1, torch.float64)
        _check(self.weights, "weights", 1, torch.float64)
        rows = self.mask.shape[0]
        require(self.advantages.shape[0] == rows, "advantages and mask differ in rows")
        require(self.weights.shape[0] == rows, "weights and mask differ in rows")
        require(len(self.tasks) in (0, rows), "tasks and mask differ in rows")
        if self.tempering is not None:
            require(len(self.tempering.scale) == rows, "scale and mask differ in rows")
        if self.logp_old is not None:
            require(self.logp_old.shape == self.mask.shape, "logp_old and mask differ in shape")
        for name, value in self.signals.items():
            _check(value, name, 1, torch.float64)
            require(value.shape[0] == rows, f"{name} and mask differ in rows")

    def signal(self, name: str) -> Tensor:
        """[B, 1] of the named signal; ``ValueError`` if the batch has none of that name."""
        require(name in self.signals, f"the batch has no signal {name!r}")
        return self.signals[name][:, None]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The W samples of an optimizer step, those of all processes, just before it is made.

    ``group`` [W] int64.  ``length`` [W] float64: decisions of each, at least 1.
    ``log_ratio``: by the name of the other policy, "old" or "reference", [W] float64: the sum of
    logp - logp_other over the decisions of each sample, in nats; those that were asked for.
    ``signals``: those of the part that reads it, [W] float64 each.
    """

    group: Tensor
    length: Tensor
    log_ratio: Mapping[str, Tensor]
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.group, "group", 1, torch.int64)
        for name, value in {"length": self.length, **self.log_ratio, **self.signals}.items():
            _check(value, name, 1, torch.float64)
            require(value.shape == self.group.shape, f"{name} and group differ in shape")


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """What a backend computed for a micro-batch; a field is ``None`` unless it was asked for.

    All are [B, K], float32 or float64, and differentiable with respect to the policy except
    ``logp_ref``, ``logp_sampled``, ``logp_tempered``, ``sum_squares`` and the four numbers of a
    step named last.  Means are over latent dimensions.

    ``logp_sampled``: what the sampler itself found when it drew the decision, of the distribution
    that it really came from; 0 where there is none.

    Tokens: ``logp_tempered``: log-probability under the policy that sampled, its logits divided by
    the batch's ``tempering.temperature`` once more.  ``sum_squares``: sum over the vocabulary of
    squared probabilities, that two draws would be equal.

    Any flow model: ``velocity_gap_reference`` / ``velocity_gap_ema``: mean (v - v_other)^2.
    ``implicit_positive`` / ``implicit_negative``: x0-prediction errors of the policies implied by
    v_old +- beta (v - v_old), each over its own detached mean absolute error and over beta
    (DiffusionNFT).

    Denoising transitions N(mu, S^2): ``mean_gap_old`` / ``mean_gap_reference`` /
    ``mean_gap_teacher``: mean (mu - mu_other)^2 against the sampling policy, the frozen model and
    the teacher of the sample's task, at the same state.

    Of the step: ``sigma``: noise level in [0, 1], 1 = noise.  ``step_size``: -dt > 0, the fall of
    sigma.  ``step_std``: S.  ``diffusion``: g with S = g sqrt(-dt) (S itself for ``cps``, which has
    none); both 0 for ODE steps.

    ``metrics``: (sum, count) pairs to log.
    """

    logp: Tensor
    logp_ref: Tensor | None = None
    logp_sampled: Tensor | None = None
    logp_tempered: Tensor | None = None
    entropy: Tensor | None = None
    sum_squares: Tensor | None = None
    velocity_gap_reference: Tensor | None = None
    velocity_gap_ema: Tensor | None = None
    implicit_positive: Tensor | None = None
    implicit_negative: Tensor | None = None
    mean_gap_old: Tensor | None = None
    mean_gap_reference: Tensor | None = None
    mean_gap_teacher: Tensor | None = None
    sigma: Tensor | None = None
    step_size: Tensor | None = None
    step_std: Tensor | None = None
    diffusion: Tensor | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.logp, "logp", 2, torch.float32, torch.float64)
        for name in OPTIONAL_TERMS:
            value = getattr(self, name)
            if value is not None:
                require(value.shape == self.logp.shape, f"{name} and logp differ in shape")

    def need(self, name: str) -> Tensor:
        """The named term; ``ValueError`` if the backend left it out."""
        value = getattr(self, name)
        require(value is not None, f"the backend did not compute {name!r}")
        return value


OPTIONAL_TERMS = (
    "logp_ref",
    "logp_sampled",
    "logp_tempered",
    "entropy",
    "sum_squares",
    "velocity_gap_reference",
    "velocity_gap_ema",
    "implicit_positive",
    "implicit_negative",
    "mean_gap_old",
    "mean_gap_reference",
    "mean_gap_teacher",
    "sigma",
    "step_size",
    "step_std",
    "diffusion",
)
TERMS = ("logp", *OPTIONAL_TERMS)


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Unreduced loss [B, K] (or [B, 1] for one value a sample) and (sum, count) metrics."""

    loss: Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.loss, "loss", 2, torch.float32, torch.float64)


def _check(value: Tensor, name: str, rank: int, *dtypes: torch.dtype) -> None:
    require(value.ndim == rank, f"{name} has rank {value.ndim}, not {rank}")
    require(value.dtype in dtypes, f"{name} is {value.dtype}, not one of {dtypes}")
