"""Attention kernels for joint text-image blocks: which work here, and putting one in place.

``sdpa``: PyTorch's scaled_dot_product_attention, which chooses its kernel.  ``xformers``:
memory_efficient_attention.  ``flash``: PyTorch's FlashAttention-2 kernel and no other.
SD3's blocks in diffusers call scaled_dot_product_attention directly and ignore
``set_attention_backend``, so the kernel is exchanged through an attention processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmrl import attention
from mmrl.attention import Availability

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value), each [B, heads, tokens, head size] -> the same shape."""

PREFERENCE = ("xformers", "flash", "sdpa")


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's choice of kernel."""
    return scaled_dot_product_attention(query, key, value)


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's FlashAttention kernel; ``RuntimeError`` where it does not apply."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, key, value)


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """memory_efficient_attention of xformers, whose layout is [B, tokens, heads, head size]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attention.memory_efficient_attention()(query, key, value).transpose(1, 2)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "xformers": xformers, "flash": flash}


def available_backends(
    device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[Availability]:
    """Every kernel, tried with a tiny forward and backward pass on ``device`` in ``dtype``."""
    return [probe(name, device, dtype) for name in PREFERENCE]


def probe(name: str, device: torch.device, dtype: torch.dtype) -> Availability:
    """Try one kernel."""

    def attempt() -> None:
        tokens = torch.randn(1, 1, 8, 64, device=device, dtype=dtype, requires_grad=True)
        KERNELS[name](tokens, tokens, tokens).sum().backward()

    return attention.probe(name, attempt, device, dtype)


def pick_attention(
    requested: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Availability:
    """The kernel to use and why; ``UserError`` if the requested one does not run here."""
    return attention.pick(requested, PREFERENCE, lambda name: probe(name, device, dtype), device)


def apply_attention(transformer: Any, name: str) -> None:
    """Make every joint attention layer of a diffusers transformer use the kernel ``name``."""
    if name != "sdpa":  # diffusers' own processor is sdpa already
        transformer.set_attn_processor(JointAttention(KERNELS[name]))


class JointAttention:
    """Attention over image and text tokens together (MMDiT; Esser et al. 2024, arXiv:2403.03206).

    A processor for diffusers' ``Attention`` with any kernel.  Image tokens come first; each stream
    has its own projections.  Without text it is self-attention of the image tokens.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """[B, L, D] image and [B, S, D] text tokens -> the same (text only if it came in)."""
        assert attention_mask is None, "joint attention has no mask"
        image = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        parts = [_project(attn.heads, hidden_states, *image)]
        if encoder_hidden_states is not None:
            text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k)
            parts.append(_project(attn.heads, encoder_hidden_states, *text, *norms))
        query, key, value = (torch.cat(stream, dim=2) for stream in zip(*parts, strict=True))
        # A float32 norm promotes queries and keys past an autocast value; kernels want one dtype.
        mixed = self.kernel(query.to(value.dtype), key.to(value.dtype), value)
        mixed = mixed.transpose(1, 2).flatten(2)
        length = hidden_states.shape[1]
        drawn = attn.to_out[1](attn.to_out[0](mixed[:, :length]))
        if encoder_hidden_states is None:
            return drawn
        written = mixed[:, length:]
        return drawn, written if attn.context_pre_only else attn.to_add_out(written)


def _project(
    heads: int, tokens: Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> list[Tensor]:
    """Query, key and value [B, heads, tokens, head size], normalised where the block does so."""
    query, key, value = (
        layer(tokens).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (to_q, to_k, to_v)
    )
    return [norm_q(query) if norm_q else query, norm_k(key) if norm_k else key, value]
