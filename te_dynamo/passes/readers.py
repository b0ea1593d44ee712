"""Stage 3, gradients: which operation alone reads a GEMM's output, so that it could hand over the GEMM's gradient quantized."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from te_dynamo import ops
from te_dynamo.ir import op_of
from te_dynamo.ir.graph import fake, is_call, same_size, tensor
from te_dynamo.ir.meta import READER
from te_dynamo.passes.effects import storage, written_between
from te_dynamo.passes.weights import is_view


@dataclass(frozen=True)
class Reader:
    """node: the name of the operation that reads all of a GEMM's output, as nothing else does. starts, widths: the columns that each of the
    operation's first inputs consists of."""

    node: str
    starts: tuple[int, ...]
    widths: tuple[int, ...]


class _Columns(NamedTuple):
    """The columns of a group of linears that an input is a view of; chain: the nodes in between."""

    group: Node
    start: int
    width: int
    chain: tuple[Node, ...]


def note_readers(graph: Graph, where: dict[Node, tuple[int, bool]]) -> None:
    """Puts a `Reader` on each group of linears that is one GEMM and has one, in the same region."""
    for node in graph.nodes:
        op = op_of(node)
        found = _read_alone(node, op.reads, where) if op is not None else []
        if found:
            found[0].group.meta[READER] = Reader(node.name, tuple(c.start for c in found), tuple(c.width for c in found))


def reads_a_gemm_alone(node: Node, inputs: int, where: dict[Node, tuple[int, bool]]) -> bool:
    """Whether the first inputs of a node are a GEMM's whole output, and nothing else reads it."""
    return bool(_read_alone(node, inputs, where))


def _read_alone(node: Node, inputs: int, where: dict[Node, tuple[int, bool]]) -> list[_Columns]:
    """The columns of a GEMM's output that the first inputs of a node are, if the node alone reads it, all of it, in the same region; else
    []."""
    given = node.args[:inputs]
    found = [c for c in map(_columns, given) if c is not None]
    if not found or len(found) < len(given) or len({c.group for c in found}) > 1:
        return []
    group = found[0].group
    alone = _are_all(found, sum(_sizes(group))) and _is_alone(found, node)
    return found if alone and where[group] == where[node] and written_between([group, node]) is None else []


def _are_all(found: list[_Columns], whole: int) -> bool:
    """Whether each column is read, once."""
    parts = sorted((c.start, c.start + c.width) for c in found)
    return [start for start, _ in parts] + [whole] == [0] + [end for _, end in parts]


def _is_alone(found: list[_Columns], reader: Node) -> bool:
    inside = {reader, *(n for c in found for n in c.chain)}
    return all(user in inside for n in (found[0].group, *inside - {reader}) for user in n.users)


def _columns(value: Any) -> _Columns | None:
    """The columns of a GEMM's output that `value` is a view of, its other dimensions being all tokens; None if it is no such view."""
    node, chain = value, list[Node]()
    while is_view(node) and not is_call(node.args[0], ops.linears):
        chain.append(node)
        node = node.args[0]
    if not (is_call(node, operator.getitem) and is_call(node.args[0], ops.linears)):
        return None
    group, member = node.args
    sizes = _sizes(group)
    if (len(sizes) > 1 and not group.kwargs["merged"]) or group.kwargs["interleave"]:
        return None
    output, part = fake(node), tensor(value)
    if part is None or part.dtype != output.dtype or storage(value) != storage(node):
        return None
    dimensions = zip(part.stride(), part.shape, strict=True)
    width = 1
    for stride, size in sorted((stride, int(size)) for stride, size in dimensions if _is_inside(stride, sizes[member])):
        if stride != width and size != 1:
            return None
        width *= size
    if not same_size(part.numel() * sizes[member], output.numel() * width):  # only some of the tokens
        return None
    offset = part.storage_offset() - output.storage_offset()
    if not _is_number(offset) or not 0 <= offset <= sizes[member] - width:
        return None
    return _Columns(group, sum(sizes[:member]) + int(offset), width, (*chain, node))


def _sizes(group: Node) -> list[int]:
    """The number of columns of each linear in a group."""
    weights: Any = group.args[1]
    return [int(fake(w).shape[0]) for w in weights]


def _is_number(size: Any) -> bool:
    return type(size) is int


def _is_inside(stride: Any, pitch: int) -> bool:
    """Whether a dimension runs along a row. One with a symbolic stride runs from row to row."""
    return _is_number(stride) and stride < pitch
