"""Dense attention that takes the very arguments of kernels that need CUDA, and reads them alike."""

from __future__ import annotations

import inspect
import math

import torch
from torch.nn.attention import varlen

from mmrl import attention


def dense(query, key, value, scale, queries, seen):
    """[T, H, d]: each of the sequences alone, the last query at the last key it sees."""
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    parts = []
    for q, k, v in zip(query.split(queries), key.split(seen), value.split(seen), strict=True):
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        after = torch.arange(len(k))[None] - len(k) > torch.arange(len(q))[:, None] - len(q)
        weights = logits.masked_fill(after, -math.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(parts)


def called_as(real, stand_in):
    """``stand_in``, for calls that the function it stands in for would take."""

    def checked(*arguments, **options):
        inspect.signature(real).bind(*arguments, **options)
        return stand_in(*arguments, **options)

    return checked


def install(monkeypatch):
    """Dense attention in place of the kernels of variable length, and flex without its refusal."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
    ):
        assert window_size == (-1, 0)
        assert enable_gqa
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
        queries, seen = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
        assert (max_q, max_k) == (max(queries), max(seen))
        return dense(query, key, value, scale, queries, seen)

    def memory_efficient_attention(query, key, value, attn_bias, scale):
        assert query.shape[2] == key.shape[2] == value.shape[2], "it has no groups"
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        shape = (len(query), query.shape[2], query.shape[1], key.shape[1])
        bias = attn_bias.materialize(shape, query.dtype)  # xformers' own reading of its mask
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return ((query @ key.mT * scale + bias).softmax(-1) @ value).transpose(1, 2)

    monkeypatch.setattr(varlen, "varlen_attn", called_as(varlen.varlen_attn, varlen_attn))
    xformers = called_as(attention.memory_efficient_attention(), memory_efficient_attention)
    monkeypatch.setattr(attention, "memory_efficient_attention", lambda: xformers)
    # Its backward pass works without compilation, but torch promises none on a CPU.
    flex = "torch.nn.attention.flex_attention"
    monkeypatch.setattr(f"{flex}._validate_device", lambda *tensors: None)
    monkeypatch.setattr(f"{flex}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
