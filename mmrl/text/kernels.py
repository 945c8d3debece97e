"""Attention kernels over a row of trees; each is prepared for a layout once, for every layer.

``sdpa``: a call of PyTorch's for each prompt and each completion.  The others take a row at once.
``flash``, PyTorch's FlashAttention (Dao 2023, arXiv:2307.08691) for sequences of any lengths, and
``xformers`` are given the keys and values that each prompt or completion sees, one after another,
under a causal mask that ends where both end.  ``flex``, FlexAttention (Dong et al. 2024,
arXiv:2412.05496), copies no keys: blocks of the row that no token sees are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrl import attention
from mmrl.attention import Availability
from mmrl.text.config import Config
from mmrl.text.layout import Encoded, Layout, Row, lay_out
from mmrl.types import DTYPES

Kernel = Callable[..., Tensor]
"""(module, query [1, H, L, d], key and value [1, G, L, d], **options) -> [1, L, H, d].

H heads in G groups, and transformers' ``options``, of which ``scaling`` multiplies the logits."""

PREFERENCE = ("flash", "xformers", "flex", "sdpa")
"""Of ``auto``: without a copy for each head of a group, then without compilation."""


def segments(layout: Layout) -> Iterator[tuple[slice, list[slice]]]:
    """Of each prompt and each completion: its place in the row, and the places that it sees."""
    start = 0
    for tree in layout.trees:
        prompt = slice(start, start + tree.lengths[0])
        yield prompt, [prompt]
        start = prompt.stop
        for length in tree.lengths[1:]:
            completion = slice(start, start + length)
            yield completion, [prompt, completion]
            start = completion.stop


def sdpa(layout: Layout) -> Kernel:
    """transformers' call of scaled_dot_product_attention, for each prompt and each completion."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    device = layout.tokens.device
    sizes = [length for tree in layout.trees for length in tree.lengths]
    masks = [_causal(own, seen, device) for own, seen in segments(layout)]

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        # One split: the gradient of each slice would be as long as the whole row.
        parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
        found, prompt = [], ()
        for (asks, *own), mask in zip(parts, masks, strict=True):
            if mask is None:
                prompt = seen = own
            else:
                seen = [torch.cat(pair, dim=2) for pair in zip(prompt, own, strict=True)]
            keys, values = seen
            found.append(sdpa_attention_forward(module, asks, keys, values, mask, **options)[0])
        return torch.cat(found, dim=1)

    return kernel


def _causal(own: slice, seen: list[slice], device: torch.device) -> Tensor | None:
    """[1, 1, own, seen] whether a token sees another; ``None`` for a prompt, causal without it."""
    if seen == [own]:
        return None
    rows, columns = own.stop - own.start, sum(s.stop - s.start for s in seen)
    seen_by = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
    return seen_by[None, None]


@dataclass(frozen=True, kw_only=True)
class Spans:
    """``keys`` [T]: places in the row that each of N prompts and completions sees, concatenated.

    ``queries`` and ``seen``, both [N]: of its own tokens and of those it sees, how many there are.
    The latter end with the former, so a causal mask aligned at the bottom right is the right one.
    """

    keys: Tensor
    queries: list[int]
    seen: list[int]

    @staticmethod
    def of(layout: Layout) -> Spans:
        """Those of a row, on its device."""
        row = torch.arange(layout.tokens.shape[1], device=layout.tokens.device)
        found = [(own, torch.cat([row[s] for s in seen])) for own, seen in segments(layout)]
        return Spans(
            keys=torch.cat([keys for _, keys in found]),
            queries=[own.stop - own.start for own, _ in found],
            seen=[len(keys) for _, keys in found],
        )


def flash(layout: Layout) -> Kernel:
    """PyTorch's FlashAttention for sequences of any lengths, in bf16 or fp16; reads G groups."""
    from torch.nn.attention.varlen import varlen_attn

    spans = Spans.of(layout)
    starts, starts_seen = (_edges(n, layout.tokens.device) for n in (spans.queries, spans.seen))
    longest, longest_seen = max(spans.queries), max(spans.seen)

    def kernel(
        module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **options: Any
    ) -> Tensor:
        del module, options
        found = varlen_attn(
            _tokens(query),
            _tokens(key).index_select(0, spans.keys),
            _tokens(value).index_select(0, spans.keys),
            starts,
            starts_seen,
            longest,
            longest_seen,
            scale=scaling,
            window_size=(-1, 0),  # causal, aligned at the bottom right
            enable_gqa=True,
        )
        assert isinstance(found, Tensor)
        return found[None]

    return kernel


