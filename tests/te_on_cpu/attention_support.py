"""Which attention cuDNN supports: tex.get_fused_attn_backend for a Hopper or a Blackwell with cuDNN 9.24.

The rules are those of C/fused_attn/fused_attn.cpp:229-520 (22 August 2026), without those for older versions.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.te_on_cpu.device import capability


def get_fused_attn_backend(fused_attn_params: Any) -> tuple[Any, str]:
    """(tex.NVTE_Fused_Attn_Backend, "" or why there is none). fused_attn_params: TE's FusedAttentionParams."""
    backends = sys.modules["transformer_engine_torch"].NVTE_Fused_Attn_Backend  # type: ignore[attr-defined]
    in_fp8 = int(fused_attn_params.qkv_dtype) in (7, 8)
    reason = _why_not_fp8(fused_attn_params) if in_fp8 else _why_not_16_bits(fused_attn_params)
    if reason:
        return backends.NVTE_No_Backend, reason
    return (backends.NVTE_FP8 if in_fp8 else backends.NVTE_F16_arbitrary_seqlen), ""


def _why_not_fp8(p: Any) -> str:
    d_qk, d_v, mask = p.head_dim_qk, p.head_dim_v, _mask(p)
    hopper = capability() < (10, 0)
    if capability() < (9, 0):
        return "FP8 attention needs compute capability 9.0"
    if p.bias_type.name != "NVTE_NO_BIAS":
        return "FP8 attention takes no bias"
    if d_qk % 16 or d_v % 16:
        return f"FP8 attention takes head sizes that are multiples of 16, not {d_qk} and {d_v}"
    if hopper and p.is_training and (d_qk, d_v) != (128, 128):
        return f"FP8 attention trains with head size 128 on a Hopper, not {d_qk} and {d_v}"
    if max(d_qk, d_v) > 256 or (not hopper and (d_qk > 192 or d_v > 128)):
        return f"FP8 attention has no head sizes {d_qk} and {d_v}"
    if not hopper and d_qk > 128 and mask not in ("NO", "CAUSAL", "CAUSAL_BOTTOM_RIGHT"):
        return f"FP8 attention with head size {d_qk} has no mask {mask}"
    masks = ("NO", "CAUSAL", "PADDING", "PADDING_CAUSAL") + (() if hopper else ("CAUSAL_BOTTOM_RIGHT",))
    if mask not in masks:
        return f"FP8 attention has no mask {mask}"
    if set(_formats(p)) & {"thd"} or len(set(_formats(p))) > 1:
        return "FP8 attention takes bshd and sbhd"
    if p.return_max_logit:
        return "FP8 attention does not return the largest scores"
    return ""


def _why_not_16_bits(p: Any) -> str:
    d_qk, d_v, mask = p.head_dim_qk, p.head_dim_v, _mask(p)
    s_q, s_kv, formats = p.max_seqlen_q, p.max_seqlen_kv, _formats(p)
    plain = p.bias_type.name == "NVTE_NO_BIAS" and p.dropout == 0
    if int(p.qkv_dtype) not in (5, 6):
        return "fused attention takes FP8, float16 and bfloat16"
    if capability() < (8, 0):
        return "fused attention needs compute capability 8.0"
    if d_qk % 8 or d_v % 8:
        return f"fused attention takes head sizes that are multiples of 8, not {d_qk} and {d_v}"
    if p.is_training and not _trains(d_qk, d_v):
        return f"fused attention has no backward for head sizes {d_qk} and {d_v} here"
    if not p.is_training and max(d_qk, d_v) > 256 and s_q == 1 and mask in ("CAUSAL", "PADDING_CAUSAL"):
        return f"fused attention has no head sizes {d_qk} and {d_v} for one query with the mask {mask}"
    if p.bias_type.name == "NVTE_PRE_SCALE_BIAS":
        return "fused attention adds a bias to scaled scores only"
    if p.bias_type.name == "NVTE_ALIBI" and mask not in ("CAUSAL", "CAUSAL_BOTTOM_RIGHT"):
        return f"fused attention has no ALiBi with the mask {mask}"
    if p.bias_type.name == "NVTE_POST_SCALE_BIAS" and mask in ("PADDING", "PADDING_CAUSAL"):
        return f"fused attention has no bias with the mask {mask}"
    if "PADDING" in mask and not plain:
        return f"fused attention has neither bias nor dropout with the mask {mask}"
    if "BOTTOM_RIGHT" in mask and s_q > s_kv:
        return f"the mask {mask} wants no more queries than keys"
    if "thd" in formats and "PADDING" not in mask:
        return f"fused attention of thd takes padding masks, not {mask}"
    left, right = p.window_size_left, p.window_size_right
    if left >= 0 or right > 0:
        if mask == "CAUSAL" and (right != 0 or "thd" in formats):
            return f"fused attention has no window ({left}, {right}) with the mask {mask} in {formats[0]}"
        if s_q > s_kv or not plain:
            return "a sliding window wants no more queries than keys, no bias and no dropout"
    if capability() >= (10, 0) and p.is_training and p.deterministic and not plain:
        return "no deterministic backward with a bias or dropout on this device"
    return ""


def _trains(d_qk: int, d_v: int) -> bool:
    if max(d_qk, d_v) <= 128:
        return True
    if capability() == (9, 0):
        # The backward of cuDNN 9.11 and later is wrong for unequal sizes from 128 on.
        return max(d_qk, d_v) <= 256 and (d_qk == d_v or min(d_qk, d_v) < 128 or (d_qk, d_v) == (192, 128))
    return capability() >= (10, 0) and (d_qk, d_v) in ((192, 128), (256, 256))


def _mask(p: Any) -> str:
    return p.attn_mask_type.name.removeprefix("NVTE_").removesuffix("_MASK")


def _formats(p: Any) -> list[str]:
    """The formats of q, and of k and v."""
    buffers = p.qkv_layout.name.removeprefix("NVTE_").removeprefix("Paged_KV_").lower().replace("2", "").replace("3", "").split("_")
    return [buffers[0], buffers[-1]]
