"""Dynamo's own graphs, for tests of the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule


def capture(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> GraphModule:
    """A copy of the one graph that Dynamo makes of `fn(*args, **kwargs)`, with its nodes' meta.

    `.meta["example_inputs"]` is what Dynamo calls the graph with: the graph's inputs in its placeholders' order.
    """

    def capturing(gm: GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        copied = copy_of(gm)
        copied.meta["example_inputs"] = list(example_inputs)
        raise Captured(copied)

    torch._dynamo.reset()
    try:
        torch.compile(fn, backend=capturing, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    except Captured as captured:
        return captured.gm
    raise AssertionError("there was nothing to make a graph of")


class Captured(BaseException):
    """Leaves Dynamo early with the graph: guards and bytecode, a third of the time, are only for a second call. Not an Exception, which
    Dynamo would wrap."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm


def copy_of(gm: GraphModule) -> GraphModule:
    """A copy whose nodes keep their meta and their placeholders' Dynamo sources; tensors are shared."""
    graph, copied = Graph(), {}
    output = graph.graph_copy(gm.graph, copied)
    for old, new in copied.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    graph.output(output)
    return GraphModule(gm, graph)
