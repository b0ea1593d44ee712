"""Copies between the formats of sequences."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """[t, h, d] to [b, max_seq_len, h, d], with zeros after each sequence. cu_seqlens: int32 [b + 1]."""
    starts = cu_seqlens.tolist()
    out = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    for sample, (start, end) in enumerate(itertools.pairwise(starts)):
        out[sample, : end - start] = tensor[start:end]
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """[b, s, h, d] to [t, h, d]. cu_seqlens: int32 [b + 1]."""
    starts = cu_seqlens.tolist()
    out = tensor.new_zeros(t, *tensor.shape[2:])
    for sample, (start, end) in enumerate(itertools.pairwise(starts)):
        out[start:end] = tensor[sample, : end - start]
    return out


def fa_prepare_fwd(qkvi: Tensor) -> Tensor:
    """qkvi: q's view of [s, b, h, 3 d]. Returns [3, b, s, h, d]. P/csrc/extensions/attention.cpp:621."""
    s, b, h, d = qkvi.shape
    if qkvi.stride() != (b * h * 3 * d, h * 3 * d, 3 * d, 1):
        raise RuntimeError(f"q is no third of [s, b, h, 3 d]: its strides are {qkvi.stride()}")
    together = torch.as_strided(qkvi, (s, b, h, 3, d), (b * h * 3 * d, h * 3 * d, 3 * d, d, 1))
    return together.permute(3, 1, 0, 2, 4).contiguous()


def fa_prepare_bwd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three [s, b, h, d] tensors to one [b, s, h, 3 d]. P/csrc/extensions/attention.cpp:645."""
    return torch.cat([q, k, v], -1).transpose(0, 1).contiguous()
