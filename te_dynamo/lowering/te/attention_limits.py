"""Which attention TE's fused kernels support, as data: from C/fused_attn/fused_attn.cpp:229-520 (TE 2.20), which checks cuDNN's version.

TE itself answers only when called, with an exception; the plan must know beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from te_dynamo.lowering.devices import AMPERE, BLACKWELL, BLACKWELL_RTX, HOPPER, Capability
from te_dynamo.lowering.limits import SIXTEEN_BITS


@dataclass(frozen=True)
class AttentionCase:
    """One attention call. head_qk, head_v: head sizes; mask: one that is neither causal nor a window; window: of a causal mask, -1 for
    none; thd: of sequences of different lengths, packed; fp8_backward: if it is in FP8, whether its backward is too; capability: of the
    device; cudnn: 91002 is 9.10.2."""

    dtype: torch.dtype
    head_qk: int
    head_v: int
    s_q: Any  # int or SymInt
    s_kv: Any
    causal: bool
    mask: bool
    dropout: float
    trains: bool
    in_fp8: bool
    capability: Capability
    cudnn: int
    deterministic: bool = False
    window: int = -1
    fp8_backward: bool = True
    thd: bool = False

    @property
    def largest_head(self) -> int:
        return max(self.head_qk, self.head_v)


@dataclass(frozen=True)
class Limit:
    """Which cases are refused, and why: a clause, formatted with the case's fields."""

    refuses: Callable[[AttentionCase], bool]
    reason: str


ALWAYS = (
    Limit(lambda c: c.dtype not in SIXTEEN_BITS, "it takes bfloat16 and float16, not {dtype}"),
    Limit(lambda c: c.mask, "a mask that is proven neither causal nor a window"),
    Limit(lambda c: c.dropout > 0, "its random numbers for dropout are not torch's"),
    Limit(lambda c: c.causal and c.s_q is not c.s_kv and c.s_q != c.s_kv, "a causal mask of unequal lengths"),
    Limit(lambda c: c.cudnn in (91000, 91001), "TE refuses cuDNN 9.10.0 and 9.10.1 (pip install -U nvidia-cudnn-cu12)"),
)
IN_16_BITS = (
    Limit(lambda c: c.capability < AMPERE, "it needs compute capability 8.0"),
    Limit(lambda c: c.head_qk % 8 != 0 or c.head_v % 8 != 0, "head sizes {head_qk} and {head_v} are not multiples of 8"),
    Limit(lambda c: c.thd and c.capability < HOPPER, "for sequences of different lengths it needs compute capability 9.0"),
    Limit(
        lambda c: c.thd and c.cudnn < 90600,  # before, the softmax's statistics have another shape
        "for sequences of different lengths it needs cuDNN 9.6 (pip install -U nvidia-cudnn-cu12)",
    ),
    Limit(lambda c: c.largest_head > 256, "head sizes {head_qk} and {head_v} are over 256"),
    Limit(
        lambda c: c.trains and c.largest_head > 128 and not (c.capability == HOPPER and c.cudnn >= 90500 and c.head_qk == c.head_v),
        "it trains head sizes over 128 on compute capability 9.0 alone (cuDNN 9.5 or newer, equal sizes)",
    ),
    Limit(lambda c: c.capability >= BLACKWELL_RTX and c.cudnn < 91801, "on compute capability 12.0 it needs cuDNN 9.18.1"),
    Limit(
        lambda c: c.deterministic and c.trains and c.capability >= (BLACKWELL if c.cudnn < 91801 else BLACKWELL_RTX),
        "it has no deterministic backward on this device (torch.use_deterministic_algorithms)",
    ),
    # TE refuses this only while a CUDA graph is captured; whether one will be is not known at plan time.
    Limit(
        lambda c: c.trains and c.cudnn <= 91500 and c.s_kv % 128 != 0,
        "up to cuDNN 9.15 it does not train with {s_kv} keys, no multiple of 128, in a CUDA graph",
    ),
)
IN_FP8 = (
    Limit(lambda c: c.window >= 0, "FP8 attention has no sliding window"),
    Limit(lambda c: c.capability < HOPPER, "FP8 attention needs compute capability 9.0"),
    Limit(lambda c: c.cudnn < 90700, "FP8 attention needs cuDNN 9.7 (pip install -U nvidia-cudnn-cu12)"),
    Limit(lambda c: c.head_qk % 16 != 0 or c.head_v % 16 != 0, "head sizes {head_qk} and {head_v} are not multiples of 16"),
    Limit(
        lambda c: c.capability < BLACKWELL and c.trains and c.fp8_backward and (c.head_qk, c.head_v) != (128, 128),
        "FP8 attention trains with head size 128 on Hopper, not {head_qk} and {head_v}",
    ),
    Limit(
        lambda c: c.capability < BLACKWELL and c.largest_head > 256,
        "head sizes {head_qk} and {head_v} are over 256, FP8 attention's limit on Hopper",
    ),
    Limit(
        lambda c: c.capability >= BLACKWELL and c.largest_head > 128,
        "head sizes {head_qk} and {head_v} are over 128, FP8 attention's limit on Blackwell",
    ),
)


def refused(case: AttentionCase) -> str | None:
    """Why TE has no kernel for this attention, as a clause; None if it has one."""
    in_16_bits = IN_16_BITS if not case.in_fp8 or (case.trains and not case.fp8_backward) else ()
    for limit in (*ALWAYS, *in_16_bits, *(IN_FP8 if case.in_fp8 else ())):
        if limit.refuses(case):
            return limit.reason.format(**vars(case))
    return None
