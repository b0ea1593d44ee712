"""What is told to AOTAutograd's partitioner, and done to the joint graph that it gets: which values backward keeps, which it
makes again, and one measurement of all amaxes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node, traceback
from torch.utils.checkpoint import CheckpointPolicy

_inputs_again: ContextVar[bool] = ContextVar("inputs are made again in backward", default=False)


@contextmanager
def inputs_made_again(again: bool) -> Iterator[None]:
    """What is traced in here makes the FP8 inputs of its linears again in backward, if `again`."""
    token = _inputs_again.set(again)
    try:
        yield
    finally:
        _inputs_again.reset(token)


def cast_of_input() -> AbstractContextManager[None]:
    """Around the cast of a linear's input, before the last step of it."""
    return made_again_in_backward() if _inputs_again.get() else nullcontext()


def input_in_fp8() -> AbstractContextManager[None]:
    """Around the last step of that cast: its result is what backward keeps of the input, or makes again."""
    return made_again_in_backward() if _inputs_again.get() else kept_for_backward()


def kept_for_backward() -> AbstractContextManager[None]:
    """What is computed in here is kept where backward needs it, never made again: else a cast, which costs nothing to
    recompute, would have the high-precision tensor kept in its place, or beside it."""
    return _marked(CheckpointPolicy.MUST_SAVE)


def made_again_in_backward() -> AbstractContextManager[None]:
    """What is computed in here is never kept: where backward needs it, it is made there."""
    return _marked(CheckpointPolicy.MUST_RECOMPUTE)


@contextmanager
def _marked(policy: CheckpointPolicy) -> Iterator[None]:
    """Marks the nodes that AOTAutograd traces in here. Activation checkpointing, which marks them too, has precedence."""
    meta = traceback.current_meta
    if "recompute" in meta:
        yield
        return
    meta["recompute"] = policy
    try:
        yield
    finally:
        meta.pop("recompute", None)


class OneMeasurement(CustomGraphPass):
    """The last step of a graph's amaxes, a small kernel a site, becomes one for each direction: of
    `cat([largest(a), largest(b), ...])`, `largest(a + b + ...)`.

    Sites cannot do it themselves: each returns its gradients' amaxes on its own, as autograd asks.
    """

    def __init__(self, sources: str) -> None:
        """sources: the version of our code, which the caches' key must hold."""
        self.sources = sources

    def uuid(self) -> Any:
        return self.sources

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
            _measure_once(graph, node)
        graph.lint()


def _measure_once(graph: Graph, cat: Node) -> None:
    inputs = [_source(n) for n in cat.args[0]]
    if sum(_is_largest(n) for n in inputs) < 2:
        return
    joined: list[Node] = []
    for measured, run in groupby(inputs, _is_largest):
        nodes = list(run)
        joined += [_join(graph, cat, nodes)] if measured else nodes
    cat.args = (joined, *cat.args[1:])
    for node in inputs:
        if not node.users:
            graph.erase_node(node)


def _join(graph: Graph, cat: Node, nodes: list[Node]) -> Node:
    parts = list(dict.fromkeys(p for n in nodes for p in n.args[0]))
    which = [parts.index(n.args[0][i]) for n in nodes for i in n.args[1]]
    with graph.inserting_before(cat):
        node = graph.call_function(torch.ops.te_dynamo.largest.default, (parts, which))
    node.meta["val"] = nodes[0].meta["val"].new_empty(len(which))
    return node


def _is_largest(node: Node) -> bool:
    return node.target is torch.ops.te_dynamo.largest.default


def _source(node: Node) -> Node:
    while node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        node = node.args[0]  # type: ignore[assignment]
    return node
