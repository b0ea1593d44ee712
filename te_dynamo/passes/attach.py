"""Stage 5: the scale state becomes graph inputs.

Every site gets its place in the packed scales. A training graph gains three inputs, whatever the number of sites (see
`te_dynamo.ir.state_inputs`); an inference graph gains only the first. A sub-graph of a higher-order operator gains the slices that
belong to it.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from te_dynamo.ir import site_of
from te_dynamo.ir.graph import EXAMPLE, emit, fake_mode_of
from te_dynamo.ir.meta import MEMBERS, PATH, PLAN, SLOTS, site_path
from te_dynamo.ir.op import ScaledTensor
from te_dynamo.ir.state_inputs import StateInput
from te_dynamo.passes.higher_order import calls
from te_dynamo.passes.weights import weight_of_gemm
from te_dynamo.state import SlotKey

Unions = tuple[list[list[int]], list[list[int]]]  # positions that share a scale, in forward and in gradient


@dataclass(frozen=True)
class Slots:
    """What a lowered site reads: the names of the packed scales' nodes and of its slice of the sink (names, since nodes do not survive a
    copy of the graph), and the offsets of its own scales."""

    scale: str
    grad_scale: str | None
    sink: str | None
    start: int
    grad_start: int

    def __str__(self) -> str:
        return f"scale {self.start}, grad_scale {self.grad_start}"


@dataclass
class Attached:
    """What a graph needs at a call: its slots in order, the number of forward and gradient slots."""

    keys: list[SlotKey] = field(default_factory=list)
    unions: Unions = field(default_factory=lambda: ([], []))

    @property
    def forward(self) -> int:
        return sum(len(k.forward) for k in self.keys)

    @property
    def gradient(self) -> int:
        return sum(len(k.gradient) for k in self.keys)


@dataclass(frozen=True)
class _Item:
    """A node of this graph that needs slots: a site, or a call of a sub-graph. unions: among its own slots."""

    node: Node
    keys: tuple[SlotKey, ...]
    unions: Unions

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
    scale = _placeholder(gm, StateInput.SCALE, size_f, placeholders)
    grad_scale = sink = None
    pieces: list[Node | None] = [None] * len(items)
    if with_gradient:
        grad_scale = _placeholder(gm, StateInput.GRAD_SCALE, size_g, placeholders)
        sink = _placeholder(gm, StateInput.SINK, size_g, placeholders)
        pieces = _pieces(gm, sink, [i.count("gradient") for i in items])
    start = grad_start = 0
    by_body = {call.node: call.body for call in calls(gm)}
    for item, piece in zip(items, pieces, strict=True):
        if item.node in by_body:
            _pass_slices(gm, item, scale, grad_scale, piece, start, grad_start)
        else:
            item.node.meta[SLOTS] = Slots(scale.name, _name(grad_scale), _name(piece), start, grad_start)
        for unions, more, first in zip(attached.unions, item.unions, (start, grad_start), strict=True):
            unions += [[first + i for i in union] for union in more]
        start, grad_start = start + item.count("forward"), grad_start + item.count("gradient")
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
        unions: Unions = ([], [])
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
    return plan is not None and plan.has_state and plan.trains == trains


def _roles(node: Node) -> list[tuple[Node, SlotKey]]:
    """(the weight's placeholder, the slots that are asked of it) for each member of a site."""
    op, recipe = site_of(node), node.meta[PLAN].recipe
    assert op is not None
    like = SlotKey(0, 0, op.roles.saved_forward, op.roles.saved_gradient, recipe)
    gemms = op.gemms(node)
    if gemms:
        return [(weight_of_gemm(gemm.weight).root, like) for gemm in gemms]
    anchor = anchor_of(node)
    return [] if anchor is None else [(anchor[0], replace(like, route=_route(anchor[1], site_path(node))))]


def _unions(node: Node) -> Unions:
    """Which slots of a site share a scale: as its operation says, and as the kernels that compute it require."""
    op, plan = site_of(node), node.meta[PLAN]
    assert op is not None
    roles = op.roles
    shared = [*op.shared(op.attributes(node), len(op.gemms(node))), *([ScaledTensor(0, role) for role in group] for group in plan.shared)]
    unions: Unions = ([], [])
    for group in shared:
        unions[group[0].role not in roles.forward].append([roles.place(slot.role, slot.member) for slot in group])
    return unions


def anchor_of(site: Node) -> tuple[Node, str] | None:
    """The weight with which the slots of a site without weights are kept, and its path: that of the nearest FP8 GEMMs before the site, else
    after it."""
    nodes = list(site.graph.nodes)
    here = nodes.index(site)
    for node in [*reversed(nodes[:here]), *nodes[here:]]:
        op = site_of(node)
        gemms = op.gemms(node) if op is not None else ()
        if gemms:
            ref = weight_of_gemm(gemms[0].weight)
            return None if ref is None else (ref.root, node.meta[MEMBERS][0].get(PATH, ""))
    return None


def _route(start: str, end: str) -> tuple[int, tuple[str, ...]]:
    """The way from one path to another: how many names to strip, and which to append."""
    here, there = ([p for p in path.split(".") if p] for path in (start, end))
    common = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    return len(here) - common, tuple(there[common:])


def _placeholder(gm: GraphModule, what: StateInput, size: int, others: list[Node]) -> Node:
    """A new last input. Its meta is what AOTAutograd and Dynamo read of an input that Dynamo did not make."""
    graph = gm.graph
    with graph.inserting_after(others[-1]):
        node = graph.placeholder(what.placeholder)
    others.append(node)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    device = next(n.meta[EXAMPLE].device for n in others if isinstance(n.meta.get(EXAMPLE), torch.Tensor))
    node.meta[EXAMPLE] = fake_vector(fake_mode_of(graph), size, device, requires_grad=what is StateInput.SINK)
    return node


def fake_vector(fake_mode: Any, size: int, device: torch.device, requires_grad: bool = False) -> torch.Tensor:
    """The fake value of a state input: made in the fake mode, or its size would become symbolic."""
    with fake_mode:
        return torch.zeros(size, dtype=torch.float32, device=device, requires_grad=requires_grad)


def _pieces(gm: GraphModule, sink: Node, sizes: list[int]) -> list[Node | None]:
    graph = gm.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_before(last.next):
        split = emit(graph, torch.split, (sink, sizes), like=last)
        return [emit(graph, operator.getitem, (split, i), like=last) for i in range(len(sizes))]


def _pass_slices(
    gm: GraphModule, item: _Item, scale: Node, grad_scale: Node | None, piece: Node | None, start: int, grad_start: int
) -> None:
    """Hands a sub-graph call its part of the state."""
    graph, node = gm.graph, item.node
    with graph.inserting_before(node):
        extra = [emit(graph, operator.getitem, (scale, slice(start, start + item.count("forward"))), like=node)]
        if grad_scale is not None:
            assert piece is not None
            extra.append(emit(graph, operator.getitem, (grad_scale, slice(grad_start, grad_start + item.count("gradient"))), like=node))
            extra.append(piece)
    node.args = (*node.args, *extra)
