"""Attention with a mask, capped scores or sinks by torch's `flex_attention`, for which Inductor generates a kernel.

The mask is a formula over rows, columns and the tensors that it reads (`te_dynamo.passes.masks.attends`), computed inside the kernel:
blocks of keys that no row of a block attends to are skipped, and only blocks that a mask's edge crosses are masked. So padding, packed
sequences and windows save time, whatever the padding looks like, and no S x S tensor is made. Rows that attend to nothing give 0 and
have no gradient, as in `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.call import Call
from te_dynamo.lowering.limits import SIXTEEN_BITS
from te_dynamo.lowering.quantized import Scales
from te_dynamo.lowering.reference.attention import modified, softmax_scale
from te_dynamo.lowering.registry import HIGH_PRECISION, Case, Forward, Implementation, Needs, implements

SHORT = 512  # up to here the mask costs little, and torch's kernel that reads it is as fast
LARGEST_HEAD = 256
OPTIONS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}


@implements("attention", provider="native", recipes=(HIGH_PRECISION,), devices=("cuda",))
class FlexAttention(Implementation):
    generated = True

    def unsupported(self, case: Case) -> str | None:
        q, k, v, mask = (case.inputs[name] for name in ("q", "k", "v", "mask"))
        formula = case.attributes["attends"]
        if modified(case) is None and mask is None:
            return ""  # torch's own kernels
        if mask is not None and not formula:
            return "its mask has no formula"
        if not (isinstance(q.shape[2], int) and isinstance(k.shape[2], int)) and _names(formula) & {"rows", "columns"}:
            return "its mask depends on symbolic lengths"
        if q.dtype not in SIXTEEN_BITS:
            return f"flex_attention is used for bfloat16 and float16, not {q.dtype}"
        if case.attributes["dropout_p"]:
            return "flex_attention has no dropout"
        if max(q.shape[3], v.shape[3]) > LARGEST_HEAD or min(q.shape[3], v.shape[3]) < 16:
            return f"flex_attention is used for head sizes from 16 to {LARGEST_HEAD}, not {q.shape[3]} and {v.shape[3]}"
        if not bool(k.shape[2] > SHORT) or not bool(q.shape[2] > 1):
            return f"up to {SHORT} keys, and for one row, its mask is read"
        return None

    def kernel(self, case: Case) -> str:
        return "flex_attention"

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        q, k, v, _, sinks, reads = inputs
        return Forward([flex(call, q, k, v, sinks, reads)], [], [])


def flex(call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, reads: Sequence[Tensor]) -> Tensor:
    """The attention of a call; inputs: as the operation has them."""
    from torch._higher_order_ops.flex_attention import flex_attention  # what `flex_attention()` becomes when Dynamo traces it
    from torch.nn.attention.flex_attention import create_block_mask

    rows, columns, cap = q.shape[2], k.shape[2], call["softcap"]
    mask_mod = formula_of(call["attends"], rows, columns, call["causal"])

    def score_mod(score: Tensor, *_: Any) -> Tensor:
        return torch.tanh(score / cap) * cap if cap else score

    with torch.no_grad():
        batch, heads = (_size_of(call["attends"], name, size) for name, size in (("batch", q.shape[0]), ("head", q.shape[1])))
        buffers = buffers_of(call["attends"], reads)
        blocks = create_block_mask(
            lambda b, h, i, j: mask_mod(b, h, i, j, *buffers), batch, heads, rows, columns, device=str(q.device)
        ).as_tuple()
    out, lse, *_ = flex_attention(q, k, v, score_mod, (*blocks[:-1], mask_mod), softmax_scale(call, q), dict(OPTIONS), (), buffers)
    if sinks is not None:  # a sink is one more key, with value 0: the other keys share the weight that it leaves
        natural = lse * math.log(2)
        out = (out * torch.sigmoid(natural - sinks.to(natural.dtype)[:, None]).unsqueeze(-1)).to(q.dtype)
    return out


def formula_of(attends: Any, rows: Any, columns: Any, causal: bool) -> Callable[..., Tensor]:
    """A `mask_mod`: whether row i attends to column j, from indices (0-d integer tensors) and `buffers_of` the formula's tensors."""
    alternatives, elements = attends or ((((),),), ())

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor, *buffers: Tensor) -> Tensor:
        known = {"": 1, "batch": b, "head": h, "row": i, "column": j, "rows": rows, "columns": columns}
        for n, (_, position) in enumerate(elements):
            given = zip([p for p in position if not _is_constant(p)], buffers[n].shape, strict=True)
            element = buffers[n][tuple(_index(total, outside, size, known) for (total, outside), size in given)]
            known[f"datum{n}"] = element.to(torch.int32) if element.dtype == torch.bool else element
        holds = [[_at_most_0(total, known) for total in sums if total] for sums in alternatives]
        every = [reduce(torch.logical_and, [*sums, *([j <= i] if causal else [])]) for sums in holds if sums or causal]
        return reduce(torch.logical_or, every) if every else j >= 0

    return mask_mod


def buffers_of(attends: Any, reads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """For each element that a formula reads, the tensor that holds it, without the dimensions along which its index is constant."""
    _, elements = attends or ((), ())
    buffers = []
    for tensor, position in elements:
        buffer = reads[tensor]
        for dim in reversed(range(len(position))):
            if _is_constant(position[dim]):
                buffer = buffer.select(dim, dict(position[dim][0]).get("", 0))
        buffers.append(buffer)
    return tuple(buffers)


def _is_constant(position: tuple[Any, bool]) -> bool:
    return all(name == "" for name, _ in position[0])


def _index(total: Any, may_lie_outside: bool, size: Any, known: dict[str, Any]) -> Tensor:
    position = _sum(total, known)
    return position.clamp(0, size - 1) if may_lie_outside else position


def _at_most_0(total: Any, known: dict[str, Any]) -> Tensor:
    """`sum(total) <= 0`, with the negative terms moved to the other side: the sum itself could overflow."""
    return _sum([t for t in total if t[1] > 0], known) <= _sum([(name, -c) for name, c in total if c < 0], known)


def _sum(total: Any, known: dict[str, Any]) -> Any:
    terms = [known[name] if c == 1 else known[name] * c for name, c in total]
    return reduce(operator.add, terms) if terms else 0


def _size_of(attends: Any, name: str, size: Any) -> Any:
    """The number of block masks: one for each batch, or head, if the formula depends on it; None for one."""
    return size if name in _names(attends) else None


def _names(attends: Any) -> set[str]:
    """The indices and sizes that a formula depends on."""
    alternatives, elements = attends or ((), ())
    sums = [total for sums in alternatives for total in sums] + [total for _, position in elements for total, _ in position]
    return {name for total in sums for name, _ in total}
