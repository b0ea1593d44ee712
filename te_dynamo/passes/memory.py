"""How the operands of an attention are laid out when it runs: their fake values, recomputed from the GEMMs that they come from.

The value that a rule or Dynamo noted for a node may have outdated strides: linears that became one GEMM give views of one buffer. So the
nodes between the GEMM and the attention are run again on the GEMM's new result.
"""

from __future__ import annotations

from typing import Any

from torch import SymInt, Tensor
from torch.fx import Graph, Node

from te_dynamo.ir import site_of
from te_dynamo.ir.graph import example, fake, fake_mode_of, infer
from te_dynamo.ir.linear import GemmRows
from te_dynamo.passes.effects import storage
from te_dynamo.passes.weights import is_view
from te_dynamo.sites import module_path


class Structure:
    """What a value is computed from, back to GEMMs and inputs, without names: `key` is equal for the attentions of equal layers."""

    def __init__(self, value: Any) -> None:
        self.numbers: dict[Any, int] = {}  # of nodes and of memory, in the order in which they are met
        self.parts: list[Any] = []
        self.key = (self._of(value), *self.parts)

    def _of(self, value: Any) -> Any:
        if isinstance(value, Node):
            if value not in self.numbers:
                self.parts.append(self._of_node(value))
                self.numbers[value] = len(self.numbers)
            return (Node, self.numbers[value])
        if isinstance(value, slice):
            return (slice, self._of((value.start, value.stop, value.step)))
        return tuple(map(self._of, value)) if isinstance(value, (list, tuple)) else value

    def _of_node(self, node: Node) -> Any:
        value, op = example(node), site_of(node)
        tensors = tuple(self._of_tensor(t) for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor))
        if op is not None:
            return (op.name, tensors, tuple(op.all_attributes(node, None).items()))
        if node.op not in ("call_function", "call_method"):
            return tensors
        return (node.target, tensors, self._of(node.args), tuple((key, self._of(v)) for key, v in node.kwargs.items()))

    def _of_tensor(self, t: Tensor) -> Any:
        memory = self.numbers.setdefault(storage(t), len(self.numbers))
        sizes = (n.node.expr if isinstance(n, SymInt) else n for n in (*t.shape, *t.stride(), t.storage_offset()))
        return (memory, t.dtype, *sizes)


class ValuesInMemory:
    """The values of one graph's nodes, with the strides that they will have."""

    def __init__(self, graph: Graph) -> None:
        self.fake_mode = fake_mode_of(graph)
        self.values: dict[Node, Any] = {}

    def of(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in self.values:
            self.values[node] = self._made(node)
        return self.values[node]

    def _made(self, node: Node) -> Any:
        op = site_of(node)
        if op is not None and op.gemms(node):
            return self._of_gemms(node)
        if op is not None or node.op not in ("call_function", "call_method"):
            return example(node)
        if all(self.of(n) is example(n) for n in node.all_input_nodes):
            return example(node)
        return infer(node, self.fake_mode, self.of)

    def _of_gemms(self, node: Node) -> Any:
        """The results of a group of linears: views of one buffer if they are one GEMM."""
        op = site_of(node)
        assert op is not None
        attributes = op.all_attributes(node, None)
        with self.fake_mode:
            if not attributes.get("merged"):
                return example(node)
            rows, x = GemmRows.of(attributes), fake(node.args[0])
            buffers = [x.new_empty((*x.shape[:-1], sum(rows.sizes)), dtype=attributes["out_dtype"])]
            return op.outputs(attributes, buffers)


def described(q: Tensor, k: Tensor, v: Tensor) -> str:
    """How q, k and v are laid out, if that has no name."""
    return "as the model left it: strides " + ", ".join(str(tuple(t.stride())).replace(" ", "") for t in (q, k, v))


def first_copy(value: Any) -> str | None:
    """What first copies the elements of `value`, after the GEMM that made them, as text; None if nothing does."""
    found = None
    while isinstance(value, Node) and site_of(value) is None and value.all_input_nodes:
        if not is_view(value):
            found = value
        value = value.args[0] if isinstance(value.args[0], Node) else value.all_input_nodes[0]
    if found is None:
        return None
    path = module_path(found)
    return f"{found.name}" + (f" (in {path})" if path else "")
