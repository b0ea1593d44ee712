"""The FLOPs of the attention kernels that Inductor generates for `flex_attention`: they skip blocks that the mask hides, so the mask is
read from the kernel's source and evaluated."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

SIZE = re.compile(r"^ *(ZQ|HQ|Q_LEN|KV_LEN|QK_HEAD_DIM|V_HEAD_DIM)(?: : tl\.constexpr)? = (\d+)$", re.MULTILINE)
MASK = re.compile(r"((?:^ *tmp\d+ = .*\n)+) *mask_mod_output = (\w+)", re.MULTILINE)
BLOCK = 128  # create_block_mask's default
SAMPLED = 32  # rows of blocks


def flops_of(name: str, source: str) -> int | None:
    """The FLOPs of a generated kernel, counting whole blocks; None if it is no attention, or its lengths are not in its source."""
    if not name.startswith("triton_tem") or "flex_" not in name:
        return None
    sizes = {found: int(size) for found, size in SIZE.findall(source)}
    if len(sizes) < 6:
        return None
    products = sizes["ZQ"] * sizes["HQ"] * sizes["Q_LEN"] * sizes["KV_LEN"]
    qk, v = sizes["QK_HEAD_DIM"], sizes["V_HEAD_DIM"]
    whole = 2 * products * (3 * qk + 2 * v if "backward" in name else qk + v)
    return int(whole * density(source, sizes["Q_LEN"], sizes["KV_LEN"]))


def density(source: str, rows: int, columns: int) -> float:
    """The fraction of blocks that a kernel computes. What its mask reads (an attention_mask, the numbers of packed sequences) counts as 1
    everywhere, so that it hides nothing: the upper bound. 1.0 for a mask that cannot be evaluated."""
    found = MASK.search(source)
    if found is None:
        return 1.0
    computed, result = "\n".join(line.strip() for line in found[1].splitlines()), found[2]
    with _disable_current_modes():
        height, width = -(-rows // BLOCK), -(-columns // BLOCK)
        sampled = torch.arange(0, height, -(-height // SAMPLED))
        row = (sampled[:, None] * BLOCK + torch.tensor([0, BLOCK // 2, BLOCK - 1])).clamp(max=rows - 1)
        column = (torch.arange(width)[:, None] * BLOCK + torch.tensor([*range(0, BLOCK, 4), BLOCK - 1])).clamp(max=columns - 1)
        known = _Names(m=row.reshape(-1, 1), n=column.reshape(1, -1))
        try:
            exec(computed, {"tl": TRITON}, known)
        except Exception:
            return 1.0
        seen = known[result].expand(row.numel(), column.numel()).unflatten(1, column.shape).unflatten(0, row.shape)
        return float(seen.any(3).any(1).float().mean())


class _Pointer:
    def __add__(self, index: Any) -> Any:
        return index


class _Names(dict[str, Any]):
    """What a mask may read: pointers, and the batch and the head, of which the first are looked at."""

    def __missing__(self, name: str) -> Any:
        if name == "tl":
            raise KeyError(name)
        return _Pointer() if "ptr" in name else torch.zeros((), dtype=torch.int64)


def _full(shape: list[int], value: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


TRITON = SimpleNamespace(
    full=_full,
    load=lambda index, *_, **__: torch.ones(index.shape, dtype=torch.int64),
    where=torch.where,
    minimum=torch.minimum,
    maximum=torch.maximum,
    int1=torch.bool,
    int8=torch.int8,
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
)
