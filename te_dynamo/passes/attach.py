"""Stage 5: the scale state becomes graph inputs.

Every site gets its place in the packed scales. A graph that trains gains four inputs, whatever the number of sites:
`te_scale` [F] and `te_grad_scale` [G], `te_grad_amax` [G] that backward writes into, and `te_sink` [G] whose "gradient"
carries the gradients' amaxes there. A sub-graph of a higher-order operator gains the slices that belong to it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.ir.graph import EXAMPLE, emit, fake_mode_of, is_call
from te_dynamo.lowering.fp8_attention import FORWARD_SLOTS, GRADIENT_SLOTS
from te_dynamo.lowering.functions import collect
from te_dynamo.passes.fuse import MEMBERS
from te_dynamo.passes.higher_order import calls
from te_dynamo.passes.plan import PLAN
from te_dynamo.passes.select import site_path
from te_dynamo.passes.weights import weight_of
from te_dynamo.state import SlotKey

SLOTS = "te_slots"
LINEAR_FORWARD, LINEAR_GRADIENT = ("input", "weight"), ("grad_output",)
ATTENTION_FORWARD = tuple(f"attention.{name}" for name in FORWARD_SLOTS)
ATTENTION_GRADIENT = tuple(f"attention.{name}" for name in GRADIENT_SLOTS)


@dataclass(frozen=True)
class Slots:
    """What a lowered site reads: the names of the packed scales' nodes and of its piece of the sink (names, since nodes do not
    survive a copy of the graph), and its offsets in the scales."""

    scale: str
    grad_scale: str | None
    sink: str | None
    f: int
    g: int


@dataclass
class Attached:
    """What a graph wants at a call: its slots in order, the number of forward and gradient slots."""

    keys: list[SlotKey] = field(default_factory=list)
    unions: tuple[list[list[int]], list[list[int]]] = field(default_factory=lambda: ([], []))  # places that move as one

    @property
    def forward(self) -> int:
        return sum(len(k.forward) for k in self.keys)

    @property
    def gradient(self) -> int:
        return sum(len(k.gradient) for k in self.keys)


@dataclass(frozen=True)
class _Item:
    """A node of this graph that needs slots: a site, or a call of a sub-graph."""

    node: Node
    keys: tuple[SlotKey, ...]
    unions: tuple[list[list[int]], list[list[int]]]  # places among its own slots

    def count(self, direction: str) -> int:
        return sum(len(getattr(k, direction)) for k in self.keys)


def attach(gm: GraphModule, *, trains: bool) -> Attached:
    """Adds the state's inputs to `gm` and to its sub-graphs, and puts `Slots` on every site that has state."""
    attached = _attach(gm, {}, trains=trains, top=True)
    gm.recompile()
    return attached


def _attach(gm: GraphModule, done: dict[int, Attached], *, trains: bool, top: bool) -> Attached:
    items = _items(gm, done, trains)
    attached = Attached([key for item in items for key in item.keys])
    if not attached.keys:
        return attached
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    size_f, size_g = attached.forward, attached.gradient
    with_gradient = trains and size_g > 0
    scale = _placeholder(gm, "te_scale", size_f, placeholders)
    grad_scale = sink = None
    pieces: list[Node | None] = [None] * len(items)
    if with_gradient:
        grad_scale = _placeholder(gm, "te_grad_scale", size_g, placeholders)
        grad_amax = _placeholder(gm, "te_grad_amax", size_g, placeholders) if top else None
        sink = _placeholder(gm, "te_sink", size_g, placeholders, requires_grad=True)
        pieces = _pieces(gm, sink, grad_amax, [i.count("gradient") for i in items])
    f = g = 0
    by_body = {call.node: call.body for call in calls(gm)}
    for item, piece in zip(items, pieces, strict=True):
        if item.node in by_body:
            _pass_slices(gm, item, scale, grad_scale, piece, f, g)
        else:
            item.node.meta[SLOTS] = Slots(scale.name, _name(grad_scale), _name(piece), f, g)
        for unions, more, start in zip(attached.unions, item.unions, (f, g), strict=True):
            unions += [[start + i for i in union] for union in more]
        f, g = f + item.count("forward"), g + item.count("gradient")
    return attached


def _name(node: Node | None) -> str | None:
    return None if node is None else node.name


def _items(gm: GraphModule, done: dict[int, Attached], trains: bool) -> list[_Item]:
    """Sites and sub-graph calls in the graph's order, with each weight's visits counted."""
    position = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    bodies = {call.node: call for call in calls(gm)}
    visits: Counter[tuple[int, tuple[str, ...]]] = Counter()

    def key(argument: int, like: SlotKey) -> SlotKey:
        ordinal = visits[argument, like.forward]
        visits[argument, like.forward] += 1
        return replace(like, argument=argument, ordinal=ordinal)

    items = []
    for node in gm.graph.nodes:
        keys: list[SlotKey] = []
        unions: tuple[list[list[int]], list[list[int]]] = ([], [])
        if node in bodies:
            call = bodies[node]
            if id(call.body) not in done:
                done[id(call.body)] = _attach(call.body, done, trains=trains, top=False)
            keys = [key(position[call.operands[k.argument]], k) for k in done[id(call.body)].keys]
            unions = done[id(call.body)].unions
        elif _has_state(node, trains):
            keys = [key(position[root], like) for root, like in _roles(node)]
            unions = _unions(node)
        if keys:
            items.append(_Item(node, tuple(keys), unions))
    return items


