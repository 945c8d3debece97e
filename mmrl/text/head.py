"""Log-probabilities and entropies from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [m, D] -> logits [m, V]."""


class Scored(NamedTuple):
    """``logp`` [M] of the targets, and where asked for the ``entropy`` [M]; float32, nats."""

    logp: Tensor
    entropy: Tensor | None


def score(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk: int,
    with_entropy: bool,
    entropy_slope: bool = True,
) -> Scored:
    """Score ``targets`` [M] under softmax(head(hidden [M, D]) / temperature).

    Logits of ``chunk`` tokens exist at a time.  A plain frozen ``head`` is used twice for each
    token, forward and backward together; any other computes its logits again for the backward pass,
    and so does an entropy, unless without ``entropy_slope`` it has no gradient.
    """
    slope = with_entropy and entropy_slope
    if is_frozen_linear(head) and not slope and torch.is_grad_enabled():
        logp, entropy = _FrozenHead.apply(  # type: ignore[misc]
            hidden, head, targets, temperature, chunk, with_entropy
        )
        return Scored(logp, entropy if with_entropy else None)

    def of_chunk(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(head(states).float() / temperature, dim=-1)
        entropy = _entropy(logp if slope else logp.detach(), with_entropy)
        return logp.gather(-1, ids[:, None])[:, 0], entropy

    found = []
    for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            found.append(checkpoint(of_chunk, states, ids, use_reentrant=False))
        else:
            found.append(of_chunk(states, ids))
    logp, entropy = zip(*found, strict=True)
    return Scored(torch.cat(logp), torch.cat(entropy) if with_entropy else None)


def _entropy(logp: Tensor, wanted: bool) -> Tensor:
    """[m] of log-probabilities [m, V], or anything else of that shape."""
    return -(logp.exp() * logp).sum(-1) if wanted else logp[:, 0].detach()


def is_frozen_linear(head: Any) -> bool:
    """Whether a head is one matrix, with a bias or without, that is not trained."""
    return type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())


class _FrozenHead(torch.autograd.Function):
    """``logp`` [M], whose slope in the hidden states is known as soon as the logits are, and
    ``entropy`` [M] without a slope.

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
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logps, entropies, slopes = [], [], []
        for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logp = torch.log_softmax(head(states).float().div_(temperature), dim=-1)
            logps.append(logp.gather(-1, ids[:, None])[:, 0])
            entropies.append(_entropy(logp, with_entropy).clone())  # logp is overwritten
            towards = logp.exp_().neg_()
            towards[torch.arange(len(ids), device=ids.device), ids] += 1.0
            slopes.append((towards.to(head.weight.dtype) @ head.weight).div_(temperature))
        ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None].to(slopes.dtype) * slopes, *[None] * 5)
