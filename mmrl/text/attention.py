"""Attention over a row of trees, registered with transformers under the name ``mmrl``.

Every model of transformers that takes its attention from the common interface can use it: linear
layers see a row without padding, and attention sees each prompt once and each completion behind it.
Without a prepared kernel it is transformers' own ``sdpa``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmrl.text.kernels import KERNELS, Kernel
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
    row_attention: Kernel | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[1, heads, L, d] queries, keys and values -> [1, L, heads, d].

    ``row_attention``: what ``prepare`` made; a network hands it on from its own arguments.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if row_attention is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return row_attention(module, query, key, value, **options), None


def prepare(name: str, layout: Layout) -> Kernel:
    """The kernel ``name`` for a row.

    It raises ``ValueError`` for a model whose attention needs more than this one does.
    """
    kernel = KERNELS[name](layout)
    longest = max(tree.lengths[0] + max(tree.lengths[1:]) for tree in layout.trees)

    def checked(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        _refuse_other_kinds(longest, options)
        # A float32 norm promotes queries and keys past an autocast value; kernels want one dtype.
        return kernel(module, query.to(value.dtype), key.to(value.dtype), value, **options)

    return checked


def _refuse_other_kinds(longest: int, options: dict[str, Any]) -> None:
    unknown = [name for name in UNSUPPORTED if options.get(name) is not None]
    window = options.get("sliding_window")
    if window is not None and longest > window:
        unknown.append(f"sliding_window = {window} for {longest} tokens")
    if unknown:
        raise ValueError(f"backend.update: this model's attention has {', '.join(unknown)}")
