"""Attention over a row of trees, registered with transformers under the name ``mmrl``.

Every model of transformers that takes its attention from the common interface can use it: linear
layers see a row without padding, and attention sees each prompt once and each completion behind it.
Without a layout it is transformers' own ``sdpa``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrl.text.layout import Layout, Tree

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
    parts = []
    for tree in layout.trees:
        for (start, stop), seen, mask in _segments(tree, query.device):
            found, _ = sdpa_attention_forward(
                module,
                query[:, :, start:stop],
                torch.cat([key[:, :, a:b] for a, b in seen], dim=2),
                torch.cat([value[:, :, a:b] for a, b in seen], dim=2),
                mask,
                **options,
            )
            parts.append(found)
    return torch.cat(parts, dim=1), None


def _segments(tree: Tree, device: torch.device):
    """Of the prompt and of each completion: its bounds, those of what it sees, and the mask."""
    prompt, *completions = tree.bounds
    yield prompt, [prompt], None  # without a mask it is causal
    length = prompt[1] - prompt[0]
    for bounds in completions:
        own = bounds[1] - bounds[0]
        mask = torch.ones(own, length + own, dtype=torch.bool, device=device).tril(length)
        yield bounds, [prompt, bounds], mask[None, None]


def _refuse_other_kinds(layout: Layout, options: dict[str, Any]) -> None:
    unknown = [name for name in UNSUPPORTED if options.get(name) is not None]
    window = options.get("sliding_window")
    longest = max(tree.lengths[0] + max(tree.lengths[1:]) for tree in layout.trees)
    if window is not None and longest > window:
        unknown.append(f"sliding_window = {window} for {longest} tokens")
    if unknown:
        raise ValueError(f"backend.update: this model's attention has {', '.join(unknown)}")
