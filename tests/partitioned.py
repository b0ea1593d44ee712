"""The graphs that Inductor gets after AOTAutograd's partition, as they would be for a GPU, made and run on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule, Node

from te_dynamo.lowering import registry


@contextlib.contextmanager
def interpreted(*also: str) -> Iterator[list[GraphModule]]:
    """The partitioned graphs that Inductor gets from here on, forward and backward in turn; they are interpreted. The GPU's implementations
    of linears, of activations as their producers, and of the operations `also` are used on the CPU."""
    from torch._inductor import compile_fx

    given: list[GraphModule] = []

    def interpret(gm, example_inputs, **_):
        given.append(gm)
        return make_boxed_func(gm.forward)

    registry.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(compile_fx, "compile_fx", partial(compile_fx.compile_fx, inner_compile=interpret))
        for table, ops in ((registry._IMPLEMENTATIONS, ("linears", *also)), (registry._PRODUCERS, ("activation",))):
            for key, made in [(k, m) for k, m in table.items() if k[0] in ops and k[1] == "native" and k[3] == "cuda"]:
                patch.setitem(table, (*key[:3], "cpu"), made)
        registry.implementation_of.cache_clear()
        registry.producer_of.cache_clear()
        torch._dynamo.reset()
        torch.manual_seed(0)
        yield given
    registry.implementation_of.cache_clear()
    registry.producer_of.cache_clear()


def calls(gm: GraphModule, target: Any) -> list[Node]:
    return gm.graph.find_nodes(op="call_function", target=target)


def casts(gm: GraphModule, *dtypes: torch.dtype) -> list[Node]:
    nodes = calls(gm, torch.ops.prims.convert_element_type.default)
    return [n for n in nodes if n.args[1] in dtypes]


def saved_for_backward(forward: GraphModule, results: int) -> list[Tensor]:
    """The tensors that forward returns besides its results, except its inputs."""
    (output,) = forward.graph.find_nodes(op="output")
    return [n.meta["val"] for n in output.args[0][results:] if n.op != "placeholder"]
