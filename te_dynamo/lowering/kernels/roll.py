"""The update of delayed scaling as one kernel: each slot's amax enters its history, and a new scale comes out."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from te_dynamo.lowering.fp8 import FLOAT32_MAX

LONGEST = 1 << 14  # longest history that fits in registers
MOST_GROWTH = 16.0  # largest growth extrapolated from a step that saturated


def launch(
    amax: Tensor, scale: Tensor, history: Tensor, cursor: Tensor, top: Tensor, limit: Tensor, length: Tensor, most_recent: Tensor
) -> None:
    """In place on `scale` [2, n] f32, `history` [2, n, longest] f32 and `cursor` [2, n] int64; the others [2, n] as in
    `te_dynamo.state.arena.Arena`. In all of them slots are contiguous; the two directions may be strided."""
    n, longest = amax.shape[1], history.shape[2]
    block = 1 << (longest - 1).bit_length()
    tensors = (amax, scale, history, cursor, top, limit, length, most_recent)
    constants = {"LARGEST": FLOAT32_MAX, "GROWTH": MOST_GROWTH, "BLOCK": block}
    _kernel()[(2 * n,)](*tensors, *(t.stride(0) for t in tensors), n, longest, **constants, num_warps=1)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def roll_kernel(
        amax,
        scale,
        history,
        cursor,
        top,
        limit,
        length,
        most_recent,
        amax_stride,
        scale_stride,
        history_stride,
        cursor_stride,
        top_stride,
        limit_stride,
        length_stride,
        most_recent_stride,
        n,
        longest,
        LARGEST: tl.constexpr,
        GROWTH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        direction, slot = tl.program_id(0) // n, tl.program_id(0) % n
        peak = tl.load(amax + direction * amax_stride + slot)
        before = tl.load(scale + direction * scale_stride + slot)
        at = tl.load(cursor + direction * cursor_stride + slot)
        place = tl.arange(0, BLOCK)
        row = history + direction * history_stride + slot.to(tl.int64) * longest + place
        entries = tl.load(row, mask=place < longest, other=0.0)
        entries = tl.where(place == at, peak, entries)
        # The oldest entry counts once more, then makes room.
        deciding = tl.where(tl.load(most_recent + direction * most_recent_stride + slot) != 0, peak, tl.max(entries, 0))
        range_top = tl.load(top + direction * top_stride + slot)
        scaled = peak * before
        growth = tl.where(scaled > tl.load(limit + direction * limit_stride + slot), tl.div_rn(scaled, range_top), 1.0)
        growth = tl.where(growth > GROWTH, GROWTH, growth)
        fresh = tl.div_rn(tl.div_rn(range_top, deciding), growth)
        fresh = tl.where(fresh > LARGEST, LARGEST, fresh)
        moved = peak != 0
        tl.store(scale + direction * scale_stride + slot, tl.where(moved & (deciding < float("inf")), fresh, before))
        after = (at + moved.to(tl.int64)) % tl.load(length + direction * length_stride + slot)
        tl.store(cursor + direction * cursor_stride + slot, after)
        tl.store(row, tl.where(place == after, 0.0, entries), mask=(place == at) | (place == after))

    return roll_kernel