def _has_state(node: Node, trains: bool) -> bool:
    plan = node.meta.get(PLAN)
    return plan is not None and plan.recipe is not None and plan.recipe.stateful and plan.trains == trains


def _roles(node: Node) -> list[tuple[Node, SlotKey]]:
    """(weight's placeholder, what it is asked for) for each member of a site."""
    recipe = node.meta[PLAN].recipe
    if is_call(node, ops.linears, ops.norm_linears):
        like = SlotKey(0, 0, LINEAR_FORWARD, LINEAR_GRADIENT, recipe)
        return [(weight_of(w).root, like) for w in _weights(node)]
    anchor = anchor_of(node)
    if anchor is None:
        return []
    root, path = anchor
    return [(root, SlotKey(0, 0, ATTENTION_FORWARD, ATTENTION_GRADIENT, recipe, _way(path, site_path(node))))]


def _weights(linears: Node) -> Sequence[Any]:
    return linears.args[3 if linears.target is ops.norm_linears else 1]  # type: ignore[return-value]


def _unions(node: Node) -> tuple[list[list[int]], list[list[int]]]:
    """Which slots of a site move as one: those of its one input, and where it is one GEMM, of its weights and gradients; those
    of q, k and v where a kernel takes one scale for the three."""
    if is_call(node, ops.attention):
        return ([[0, 1, 2]] if node.meta[PLAN].lies_as else []), []
    if not is_call(node, ops.linears, ops.norm_linears) or len(_weights(node)) == 1:
        return [], []
    members = range(len(_weights(node)))
    inputs = [[2 * i for i in members]]
    return (inputs + [[2 * i + 1 for i in members]], [list(members)]) if node.kwargs["merged"] else (inputs, [])


def anchor_of(attention: Node) -> tuple[Node, str] | None:
    """The weight by which an attention's slots are found, and its path: that of the nearest FP8 linears before it, else after."""
    nodes = list(attention.graph.nodes)
    here = nodes.index(attention)
    for node in [*reversed(nodes[:here]), *nodes[here:]]:
        if is_call(node, ops.linears, ops.norm_linears):
            ref = weight_of(_weights(node)[0])
            return None if ref is None else (ref.root, node.meta[MEMBERS][0].get("te_path", ""))
    return None


def _way(start: str, end: str) -> tuple[int, tuple[str, ...]]:
    """How to get from one path to another: how many names to take off, and which to put on."""
    here, there = ([p for p in path.split(".") if p] for path in (start, end))
    common = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    return len(here) - common, tuple(there[common:])


def _placeholder(gm: GraphModule, name: str, size: int, others: list[Node], requires_grad: bool = False) -> Node:
    """A new last input. What its meta says is what AOTAutograd and Dynamo want to read of one that Dynamo did not make."""
    graph = gm.graph
    with graph.inserting_after(others[-1]):
        node = graph.placeholder(name)
    others.append(node)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    device = next(n.meta[EXAMPLE].device for n in others if isinstance(n.meta.get(EXAMPLE), torch.Tensor))
    node.meta[EXAMPLE] = fake_vector(fake_mode_of(graph), size, device, requires_grad)
    return node


def fake_vector(fake_mode: Any, size: int, device: torch.device, requires_grad: bool = False) -> torch.Tensor:
    """The fake value of a state input; made from a real one, or its size would become symbolic."""
    if not hasattr(fake_mode, "from_tensor"):
        return torch.zeros(size, device=device, requires_grad=requires_grad)
    with fake_mode:
        return torch.zeros(size, device=device, requires_grad=requires_grad)


def _pieces(gm: GraphModule, sink: Node, grad_amax: Node | None, sizes: list[int]) -> list[Node | None]:
    graph = gm.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_before(last.next):
        if grad_amax is None:
            split = emit(graph, torch.split, (sink, sizes), like=last)
        else:
            split = emit(graph, collect, (sink, grad_amax, sizes), like=last)
        return [emit(graph, operator.getitem, (split, i), like=last) for i in range(len(sizes))]


def _pass_slices(gm: GraphModule, item: _Item, scale: Node, grad_scale: Node | None, piece: Node | None, f: int, g: int) -> None:
    """Hands a sub-graph call its part of the state."""
    graph, node = gm.graph, item.node
    with graph.inserting_before(node):
        extra = [emit(graph, operator.getitem, (scale, slice(f, f + item.count("forward"))), like=node)]
        if grad_scale is not None:
            assert piece is not None
            extra.append(emit(graph, operator.getitem, (grad_scale, slice(g, g + item.count("gradient"))), like=node))
            extra.append(piece)
    node.args = (*node.args, *extra)
