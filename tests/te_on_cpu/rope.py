"""Rotary embeddings as TE fuses them (C/fused_rope): float32 inside, one rounding at the end; features beyond the angles are unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.layout import Sequences


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """input: [s, b, h, d], [b, s, h, d] or [t, h, d]; freqs: angles, float32 [s, 1, 1, d2], d2 <= d. The result is like the input."""
    return _rotate(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, back=False)


def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """The input's gradient: the rotation by the negative angles."""
    return _rotate(output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, back=True)


def _rotate(
    t: Tensor, freqs: Tensor, start: Tensor | None, qkv_format: Any, interleaved: bool, cu_seqlens: Tensor | None, cp_size: int, back: bool
) -> Tensor:
    if cp_size > 1:
        raise NotImplementedError("rotary embeddings of a part of a sequence have no stand-in")
    format = qkv_format.name.removeprefix("NVTE_").lower()
    angles = freqs.float().reshape(freqs.shape[0], -1)
    if format == "thd":
        assert cu_seqlens is not None
        samples = Sequences(format, cu_seqlens.tolist()[:-1], cu_seqlens.diff().tolist(), freqs.shape[0])
    else:
        length, count = (t.shape[1], t.shape[0]) if format == "bshd" else (t.shape[0], t.shape[1])
        samples = Sequences(format, [0] * count, [length] * count, length)
    out = t.detach().float().contiguous()
    for sample, length in enumerate(samples.lengths):
        begin = 0 if start is None else int(start[sample])
        own = angles[begin : begin + length, None]
        rows = samples.rows(out, sample)
        part = rows[..., : own.shape[-1]].clone()
        rows[..., : own.shape[-1]] = part * own.cos() + _quarter_turn(part, interleaved) * own.sin() * (-1 if back else 1)
    return out.to(t.dtype)


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    """(a, b) to (-b, a): neighbors if interleaved, else the halves of the last dimension."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
