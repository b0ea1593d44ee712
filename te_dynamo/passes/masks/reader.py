"""The graph's tensors as functions of their indices, each with the contents that it has where it is read."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from te_dynamo.ir.graph import example, tensor, upstream
from te_dynamo.passes.effects import storage, writes
from te_dynamo.passes.masks.formulas import Datum, Expr, Integers, Unproven, at_most, symbols_of
from te_dynamo.passes.masks.tensors import HANDLERS, Place, Tensor, Value, meaning
from te_dynamo.sites import clean_path

State: TypeAlias = Mapping[Node, "Tensor | Unproven"]  # what each node's memory holds, or why that is not known


class Reader:
    """Follows a graph's masks, and every write to the memory that they are built of, from its first node to its last."""

    def __init__(self, graph: Graph, masks: Mapping[Node | None, Node]) -> None:
        """masks: each by the node that reads it; None is the graph's end."""
        self.integers = Integers()
        self.writers = {node: written for node in graph.nodes if (written := writes(node))}
        self.read: dict[Node | None, Tensor | Unproven] = {}
        state: dict[Node, Tensor | Unproven] = {}
        origin: dict[Node, Node] = {}  # result of an in-place function -> the tensor that it wrote to
        needed = self.needed(masks.values())
        for node in (*graph.nodes, None):
            if node in masks:
                self.read[node] = state[masks[node]]
            if node not in needed:
                continue
            state[node] = self._tensor(node, {n: state[n] for n in node.all_input_nodes})
            for target in self.writers.get(node, ()):
                origin[node] = origin.get(target, target)
                reason = Unproven(f"{node.name} ({_name(node.target)}) writes in place to what the mask is built of")
                for other in [n for n in state if _shares(n, target)]:
                    known = node.target in HANDLERS and origin.get(other, other) is origin[node]
                    state[other] = state[node] if known else reason

    def needed(self, masks: Iterable[Node]) -> set[Node]:
        """Everything that masks are computed from, and everything in the graph that writes to its memory."""
        found = set(upstream(*masks))
        while more := [w for w, ts in self.writers.items() if w not in found and any(_shares(n, t) for n in found for t in ts)]:
            found.update(upstream(*more))
        return found

    def is_written(self, node: Node) -> bool:
        """Whether anything writes to a tensor's memory."""
        return any(_shares(node, target) for targets in self.writers.values() for target in targets)

    def shape(self, node: Node) -> tuple[Expr, ...]:
        value = tensor(node)
        if value is None:
            raise Unproven(f"{node.name} is not a tensor")
        return tuple(map(self.integers.of, value.shape))

    def _tensor(self, node: Node, state: State) -> Tensor | Unproven:
        @functools.cache
        def called() -> Any:
            return self._meaning(node, state)

        def value(place: Place) -> Value:
            try:
                found = place.cast(called()(place), place.dtype)
            except Unproven as stop:
                return self._datum(node, place, stop)
            if node.op != "placeholder" and place.dtype == torch.bool and self._tells_of_one_datum(found, place.index):
                return self._datum(node, place, Unproven(self._reason(found)))
            return found

        try:
            return Tensor(self.shape(node), tensor(node).dtype, self.integers, value)
        except Unproven as stop:
            return stop

    def _datum(self, node: Node, place: Place, stop: Unproven) -> Value:
        """An element of a tensor that depends on data, known only by its dtype. Raises `stop` for any other tensor, and if the element
        could not be read later: it is not an integer, or something writes to its memory."""
        if place.dtype.is_floating_point or place.dtype.is_complex or self.is_written(node) or not self.origin(node):
            raise stop
        symbol = self.integers.datum(Datum(node, place.shape, place.index, place.dtype, str(stop)))
        return at_most(1, symbol) if place.dtype == torch.bool else symbol

    def _tells_of_one_datum(self, found: Value, index: tuple[Expr, ...]) -> bool:
        """Whether a value depends on data only at its own index, such as whether it is nonzero: it is simpler to read the answer."""
        read = [self.integers.data.get(symbol) for symbol in symbols_of(found)]
        return len(found) > 1 and bool(read) and all(datum is not None and datum.index == index for datum in read)

    def _reason(self, found: Value) -> str:
        return next(self.integers.data[symbol].why for symbol in symbols_of(found))

    def origin(self, node: Node) -> str:
        """The user's name for the first tensor that a node is computed from; "" if there is none."""
        found, seen = [node], {node}
        for n in found:  # which grows
            known = [i for i in n.all_input_nodes if i not in seen and not isinstance(example(i), (int, float, torch.SymInt, torch.Size))]
            seen.update(known)
            found += known
        data = [n for n in found if n.op in ("placeholder", "get_attr") and tensor(n) is not None]
        return _description(min(data)) if data else ""

    def _meaning(self, node: Node, state: State) -> Any:
        if node.op in ("placeholder", "get_attr"):
            raise Unproven(f"depends on the {_description(node)}")
        if node.target not in HANDLERS:
            if origin := self.origin(node):
                raise Unproven(f"depends on the {origin}, through {_name(node.target)}")
            raise Unproven(f"{node.name} ({_name(node.target)}) is not understood")
        return meaning(node.target, *map_arg((node.args, node.kwargs), lambda n: self._argument(n, state[n])))

    def _argument(self, node: Node, read: Tensor | Unproven) -> Any:
        value = example(node)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise Unproven(f"depends on {node.name}, a number that is not known before it runs")
        if isinstance(value, torch.Size):
            return tuple(map(self.integers.of, value))
        if isinstance(value, (torch.SymInt, int, float)):
            return self.integers.of(value) if isinstance(value, torch.SymInt) else value
        if isinstance(read, Unproven):
            raise read
        return read


def _shares(node: Node, other: Node) -> bool:
    """Whether a write to one may be seen in the other."""
    memory = (storage(node), storage(other))
    return tensor(node) is not None and (None in memory or memory[0] == memory[1])


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _description(node: Node) -> str:
    """The user's name for the tensor of a placeholder."""
    source = getattr(getattr(node, "_dynamo_source", None), "name", "") or str(node.target)
    if isinstance(example(node), torch.nn.Parameter):
        what = "parameter"
    elif "_buffers" in source or node.op == "get_attr":
        what = "buffer"
    else:
        what = "input"
    local = re.fullmatch(r"L\['(\w+)'\]", source)
    return f"{what} {local[1] if local else clean_path(source) or source}"
