"""What a gated activation's gradient is computed from, read again by each kernel that needs the gradient, which is not stored.

Inductor stores an expression of more than 30 operations or 8 reads, and one of 5 reads that several nodes read. The gradient of a clamped
SwiGLU (gpt-oss) is such an expression: two kernels would compute a half each, and store it in 16 bits, for the FP8 cast and the sums of the
biases' gradients to read. In one node with its reader, it is one kernel: Inductor decides what to store between the nodes of its own graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from te_dynamo.ir.sizes import product
from te_dynamo.lowering.aten import GraphPass, aten, calls, is_elementwise
from te_dynamo.lowering.quantize_rows import quantize_rows  # noqa: F401  (registers the operator)

LARGEST = 200  # evaluations of a node: as often as it is read, since Inductor knows no variables within an expression


class Inline(Interpreter):
    """Lowers a graph to nodes of Inductor's, nothing of which is stored in between."""

    def run_node(self, node: Node) -> Any:
        from torch._inductor.virtualized import V

        size = node.meta.get("val")
        if node.op == "call_function" and isinstance(size, torch.SymInt):
            return size.node.expr
        with V.graph.set_current_node(node):
            return super().run_node(node)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        from torch._inductor.ir import ConcatKernel, TensorBox
        from torch._inductor.lowering import lowerings

        if target is aten.cat.default:  # each part in its place; else each element would choose its part
            return TensorBox(ConcatKernel.create(*args))
        return lowerings[target](*args, **kwargs) if target in lowerings else target(*args, **kwargs)


class InlineGradients(GraphPass):
    """Over the graph that Inductor lowers."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.te_dynamo.quantize_rows.default):
            inside, readers = _expression(node)
            if inside and _evaluations(inside) <= LARGEST and _reads_less(node, inside):
                for reader in readers:
                    _merge(graph, reader, inside)
                graph.eliminate_dead_code()


def _expression(quantize: Node) -> tuple[set[Node], list[Node]]:
    """What is computed element by element only for a quantization by rows, and for sums into rows of zeros (the gradient of a bias that a
    router chose): the nodes inside, and those that read them. Nothing if the matrix itself has other readers."""
    parts = [p for p in quantize.args[0] if _is_computed(p)]
    computed, todo = set[Node](), list(parts)
    while todo:
        node = todo.pop()
        if node not in computed:
            computed.add(node)
            todo += filter(_is_computed, node.all_input_nodes)
    inside, readers = set[Node](), dict[Node, None]()
    for node in reversed(quantize.graph.nodes):
        read_by = [user for user in node.users if user not in inside]
        if node in computed and all(user is quantize or _sums(user, computed) for user in read_by):
            inside.add(node)
            readers |= dict.fromkeys(read_by)
    return (inside, [*readers]) if parts and inside.issuperset(parts) else (set(), [])


def _is_computed(node: Node) -> bool:
    from torch._inductor.lowering import lowerings

    if node.target is operator.getitem:
        return _is_computed(node.args[0])
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    if any(isinstance(v, torch.Tensor) and v.is_complex() for v in values):
        return False
    computed = node.target in lowerings and not calls(node, aten.cat, aten.as_strided)
    return computed and (is_elementwise(node) or calls(node, aten.slice_scatter))


def _evaluations(inside: Collection[Node]) -> int:
    """How many nodes Inductor evaluates for the longest expression, each as often as it is read; no longer exact above `LARGEST`."""
    of = dict[Node, int]()
    for node in next(iter(inside)).graph.nodes:
        if node in inside:
            of[node] = 1 + sum(of[n] for n in tree_leaves((node.args, node.kwargs)) if isinstance(n, Node) and n in inside)
            if of[node] > LARGEST:
                break
    return max(of.values())


def _sums(node: Node, inside: Collection[Node]) -> bool:
    """Whether it adds values from inside to rows of zeros, which Inductor need not copy."""
    summed = calls(node, aten.index_put) and node.args[3:] == (True,) and node.args[2] in inside
    return summed and _is_filled(node.args[0]) and all(n is node.args[2] or n not in inside for n in node.all_input_nodes)


def _reads_less(quantize: Node, inside: Collection[Node]) -> bool:
    """Whether reading what the matrix is computed from takes no more bytes than writing and reading the matrix."""
    given = {n for inner in inside for n in inner.all_input_nodes if n not in inside and not _is_filled(n)}
    return sum(map(_bytes, given)) <= 2 * sum(map(_bytes, quantize.args[0]))


def _is_filled(node: Node) -> bool:
    return node.op == "call_function" and not node.all_input_nodes


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return product(value.shape) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _merge(graph: Graph, reader: Node, inside: Collection[Node]) -> None:
    """Replaces `reader` by one node that computes it from what is outside."""
    own, copies, given = Graph(), dict[Node, Node](), list[Node]()

    def copied(node: Node) -> Node:
        if node not in copies:
            if node in inside or node is reader:
                copies[node] = own.node_copy(node, copied)
            else:
                given.append(node)
                copies[node] = own.placeholder(node.name)
        return copies[node]

    own.output(copied(reader))
    with graph.inserting_before(reader):
        merged = graph.call_function(_lowering(GraphModule({}, own)), tuple(given))
    merged.meta = dict(reader.meta)
    reader.replace_all_uses_with(merged)
    graph.erase_node(reader)


def _lowering(graph: GraphModule) -> Callable[..., Any]:
    """A function that Inductor calls to lower a node, instead of looking for the lowering of an operator."""

    def inlined(*args: Any) -> Any:
        return Inline(graph).run(*args)

    inlined._inductor_lowering_function = True  # type: ignore[attr-defined]
    inlined._inductor_lowering_output_metadata_fn = graph.forward  # type: ignore[attr-defined]  # since torch 2.15: for its example
    return inlined
