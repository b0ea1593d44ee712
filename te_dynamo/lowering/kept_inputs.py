"""A pass over the joint graph that keeps in FP8 what backward reads of an FP8 linear's result.

An activation (SwiGLU, GELU, ..., with biases and dropout) stands between two linears. Its backward reads the result of the first, the
largest tensor of a layer. If everything that forward computes from this result ends in FP8 casts, through element-wise operations only,
forward also writes a copy in FP8, from which backward computes what it reads:

    forward    v ─▶ silu(gate) * up ─▶ FP8, as before        backward    v8 ─▶ v' ─▶ what it read of v, of silu(gate), ...
               └─▶ v8, E4M3 with a scale for each block

The kernel that computes the activation reads v anyway: v8 costs one write, and backward reads half as much. On a CPU, C++ of our own
packs and unpacks: Inductor's code for it takes as long to compile as a quarter of the model. The activation is found on the joint graph,
so no pattern for it is needed. Results that anything else reads, such as an attention or a residual sum, stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg, traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from te_dynamo.lowering.aten import COPIES, GraphPass, alike, aten, calls, is_backward, is_elementwise, is_gathered, keeps_shape
from te_dynamo.lowering.fp8 import E4M3, E5M2
from te_dynamo.lowering.packed import SIZES, in_blocks, pack, size_of_blocks, unpack
from te_dynamo.lowering.tolerant import divides, tolerates

MARK = "te_dynamo::kept_in_fp8"  # in the nodes' `custom` metadata, which tracing copies
REDUCTIONS = {aten.amax, aten.amin, aten.sum, aten.mean, aten.var, aten.var_mean, aten.any, aten.all}
OF_THE_SHAPE = {aten.rand_like, aten.randn_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like}
SATURATING = {aten.clamp, aten.clamp_min, aten.clamp_max, aten.gt, aten.lt, aten.isinf, aten.where, aten.masked_fill}
SCALING = SATURATING | {aten.mul, aten.div, aten.clone, torch.ops.prims.convert_element_type}


def kept_in_fp8(y: Tensor) -> Tensor:
    """`y` [..., N], the result of a linear, through a marked view [T, N], which the pass looks for."""
    meta = traceback.current_meta
    before = meta.get("custom")
    meta["custom"] = {**(before or {}), MARK: True}
    try:
        rows = y.view(-1, y.shape[-1])
    finally:
        if before is None:
            del meta["custom"]
        else:
            meta["custom"] = before
    return rows.view(y.shape)


def amax_of_blocks(x: Tensor) -> Tensor:
    """[T, N], without NaN -> [T * blocks]."""
    return aten.view.default(in_blocks(x).amax(-1), [-1])


class ActivationsInFP8(GraphPass):
    def __call__(self, graph: Graph) -> None:
        results = [_with_bias(n) for n in graph.nodes if _is_result(n)]
        if results:
            _Rewrite(graph, results).run()
            graph.lint()


def _is_result(node: Node) -> bool:
    """Whether it is marked. Nodes that activation checkpointing decides about are left to it."""
    if node.target is not aten.view.default or MARK not in node.meta.get("custom", ()) or "recompute" in node.meta:
        return False
    return not is_backward(node) and node.meta["val"].dtype in (torch.float32, torch.bfloat16, torch.float16)


def _with_bias(rows: Node) -> Node:
    """The sum of a result and the bias of each row's expert, if nothing else reads the result: backward reads functions of the sum, so that
    is what is kept. Of no other sum: a mask would make the scale of its block too large. On a CPU an operator packs the result.
    """
    node = rows
    while len(node.users) == 1 and not _is_an_operator_s(rows):
        (user,) = node.users
        if calls(user, aten.add) and len(user.args) == 2 and not user.kwargs and not is_backward(user):
            return user if alike(user, rows) and "recompute" not in user.meta and any(map(is_gathered, user.args)) else rows
        if not keeps_shape(user):
            return rows
        node = user
    return rows


def _is_an_operator_s(node: Node) -> bool:
    """Whether it is a result of an opaque site (as on a CPU), reshaped, or a part of one."""
    while node.target is operator.getitem or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view):
        node = node.all_input_nodes[0]
    return node.target is torch.ops.te_dynamo.site_fwd.default


def _ends(node: Node) -> bool:
    """Whether its result is in FP8, or small, or does not depend on its inputs' values: backward can read nothing from it in high
    precision."""
    if _ends_in_fp8(node):
        return True
    return calls(node, *REDUCTIONS, *OF_THE_SHAPE)


def _ends_in_fp8(node: Node) -> bool:
    return node.target is torch.ops.te_dynamo.site_fwd.default or _is_fp8(node)


def _scales(node: Node) -> bool:
    return calls(node, *SCALING, *COPIES) or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view)


def _wants_the_largest(node: Node) -> bool:
    """Whether it reads only the largest element of each of its inputs."""
    return node.target is torch.ops.te_dynamo.largest.default or (node.target is aten.amax.default and len(node.args) == 1)


def _is_fp8(node: Node) -> bool:
    made = node.meta.get("val")
    return any(isinstance(t, Tensor) and t.dtype in (E4M3, E5M2) for t in (made if isinstance(made, (list, tuple)) else [made]))


class _Rewrite:
    """The rewrite of one graph, in which `results` are marked."""

    def __init__(self, graph: Graph, results: Sequence[Node]) -> None:
        self.graph, self.nodes, self.fake_mode = graph, list(graph.nodes), results[0].meta["val"].fake_mode
        closed = self._closed()
        self.results = {r for r in results if closed[r]}
        self.inside = self._inside()
        scaled = self._scaled_to_fp8()
        while unfit := self._read_by(
            {n for n in self.inside - self.results - scaled if not tolerates(n, self.inside)}
            | self._inconsistent(scaled)
            | self._singular()
        ):
            self.results -= unfit
            self.inside = self._inside()
        self.kept = {part: one for r in self.results for part, one in (_parts(r) or {r: r}).items()}  # by what reads it
        self.remade: dict[Node, Node] = {}  # node inside -> what backward reads in its place
        self.traced: dict[Any, GraphModule] = {}

    def run(self) -> None:
        """Also takes the amaxes of the nodes inside by blocks, so that one kernel does it all."""
        for node in self.nodes:
            if is_backward(node):
                for value in node.all_input_nodes:
                    node.replace_input_with(value, self._remake(value, node))

        if self.remade:
            for node in self.inside:
                node.meta.pop("recompute", None)  # backward no longer reads it, so there is nothing to recompute
            for node in self.nodes:
                if node.target is aten.amax.default and node.args[0] in self.inside:
                    self._measure_by_blocks(node)

    def _measure_by_blocks(self, amax: Node) -> None:
        """A row amax [T] of which only the largest element is read becomes block amaxes [T * blocks]."""
        casts = [u for u in amax.users if u.target is torch.ops.prims.convert_element_type.default]
        readers = {u for n in (amax, *casts) for u in n.users} - {*casts}
        if amax.args[1:] != ([-1],) or not all(map(_wants_the_largest, readers)):
            return
        (rows,) = amax.all_input_nodes
        (new,) = self._inline(self._traced(amax_of_blocks, rows.meta["val"]), [rows], amax)
        amax.replace_all_uses_with(new)
        self.graph.erase_node(amax)
        for cast in casts:
            cast.meta["val"] = self._value(cast)

    def _closed(self) -> dict[Node, bool]:
        """For each forward node, whether everything that forward computes from it ends (see `_ends`)."""
        closed: dict[Node, bool] = {}
        for node in reversed(self.nodes):
            closed[node] = all(is_backward(u) or _ends(u) or (is_elementwise(u) and closed[u]) for u in node.users)
        return closed

    def _inside(self) -> set[Node]:
        """The results and what forward computes from them element-wise, up to the FP8 values that are kept."""
        inside = set(self.results)
        for node in self.nodes:
            kept = node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE
            if not kept and is_elementwise(node) and not is_backward(node) and not inside.isdisjoint(node.all_input_nodes):
                inside.add(node)
        return inside

    def _inconsistent(self, scaled: set[Node]) -> set[Node]:
        """Results that backward would read in FP8 together with an exact statistic of them, or of what forward computes from them: a norm's
        mean, a softmax's sum, a maximum to be located. The difference between the two would be rounding error. So would that from a mean
        which backward takes again."""
        statistics, remade = set[Node](), set[Node]()
        again, averaged = self._computed_again()
        for node in self.nodes:
            inputs = node.all_input_nodes
            if node in self.inside or _ends_in_fp8(node) or any(map(_is_fp8, inputs)):
                continue
            of_forward = [n for n in inputs if n in statistics or (n in self.inside and not is_backward(node))]
            if of_forward and (not is_backward(node) or len(of_forward) == len(inputs)):  # in backward: only another view of it
                statistics.add(node)
        bad = set[Node]()
        for node in reversed(self.nodes):
            inputs = node.all_input_nodes
            read = [n for n in inputs if n in self.inside or n in again]
            if is_backward(node) or node in remade:
                remade |= {n for n in read if n in self.inside and n not in self.results}
                compares = not statistics.isdisjoint(inputs) and node not in scaled
                read = [n for n in read if not _is_fp8(n)]  # whose scale is a factor of what is read
                if read and (compares or (calls(node, aten.add, aten.sub) and not averaged.isdisjoint(inputs))):
                    bad |= {node, *read}
        return bad

    def _singular(self) -> set[Node]:
        """Where backward divides by what it computes from nodes inside."""
        rounded, found = set(self.inside), set[Node]()
        for node in filter(is_backward, self.nodes):
            if divides(node, rounded):
                found.add(node)
            if is_elementwise(node) and not rounded.isdisjoint(node.all_input_nodes):
                rounded.add(node)
        return found

    def _computed_again(self) -> tuple[set[Node], set[Node]]:
        """What backward computes from nodes inside alone: element-wise, and by reductions."""
        again, averaged = set[Node](), set[Node]()
        for node in self.nodes:
            inputs = node.all_input_nodes
            if is_backward(node) and inputs and all(n in self.inside or n in again or n in averaged for n in inputs):
                of_averages = not averaged.isdisjoint(inputs) and all(n in averaged for n in inputs)
                (again if is_elementwise(node) and not of_averages else averaged).add(node)
        return again, averaged

    def _read_by(self, nodes: set[Node]) -> set[Node]:
        """The results from which these are computed."""
        reached = set(nodes)
        for node in reversed(self.nodes):
            if node in reached:
                reached |= {n for n in node.all_input_nodes if n in self.inside or is_backward(n)}
        return reached & self.results

    def _scaled_to_fp8(self) -> set[Node]:
        """Nodes that are scaled and cast to FP8. Their scale is a statistic too, but a product keeps the relative error of its factors."""
        scaled = set[Node]()
        for node in reversed(self.nodes):
            if _is_fp8(node) or (_scales(node) and node.users and all(u in scaled for u in node.users)):
                scaled.add(node)
        return scaled

    def _remake(self, value: Node, before: Node) -> Node:
        """`value`, recomputed for backward from what is kept in FP8."""
        if value not in self.inside:
            return value
        value = self.kept.get(value, value)
        if value not in self.remade:
            if value in self.kept:
                self.remade[value] = self._kept_in_fp8(value, before)
            else:
                with self.graph.inserting_before(before):
                    new = self.graph.node_copy(value, lambda n: self._remake(n, before))
                self.remade[value] = _of_backward(new)
        return self.remade[value]

    def _kept_in_fp8(self, result: Node, before: Node) -> Node:
        t = result.meta["val"]
        ops, by_operator = torch.ops.te_dynamo, t.device.type == "cpu" and _is_an_operator_s(result)
        to_fp8, back_from = (ops.pack_kept, ops.unpack_kept) if by_operator else (pack, unpack)
        kept = [self._saved(n) for n in self._inline(self._traced(to_fp8, t), [result], result.next)]
        back = self._traced(back_from, *(n.meta["val"] for n in kept), dtype=t.dtype)
        return self._inline(back, kept, before, _of_backward)[0]

    def _saved(self, node: Node) -> Node:
        """`node`, through an operator that cannot be fused, so that the partitioner takes it to be in memory: what could be fused weighs
        twice as much, and the result itself would be saved instead. MUST_SAVE counts only for nodes that the results of forward are
        computed from."""
        t = node.meta["val"]
        with self.graph.inserting_after(node):
            new = self.graph.call_function(torch.ops.prims.inductor_force_stride_order.default, (node, list(t.stride())))
        new.meta |= {"val": t, "partitioner_tag": "is_forward"}
        return new

    def _traced(self, function: Callable[..., Any], *tensors: Tensor, **keywords: Any) -> GraphModule:
        """`function` traced for tensors like these, in operators that Inductor accepts: for two rows, but valid for any number."""
        from torch._inductor.decomposition import select_decomp_table

        key = (function, *keywords.values(), *((t.shape[1:], t.dtype, t.device) for t in tensors))
        if key not in self.traced:
            with self.fake_mode:
                rows = [torch.empty((2, *t.shape[1:]), dtype=t.dtype, device=t.device) for t in tensors]
                self.traced[key] = make_fx(partial(function, **keywords), select_decomp_table())(*rows)
        return self.traced[key]

    def _inline(self, gm: GraphModule, inputs: Sequence[Node], before: Node, note: Callable[[Node], Node] = lambda n: n) -> list[Node]:
        """Copies the nodes of `gm`, with `inputs` for its placeholders, before a node; returns its results."""
        copies, given = dict[Node, Node](), iter(inputs)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op != "output":
                with self.graph.inserting_before(before):
                    copies[node] = note(self.graph.node_copy(node, copies.__getitem__))
                copies[node].meta["val"] = self._value(copies[node])
        results = gm.graph.output_node().args[0]
        return [copies[n] for n in (results if isinstance(results, (list, tuple)) else [results])]

    def _value(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.fake_mode:
            return node.target(*args, **kwargs)


def _parts(rows: Node) -> dict[Node, Node]:
    """The columns of a matrix, such as gate and up, if all reads of it are of these; else none. Each is then kept by itself, by the kernel
    that reads all of them to compute one element of the activation: that kernel does not go over the whole matrix. To each node that
    reads columns belongs the first one that reads the same."""
    columns = _columns(rows)
    first: dict[range, Node] = {}
    for node, read in columns.items():
        first.setdefault(read, node)
    overlap = sum(map(len, first)) > len(set(chain(*first)))  # some columns would be kept twice
    whole = any(is_backward(n) or _is_an_operator_s(n) or size_of_blocks(len(c)) not in SIZES for n, c in columns.items())
    return {} if overlap or whole else {node: first[read] for node, read in columns.items()}


def _columns(rows: Node) -> dict[Node, range]:
    """What reads only some columns of a matrix, and which, if nothing else reads it; else none."""
    found: dict[Node, range] = {}
    for user in rows.users:
        if keeps_shape(user) and not is_backward(user):
            columns = _columns(user)
        else:
            columns = _taken(user, range(rows.meta["val"].shape[1]))
        if not columns:
            return {}
        found |= columns
    return found


def _taken(node: Node, columns: range) -> dict[Node, range]:
    """Which of a matrix's columns a slice or the parts of a split are, where that is known."""
    if calls(node, aten.slice) and node.args[1:2] in ((1,), (-1,)):
        bounds: list[Any] = [*node.args[2:], None, None, None][:3]
        return {} if any(isinstance(bound, Node) for bound in bounds) else {node: columns[slice(*bounds)]}
    if calls(node, aten.split, aten.split_with_sizes) and node.args[2:] in ((1,), (-1,)):
        widths = [part.shape[1] for part in node.meta["val"]]
        starts = [*accumulate(widths, initial=0)]
        known = all(isinstance(width, int) for width in widths)
        return {part: columns[starts[part.args[1]] : starts[part.args[1] + 1]] for part in node.users} if known else {}
    return {}


def _of_backward(node: Node) -> Node:
    node.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "partitioner_tag": "is_backward"}
    return node
