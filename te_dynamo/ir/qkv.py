"""q, k and v on their way from the GEMM to the attention: a norm of each head (QK-norm), rotary positions (RoPE), and the
memory layout in which attention reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from te_dynamo.ir.graph import fake_like
from te_dynamo.ir.layout import ORDER, Form, Packing, as_bhsd
from te_dynamo.ir.norm import NormKind, norm
from te_dynamo.ir.op import Invariant, operation
from te_dynamo.ir.sizes import same

# Which features are rotated as a pair: i and i + width / 2 (Llama, GPT-NeoX), or 2 i and 2 i + 1 (GPT-J, complex multiplication).
Rotary = Literal["halves", "interleaved", ""]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary, width: int) -> Tensor:
    """Rotates the first `width` features of x [..., D] by the angles of each position; the others are unchanged.

    cos, sin: broadcastable to [..., width], or to [..., width / 2]: one angle for each pair.
    """
    cos, sin = _tables_of(cos, sin, x.dtype, rotary, width)
    turned = x[..., :width] * cos + _by_90_degrees(x[..., :width], rotary) * sin
    return torch.cat((turned, x[..., width:]), -1) if width < x.shape[-1] else turned


def rotate_gradient(grad: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary, width: int) -> Tensor:
    """The gradient of x, from the gradient of `rotate`'s result."""
    cos, sin = _tables_of(cos, sin, grad.dtype, rotary, width)
    turned = grad[..., :width] * cos - _by_90_degrees(grad[..., :width] * sin, rotary)
    return torch.cat((turned, grad[..., width:]), -1) if width < grad.shape[-1] else turned


def _tables_of(cos: Tensor, sin: Tensor, dtype: torch.dtype, rotary: Rotary, width: int) -> list[Tensor]:
    """The tables with one entry for each rotated feature."""
    return [t.to(dtype) if t.shape[-1] == width else _of_pairs(t.to(dtype), rotary) for t in (cos, sin)]


def _by_90_degrees(x: Tensor, rotary: Rotary) -> Tensor:
    """Each pair (a, b) of features as (-b, a)."""
    if rotary == "halves":
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).flatten(-2)


def _of_pairs(table: Tensor, rotary: Rotary) -> Tensor:
    return torch.cat((table, table), -1) if rotary == "halves" else table.repeat_interleave(2, -1)


def views(buffers: Sequence[Tensor], form: Form, packing: Packing) -> list[Tensor]:
    """q, k and v [B, H, S, D] as views of their buffers: the last buffer holds two or three of them if they are packed."""
    *alone, last = buffers
    parts = [*alone, *(last.unbind(_at(packing)) if packing else (last,))]
    return [as_bhsd(t, form) for t in parts]


def shapes(tensors: Sequence[Tensor], form: Form, packing: Packing) -> list[tuple[Any, ...]]:
    """The sizes of the buffers."""
    found = [tuple(t.shape[i] for i in ORDER[form]) for t in tensors]
    shared, at = _shared(packing), _at(packing)
    if not packing:
        return found
    return [*found[: len(found) - shared], (*found[-1][:at], shared, *found[-1][at:])]


def place(tensors: Sequence[Tensor], form: Form, packing: Packing) -> list[Tensor]:
    """Copies [B, H, S, D] tensors to new buffers with the layout of form and packing, and returns views of them."""
    rows = [t.permute(ORDER[form]) for t in tensors]
    if not packing:
        return views([r.contiguous() for r in rows], form, packing)
    alone = len(rows) - _shared(packing)
    return views([*(r.contiguous() for r in rows[:alone]), torch.stack(rows[alone:], _at(packing))], form, packing)


def _shared(packing: Packing) -> int:
    """How many of q, k and v share a buffer."""
    return int(packing.strip("hd") or 0)


def _at(packing: Packing) -> int:
    """The dimension of the shared buffer that indexes the tensors in it."""
    return 3 if packing.startswith("h") else 2


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *_: Any,
    form: Form,
    packing: Packing,
    out_dtype: torch.dtype,
    in_place: bool = False,
    **__: Any,
) -> Any:
    given = [q, k] if v is None else [q, k, v]
    if in_place:
        return given
    return views([fake_like(q, shape, out_dtype) for shape in shapes(given, form, packing)], form, packing)


def _tables(*tables: Tensor | None) -> bool:
    return all(t is None or t.dim() == 4 for t in tables)


def _vectors(head: int, *vectors: Tensor | None) -> bool:
    return all(t is None or same(t.shape, (head,)) for t in vectors)


def _given(out: Sequence[Tensor], *inputs: Tensor | None) -> bool:
    given = [i for i in inputs if i is not None]
    return len(out) == len(given) and all(same(o.shape, i.shape) for o, i in zip(out, given, strict=True))


@operation(
    kind="qkv",
    fake=_fake,
    reads=3,
    invariants=(
        Invariant("q is [B, H, S, D], k and v [B, H_kv, S_kv, D]", lambda a: all(t is None or t.dim() == 4 for t in (a.q, a.k, a.v))),
        Invariant("v is given where it shares a buffer", lambda a: (a.v is None) == (not a.packing)),
        Invariant("cos and sin have four dimensions", lambda a: _tables(a.cos, a.sin)),
        Invariant("weights and biases are [D]", lambda a: _vectors(a.q.shape[-1], a.q_weight, a.k_weight, a.q_bias, a.k_bias)),
        Invariant("the results have the shapes of what was given", lambda a: _given(a.out, a.q, a.k, a.v)),
    ),
)
def qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    form: Form,
    packing: Packing,
    out_dtype: torch.dtype,
    rotary: Rotary = "",
    width: int = 0,
    normalized: NormKind | Literal[""] = "",
    eps: float = 0.0,
    zero_centered: bool = False,
    round_before_weight: torch.dtype | None = None,
    norm_last: bool = False,
    in_place: bool = False,
) -> list[Tensor]:
    """q and k with each head normalized and rotated by its position; together with v in the layout that attention reads.

    q: [B, H, S, D]; k: [B, H_kv, S_kv, D]; v: like k, None if it shares no buffer. cos, sin: four dimensions, broadcastable to
    [B, H, S, width], or half as wide (see `rotate`). weights, biases: [D], of the norm. Returns q, k and v, if given, in `out_dtype`.
    form, packing: the layout (see `te_dynamo.ir.layout`). rotary: "" for none. normalized: the kind of norm, "" for none, with
    the attributes of `te_dynamo.ops.norm`. norm_last: normalize after the rotation, not before.
    in_place: returns the inputs unchanged. The node then serves only backward, where its kernel may write the gradient of the GEMM
    that computed them quantized.
    """
    if in_place:
        return [q, k] if v is None else [q, k, v]

    def prepared(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        steps = [lambda t: norm_of(t, weight, bias), lambda t: t if cos is None or sin is None else rotate_in_full(t)]
        for step in reversed(steps) if norm_last else steps:
            x = step(x)
        return x.to(out_dtype)

    def norm_of(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if not normalized:
            return x
        rounding = {"zero_centered": zero_centered, "round_before_weight": round_before_weight}
        return norm(x, weight, bias, kind=normalized, eps=eps, out_dtype=x.dtype, **rounding)

    def rotate_in_full(x: Tensor) -> Tensor:
        return rotate(x.to(torch.promote_types(x.dtype, torch.float32)), cos, sin, rotary, width).to(x.dtype)

    made = [prepared(q, q_weight, q_bias), prepared(k, k_weight, k_bias)]
    return place(made if v is None else [*made, v.to(out_dtype)], form, packing)
