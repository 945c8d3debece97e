"""Sampling completions: each prompt is read once, and its samples grow side by side.

A sample's token number k is chosen by the k-th of its own uniform numbers, by inverting the
cumulative distribution.  So a sample depends on no other, whatever is in the batch with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrl.sharding import any_goes_on
from mmrl.text.layout import Encoded, for_network, joined
from mmrl.types import Greatest, Least, Metric, Total


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tokens are chosen.

    ``temperature`` 0: the likeliest.  ``ends``: ids that end a completion.  ``stopped``: whether
    the ids of a completion end it for another reason, such as a stop text.  ``forbidden``: ids that
    are never chosen.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    ends: frozenset[int] = frozenset()
    forbidden: tuple[int, ...] = ()
    stopped: Callable[[Sequence[int]], bool] | None = None


@dataclass(kw_only=True)
class Completion:
    """Token ``ids``, the end token included, and the log-probability each was sampled with, of the
    distribution that it really came from.  ``finished``: it ended before the limit.
    """

    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: bool = False


def statistics(samples: Sequence[Completion], prompt_tokens: int) -> dict[str, Metric]:
    """What is logged of the samples of a prompt, under TRL's keys.

    Lengths are in tokens, the end token included; those called terminated are of completions that
    ended before the limit.  ``num_tokens`` counts the prompt once for each sample.
    """
    lengths = [len(sample.ids) for sample in samples]
    terminated = [len(sample.ids) for sample in samples if sample.finished]
    count = float(len(samples))
    values: dict[str, Metric] = {
        "completions/clipped_ratio": (count - len(terminated), count),
        "num_tokens": Total(prompt_tokens * len(samples) + sum(lengths)),
    }
    for kind, found in (("", lengths), ("terminated_", terminated)):
        if found:
            values[f"completions/mean_{kind}length"] = (float(sum(found)), float(len(found)))
            values[f"completions/min_{kind}length"] = Least(min(found))
            values[f"completions/max_{kind}length"] = Greatest(max(found))
    return values


@torch.no_grad()
def generate(
    network: Any,
    prompts: Sequence[Encoded],
    owners: Sequence[int],
    uniforms: Tensor,
    settings: Settings,
) -> list[Completion]:
    """A completion for each of ``owners``, which are indices of ``prompts``.

    ``uniforms`` [N, max_tokens] in [0, 1): row n chooses the tokens of completion n.
    """
    device = next(network.parameters()).device
    completions = [Completion() for _ in owners]
    cache, logits, seen = _read(network, prompts, device)
    rows = torch.tensor(owners, device=device)
    after = torch.tensor([prompt.after for prompt in prompts], device=device)[rows]
    axes = len(prompts[0].positions)
    cache.batch_select_indices(rows)
    logits, seen, alive = logits[rows], seen[rows], list(range(len(owners)))
    goes_on = any_goes_on(network)
    for step in range(settings.max_tokens):
        tokens, logp = choose(logits, uniforms[alive, step].to(device), settings)
        for row, token, value in zip(alive, tokens.tolist(), logp.tolist(), strict=True):
            if not completions[row].finished:
                _append(completions[row], token, value, settings)
        going = [i for i, row in enumerate(alive) if not completions[row].finished]
        if step + 1 == settings.max_tokens or not goes_on(bool(going)):
            break
        going = going or [0]  # keeps step with processes that share the weights
        if len(going) < len(alive):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            tokens, seen, after = tokens[kept], seen[kept], after[kept]
            alive = [alive[i] for i in going]
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        places = (after + step)[:, None].expand(axes, -1, -1)
        logits = _forward(network, tokens[:, None], seen, places, cache)
    return completions


def choose(logits: Tensor, uniforms: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """A token for each row of ``logits`` [n, V], and its log-probability, both [n].

    The distribution is softmax(logits / temperature) over the tokens that top-k, then top-p leave.
    """
    logits = logits.float()
    if settings.forbidden:
        never = torch.tensor(settings.forbidden, device=logits.device)
        logits = logits.index_fill(1, never, -torch.inf)
    if settings.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logp = torch.log_softmax(logits / settings.temperature, dim=-1)
    logp = torch.log_softmax(_top_p(_top_k(logp, settings.top_k), settings.top_p), dim=-1)
    cumulative = logp.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniforms.double()[:, None] * total, right=True)
    # A product rounded up to the total would otherwise choose what has no probability.
    tokens = tokens.minimum((cumulative < total).sum(-1, keepdim=True))
    return tokens[:, 0], logp.gather(1, tokens)[:, 0]


def _top_k(logp: Tensor, top_k: int | None) -> Tensor:
    if top_k is None or top_k >= logp.shape[1]:
        return logp
    least = logp.topk(top_k).values[:, -1:]
    return logp.masked_fill(logp < least, -torch.inf)


def _top_p(logp: Tensor, top_p: float) -> Tensor:
    """Without the tokens before which likelier ones have ``top_p`` of the probability already."""
    if top_p >= 1.0:
        return logp
    logp = torch.log_softmax(logp, dim=-1)
    ordered, order = logp.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    drop = torch.zeros_like(logp, dtype=torch.bool).scatter(1, order, before >= top_p)
    return logp.masked_fill(drop, -torch.inf)


def _append(completion: Completion, token: int, logp: float, settings: Settings) -> None:
    completion.ids.append(token)
    completion.logp.append(logp)
    ended = token in settings.ends
    stopped = settings.stopped is not None and settings.stopped(completion.ids)
    completion.finished = ended or stopped


def _read(
    network: Any, prompts: Sequence[Encoded], device: torch.device
) -> tuple[Any, Tensor, Tensor]:
    """Cache, logits [P, V] after the last token, and which tokens are no padding [P, L]."""
    from transformers import DynamicCache

    longest = max(len(prompt.ids) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    seen = torch.zeros_like(tokens)
    places = tokens.new_zeros(len(prompts[0].positions), *tokens.shape)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all end together
        first = longest - len(prompt.ids)
        tokens[row, first:] = torch.tensor(prompt.ids)
        seen[row, first:] = 1
        places[:, row, first:] = prompt.positions
    tokens, seen, places = (x.to(device) for x in (tokens, seen, places))
    inputs = {name: value.to(device) for name, value in joined(prompts).items()}
    cache = DynamicCache(config=network.config)
    return cache, _forward(network, tokens, seen, places, cache, **inputs), seen


def _forward(
    network: Any, tokens: Tensor, seen: Tensor, places: Tensor, cache: Any, **inputs: Tensor
) -> Tensor:
    """Logits [n, V] after the last of ``tokens`` [n, t] at ``places`` [A, n, t].

    ``cache`` knows the tokens before them, and these afterwards.
    """
    out = network(
        input_ids=tokens,
        attention_mask=seen,
        position_ids=for_network(places),
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(network): cache},
        **inputs,
    )
    return out.logits[:, -1]


def cache_argument(network: Any) -> str:
    """What transformers calls the cache: it was renamed in 5.20 or thereabouts."""
    names = inspect.signature(type(network).forward).parameters
    return "cache" if "cache" in names else "past_key_values"
