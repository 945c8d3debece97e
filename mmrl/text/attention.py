"""Attention over a row of trees, registered with transformers under the name ``mmrl``.

Every model of transformers that takes its attention from the common interface can use it: linear
layers see a row without padding, and attention sees each prompt once and each completion behind it.
Without a layout it is transformers' own ``sdpa``.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mmrl.text.layout import Layout

NAME = "mmrl"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What some models hand to their attention and this one does not know."""


def register() -> None:
    """Make ``NAME`` known to transformers; twice does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[1, heads, L, d] queries, keys and values -> [1, L, heads, d].

    ``ValueError`` for a model whose attention needs more than this one does.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    _refuse_other_kinds(layout, options)
    # One split: the gradient of a slice is as long as the row, and each part would have one.
    sizes = [length for tree in layout.trees for length in tree.lengths]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    found = []
    for tree in layout.trees:
        asks, keys, values = next(parts)
        found.append(
            sdpa_attention_forward(module, asks, keys, values, None, **options)[0]
        )  # causal
        for asks, *own in islice(parts, len(tree.lengths) - 1):
            k, v = (torch.cat(pair, dim=2) for pair in zip((keys, values), own, strict=True))
            mask = _behind(keys.shape[2], asks.shape[2], asks.device)
            found.append(sdpa_attention_forward(module, asks, k, v, mask, **options)[0])
    return torch.cat(found, dim=1), None


def _behind(length: int, own: int, device: torch.device) -> Tensor:
    """[1, 1, own, length + own]: all of a prompt, and of a completion what is not after a token."""
    mask = torch.ones(own, length + own, dtype=torch.bool, device=device)
    return mask.tril(length)[None, None]


def _refuse_other_kinds(layout: Layout, options: dict[str, Any]) -> None:
    unknown = [name for name in UNSUPPORTED if options.get(name) is not None]
    window = options.get("sliding_window")
    longest = max(tree.lengths[0] + max(tree.lengths[1:]) for tree in layout.trees)
    if window is not None and longest > window:
        unknown.append(f"sliding_window = {window} for {longest} tokens")
    if unknown:
        raise ValueError(f"backend.update: this model's attention has {', '.join(unknown)}")
