"""Log-probabilities and entropies from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
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
) -> Scored:
    """Score ``targets`` [M] under softmax(head(hidden [M, D]) / temperature).

    Logits of ``chunk`` tokens exist at a time; the backward pass computes them again.
    """

    def of_chunk(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(head(states).float() / temperature, dim=-1)
        entropy = -(logp.exp() * logp).sum(-1) if with_entropy else logp[:, 0].detach()
        return logp.gather(-1, ids[:, None])[:, 0], entropy

    found = []
    for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            found.append(checkpoint(of_chunk, states, ids, use_reentrant=False))
        else:
            found.append(of_chunk(states, ids))
    logp, entropy = zip(*found, strict=True)
    return Scored(torch.cat(logp), torch.cat(entropy) if with_entropy else None)
