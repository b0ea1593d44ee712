"""What is between the GEMM that makes q, k and v and the attention that reads them: a norm of each head, RoPE, transposes.

It is read backwards from the attention, and becomes `ops.qkv`, which writes q, k and v in the layout that is wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from te_dynamo import ops
from te_dynamo.ir.graph import EXAMPLE, emit, emit_permuted, erase_if_dead, fake, is_call, is_method, tensor
from te_dynamo.ir.meta import LAYOUT, NOTES
from te_dynamo.passes.attention_site import Names, cast, reordered
from te_dynamo.passes.effects import written_between
from te_dynamo.passes.layout import follows_linears
from te_dynamo.passes.rotary import Rope, Table, read_rope, same_table

BHSD: Names = ("b", "h", "s", "d")


@dataclass(frozen=True)
class Head:
    """How q, or k, was made. x: the value that it was made from, with named dimensions; turned: the dimensions of what RoPE rotated."""

    x: Node
    names: Names
    rope: Rope | None = None
    turned: Names = BHSD
    norm: Node | None = None
    norm_last: bool = False
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Heads:
    q: Head
    k: Head

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*self.q.nodes, *self.k.nodes)


def read_heads(attention: Node) -> Heads | None:
    """The steps by which q and k of an attention were made, if `ops.qkv` can express them. None if there are no such steps, or something
    else reads their values too; and if neither q nor k comes from an FP8 linear: there is no GEMM whose layout `ops.qkv` would keep, and
    Inductor fuses the steps with their neighbors."""
    if not follows_linears(attention):
        return None
    q, k = (_read(x) for x in attention.args[:2])
    if q is None or k is None or not _alike(q, k):
        return None
    heads = Heads(q, k)
    inside = {*heads.nodes, attention}
    if any(user not in inside for n in heads.nodes for user in n.users) or written_between([*heads.nodes, attention]) is not None:
        return None
    return heads


def _read(value: Any) -> Head | None:
    """The steps back from q or k: at most one RoPE and one norm, in either order."""
    if tensor(value) is None or fake(value).dim() != 4:
        return None
    head = _before(Head(value, BHSD))
    if (found := _normalized(head)) is not None:
        head = replace(found, norm_last=True)
    if (rope := read_rope(head.x)) is not None and head.names[-1] == "d":
        head = _before(replace(head, x=rope.x, rope=rope, turned=head.names, nodes=(*head.nodes, *rope.nodes)))
    if head.norm is None:
        head = _normalized(head) or head
    return head if head.rope is not None or head.norm is not None else None


def _normalized(head: Head) -> Head | None:
    x = head.x
    if not is_call(x, ops.norm) or x.kwargs.get("dims", 1) != 1 or head.names[-1] != "d" or x.kwargs["out_dtype"] != fake(x.args[0]).dtype:
        return None
    return _before(replace(head, x=x.args[0], norm=x, nodes=(*head.nodes, x)))


def _before(head: Head) -> Head:
    """The value before transposes, copies and casts."""
    while isinstance(head.x, Node):
        x, names = head.x, head.names
        if (before := reordered(x, names)) is not None:
            names = before
        elif not is_method(x, "contiguous") and not is_call(x, torch.clone) and cast(x) is None:
            break
        source = x.args[0]
        if not isinstance(source, Node) or fake(source).dim() != 4:
            break
        head = replace(head, x=source, names=names, nodes=(*head.nodes, x))
    return head


def _alike(q: Head, k: Head) -> bool:
    """Whether q and k are prepared in the same way: by the same tables, and by norms that differ in their weights only."""
    if (q.rope is None) != (k.rope is None) or (q.norm is None) != (k.norm is None) or q.norm_last != k.norm_last:
        return False
    if q.norm is not None and k.norm is not None and dict(q.norm.kwargs) != dict(k.norm.kwargs):
        return False
    if q.rope is None or k.rope is None:
        return True
    same = (q.rope.rotary, q.rope.width, q.turned) == (k.rope.rotary, k.rope.width, k.turned)
    return same and same_table(q.rope.cos, k.rope.cos) and same_table(q.rope.sin, k.rope.sin)


def read_norms(graph: Graph) -> Iterator[Node]:
    """The norms of heads that become a part of `ops.qkv`."""
    if not any(is_call(n, ops.norm) and fake(n).dim() == 4 for n in graph.nodes):
        return
    for node in graph.nodes:
        if is_call(node, ops.attention) and (heads := read_heads(node)) is not None:
            yield from (head.norm for head in (heads.q, heads.k) if head.norm is not None)


def emit_qkv(graph: Graph, attention: Node, heads: Heads) -> None:
    """Puts an `ops.qkv` before an attention, in the layout that is wanted for it."""
    layout, like = attention.meta[LAYOUT], attention
    q, k = heads.q, heads.k
    with graph.inserting_before(attention):
        inputs: list[Any] = [emit_permuted(graph, h.x, [h.names.index(n) for n in BHSD], like) for h in (q, k)]
        inputs.append(attention.args[2] if layout.packing else None)
        attributes: dict[str, Any] = {"form": layout.form, "packing": layout.packing, "out_dtype": fake(attention.args[0]).dtype}
        if q.rope is not None:
            inputs += [_emit_table(graph, t, q.turned, like) for t in (q.rope.cos, q.rope.sin)]
            attributes |= {"rotary": q.rope.rotary, "width": q.rope.width}
        else:
            inputs += [None, None]
        if q.norm is not None and k.norm is not None:
            vectors = [[*n.args[1:], None, None][:2] for n in (q.norm, k.norm)]
            inputs += [vectors[0][0], vectors[1][0], vectors[0][1], vectors[1][1]]
            names = ("eps", "zero_centered", "round_before_weight")
            given: dict[str, Any] = {name: value for name, value in q.norm.kwargs.items() if name in names}
            attributes |= {"normalized": q.norm.kwargs["kind"], "norm_last": q.norm_last and q.rope is not None, **given}
        node = emit(graph, ops.qkv, inputs, attributes, like=like)
        values = node.meta[EXAMPLE]
        made = [emit(graph, operator.getitem, (node, i), like=like, value=value) for i, value in enumerate(values)]
    attention.meta[NOTES] = {**attention.meta.get(NOTES, {}), "heads": _described(q)}
    attention.args = (*made, *attention.args[len(made) :])
    erase_if_dead(graph, heads.nodes)


def kernels_write_gradients(attention: Node) -> bool:
    """Whether there are kernels that write the gradient of q, k and v as the FP8 gradient of the GEMM that made them: on a GPU."""
    return fake(attention).device.type == "cuda"


def emit_in_place(graph: Graph, attention: Node) -> None:
    """Puts an `ops.qkv` before an attention whose q, k and v come unchanged from one GEMM, for the sake of that GEMM's gradient."""
    layout, values = attention.meta[LAYOUT], [fake(x) for x in attention.args[:3]]
    attributes = {"form": layout.form, "packing": layout.packing, "out_dtype": values[0].dtype, "in_place": True}
    with graph.inserting_before(attention):
        node = emit(graph, ops.qkv, attention.args[:3], attributes, like=attention, value=values)
        made = [emit(graph, operator.getitem, (node, i), like=attention, value=value) for i, value in enumerate(values)]
    attention.args = (*made, *attention.args[3:])


def _described(head: Head) -> str:
    """What is done to q and k, for a report."""
    steps = []
    if head.rope is not None:
        size = int(fake(head.rope.x).shape[-1])
        some = "" if head.rope.width == size else f", {head.rope.width} of {size} features"
        steps.append(f"RoPE ({head.rope.rotary}{some})")
    if head.norm is not None:
        steps.insert(len(steps) if head.norm_last else 0, {"rms": "RMSNorm", "layer": "LayerNorm"}[head.norm.kwargs["kind"]])
    return ", then ".join(steps)


def _emit_table(graph: Graph, table: Table, names: Names, like: Node) -> Node:
    """A table that broadcasts against a value with dimensions `names`, rearranged to broadcast against [B, H, S, D]."""
    node = table.node
    if table.part is not None:
        node = emit(graph, torch.select, (emit(graph, torch.view_as_real, (node,), like=like), -1, table.part), like=like)
    for _ in range(4 - fake(node).dim()):
        node = emit(graph, torch.unsqueeze, (node, 0), like=like)
    return emit_permuted(graph, node, [names.index(n) for n in BHSD], like)
