"""Log-probabilities and numbers of whole distributions from hidden states.

Without the logits of all tokens at once, and all from one pass over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [m, D] -> logits [m, V]."""


class Scored(NamedTuple):
    """``logp`` [M] of the targets, and where asked for: ``entropy`` [M]; ``tempered`` [M],
    ``logp`` at a second temperature; ``sum_squares`` [M] of probabilities.  float32, nats.
    """

    logp: Tensor
    entropy: Tensor | None = None
    tempered: Tensor | None = None
    sum_squares: Tensor | None = None


class Wanted(NamedTuple):
    """What is asked for besides ``logp``.

    ``slope``: whether the entropy has a gradient; the others never have.  ``temperature``: the
    second one, by which the logits are divided once more.
    """

    entropy: bool = False
    slope: bool = True
    temperature: float | None = None
    sum_squares: bool = False


def score(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk: int,
    with_entropy: bool,
    entropy_slope: bool = True,
    second_temperature: float | None = None,
    with_sum_squares: bool = False,
) -> Scored:
    """Score ``targets`` [M] under softmax(head(hidden [M, D]) / temperature).

    Logits of ``chunk`` tokens exist at a time.  A plain frozen ``head`` is used twice for each
    token, forward and backward together; any other computes its logits again for the backward pass,
    and so does an entropy, unless without ``entropy_slope`` it has no gradient.
    """
    slope = with_entropy and entropy_slope
    wanted = Wanted(with_entropy, slope, second_temperature, with_sum_squares)
    if is_frozen_linear(head) and not slope and torch.is_grad_enabled():
        logp, numbers = _FrozenHead.apply(  # type: ignore[misc]
            hidden, head, targets, temperature, chunk, wanted
        )
        return _scored(logp, numbers, wanted)

    def of_chunk(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(head(states).float() / temperature, dim=-1)
        return logp.gather(-1, ids[:, None])[:, 0], _numbers(logp, ids, wanted)

    found = []
    for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            found.append(checkpoint(of_chunk, states, ids, use_reentrant=False))
        else:
            found.append(of_chunk(states, ids))
    logp, numbers = zip(*found, strict=True)
    return _scored(torch.cat(logp), torch.cat(numbers), wanted)


def _numbers(logp: Tensor, ids: Tensor, wanted: Wanted) -> Tensor:
    """[m, n] of log-probabilities [m, V] and targets [m]: a column for each that is wanted."""
    found, constant = [], logp.detach()
    if wanted.entropy:
        entropic = logp if wanted.slope else constant
        found.append(-(entropic.exp() * entropic).sum(-1))
    if wanted.temperature is not None:
        colder = constant / wanted.temperature
        found.append(colder.gather(-1, ids[:, None])[:, 0] - colder.logsumexp(-1))
    if wanted.sum_squares:
        found.append((2.0 * constant).exp().sum(-1))
    return torch.stack(found, dim=-1) if found else logp.new_empty(len(logp), 0)


def _scored(logp: Tensor, numbers: Tensor, wanted: Wanted) -> Scored:
    """The columns of ``numbers`` by name."""
    columns = iter(numbers.unbind(-1))
    return Scored(
        logp,
        next(columns) if wanted.entropy else None,
        next(columns).detach() if wanted.temperature is not None else None,
        next(columns).detach() if wanted.sum_squares else None,
    )


def is_frozen_linear(head: Any) -> bool:
    """Whether a head is one matrix, with a bias or without, that is not trained."""
    return type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())


class _FrozenHead(torch.autograd.Function):
    """``logp`` [M], whose slope in the hidden states is known as soon as the logits are, and
    numbers [M, n] without a slope.

    d logp / d hidden = (onehot(target) - softmax) W / temperature: [M, D], which is all that is
    kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Linear,
        targets: Tensor,
        temperature: float,
        chunk: int,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        logps, numbers, slopes = [], [], []
        for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logp = torch.log_softmax(head(states).float().div_(temperature), dim=-1)
            logps.append(logp.gather(-1, ids[:, None])[:, 0])
            numbers.append(_numbers(logp, ids, wanted))
            towards = logp.exp_().neg_()
            towards[torch.arange(len(ids), device=ids.device), ids] += 1.0
            slopes.append((towards.to(head.weight.dtype) @ head.weight).div_(temperature))
        ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype))
        constant = torch.cat(numbers)
        ctx.mark_non_differentiable(constant)
        return torch.cat(logps), constant

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None].to(slopes.dtype) * slopes, *[None] * 5)