def xformers(layout: Layout) -> Kernel:
    """memory_efficient_attention of xformers."""
    attend = attention.memory_efficient_attention()
    from xformers.ops.fmha.attn_bias import (  # pyright: ignore[reportMissingImports]
        BlockDiagonalCausalFromBottomRightMask,
    )

    spans = Spans.of(layout)
    bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens(
        spans.queries, spans.seen, device=layout.tokens.device
    )

    def kernel(
        module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **options: Any
    ) -> Tensor:
        del module, options
        copies = query.shape[1] // key.shape[1]  # its groups of heads have no backward pass
        keys, values = (
            _tokens(x).index_select(0, spans.keys).repeat_interleave(copies, dim=1)[None]
            for x in (key, value)
        )
        return attend(_tokens(query)[None], keys, values, attn_bias=bias, scale=scaling)

    return kernel


def flex(layout: Layout) -> Kernel:
    """PyTorch's FlexAttention, compiled on CUDA; without a backward pass elsewhere."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, length = layout.tokens.device, layout.tokens.shape[1]
    segment, prompt = _numbers(layout)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        own = segment[key] == segment[query]
        return (key <= query) & (own | (segment[key] == prompt[query]))

    make: Any = create_block_mask
    attend: Any = flex_attention
    if device.type == "cuda":
        make, attend = _compiled(make), _compiled(attend)
    mask = make(seen, None, None, length, length, device=device)

    def kernel(
        module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **options: Any
    ) -> Tensor:
        del module, options
        found = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
        return found.transpose(1, 2)

    return kernel


KERNELS: dict[str, Callable[[Layout], Kernel]] = {
    "sdpa": sdpa,
    "flash": flash,
    "xformers": xformers,
    "flex": flex,
}


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _numbers(layout: Layout) -> tuple[Tensor, Tensor]:
    """[L] each: of a token's prompt or completion, and of its tree's prompt, the number."""
    device = layout.tokens.device
    lengths = torch.tensor([n for tree in layout.trees for n in tree.lengths], device=device)
    sizes = torch.tensor([len(tree.lengths) for tree in layout.trees], device=device)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    numbers = torch.arange(len(lengths), device=device)
    return numbers.repeat_interleave(lengths), first.repeat_interleave(lengths)


def _tokens(heads: Tensor) -> Tensor:
    """[1, H, L, d] as [L, H, d]."""
    return heads[0].transpose(0, 1)


def _edges(lengths: list[int], device: torch.device) -> Tensor:
    """[N + 1] int32: where each of N sequences starts, and where the last ends."""
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


# Which of them work


class Heads(NamedTuple):
    """Heads, groups of heads that share keys and values, and the width of one."""

    heads: int = 2
    groups: int = 1
    width: int = 64

    @staticmethod
    def of(network: Any) -> Heads:
        """Those of a network of transformers."""
        text = network.config.get_text_config()
        heads = text.num_attention_heads
        return Heads(
            heads,
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
        )


def choose(config: Config, heads: Heads, device: torch.device) -> Availability:
    """The kernel that a run scores with, and why; ``UserError`` if it does not run here."""
    if config.update == "padded":
        return Availability("sdpa", True, "rows are padded")
    return pick_attention(config.model.attention, device, DTYPES[config.model.dtype], heads)


def pick_attention(
    requested: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    heads: Heads = Heads(),  # noqa: B008 - immutable
) -> Availability:
    """The kernel to use and why; ``UserError`` if the requested one does not run here."""
    return attention.pick(
        requested, PREFERENCE, lambda name: probe(name, device, dtype, heads), device
    )


def available_backends(
    device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[Availability]:
    """Every kernel, tried with a tiny forward and backward pass on ``device`` in ``dtype``."""
    return [probe(name, device, dtype) for name in PREFERENCE]


def probe(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads = Heads(),  # noqa: B008 - immutable
) -> Availability:
    """Try one kernel with as many heads on a tree of two completions."""

    def attempt() -> None:
        prompt = Encoded.of_text([0, 0])
        rows = [Row(prompt=prompt, completion=[0] * n) for n in (1, 2)]
        kernel = KERNELS[name](lay_out(rows, share_prompts=True).to(device))
        query, key, value = (
            torch.randn(1, n, 5, heads.width, device=device, dtype=dtype, requires_grad=True)
            for n in (heads.heads, heads.groups, heads.groups)
        )
        module = _Module(heads.heads // heads.groups)
        kernel(module, query, key, value, scaling=1.0).sum().backward()

    return attention.probe(name, attempt, device, dtype)


class _Module(NamedTuple):
    """What transformers asks an attention layer."""

    num_key_value_groups: int
    is_causal: bool = True
