"""The graph after each stage of the backend's own pipeline, for tests of stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule

from te_dynamo.backend import te_fp8
from te_dynamo.config import Options
from te_dynamo.ir.graph import copy_graph_module
from te_dynamo.report.stages import Stages


class Recorded(Stages):
    """Keeps a copy of each stage's graph, by name; "dynamo" is Dynamo's graph."""

    def __init__(self, options: Options, inputs: Sequence[Any]) -> None:
        super().__init__(options, inputs)
        self.graphs: dict[str, GraphModule] = {}

    def start(self, gm: GraphModule) -> None:
        super().start(gm)
        self.graphs["dynamo"] = copy_graph_module(gm)

    def done(self, stage: str, gm: GraphModule) -> None:
        super().done(stage, gm)
        self.graphs[stage] = copy_graph_module(gm)


def stages_of(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, options: dict[str, Any] | None = None, **kwargs: Any
) -> Recorded:
    """The stages of the one graph of `fn(*args, **kwargs)` under te_fp8. The result is interpreted, not compiled."""
    made: list[Recorded] = []

    def record(*given: Any) -> Recorded:
        made.append(Recorded(*given))
        return made[-1]

    def interpreted(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
        return gm.forward

    torch._dynamo.reset()
    with (
        mock.patch("te_dynamo.backend.Stages", record),
        mock.patch("te_dynamo.runtime.compile_inductor", interpreted),
        mock.patch("te_dynamo.runtime.compile_without_codegen", interpreted),
    ):
        torch.compile(fn, backend=te_fp8, fullgraph=True, dynamic=dynamic, options=options or {})(*args, **kwargs)
    (recorded,) = made
    return recorded
