"""Which sums are saved for backward, which are computed again, and what that saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from te_dynamo.lab import pretend
from te_dynamo.lowering.saved_sums import SavedSums
from tests.forks import Forks

ROOT = Path(__file__).resolve().parent.parent.parent
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
reason = pretend.unavailable()


def product(a: Tensor, b: Tensor) -> Tensor:
    one = torch.ones(())
    return torch._scaled_mm(a, b.t(), one, one, out_dtype=BF16).view(2, 16, 32)


def of_experts(a: Tensor, b: Tensor) -> Tensor:
    ends = torch.full((2,), 16, dtype=torch.int32)
    experts = torch.stack([b, b]).transpose(1, 2)
    return torch._scaled_grouped_mm(a, experts, torch.ones(32), torch.ones(2, 32), ends, out_dtype=BF16)


def of_two(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return product(a, b) + product(a, b)


SUMS: dict[str, tuple[Callable[..., object], bool]] = {
    "a residual sum": (lambda a, b, x: x + product(a, b), True),
    "the other way round": (lambda a, b, x: product(a, b) + x, True),
    "of two GEMMs": (of_two, False),  # both are in memory
    "scaled": (lambda a, b, x: torch.add(x, product(a, b), alpha=2), False),
    "broadcast": (lambda a, b, x: x[:1] + product(a, b), False),
    "expanded": (lambda a, b, x: x[:1].expand(2, -1, -1) + product(a, b), False),
    "in float32": (lambda a, b, x: x.float() + product(a, b), False),  # twice the bytes
    "of what is computed from it": (lambda a, b, x: x + product(a, b).tanh(), False),
    "of what something else reads": (lambda a, b, x: (x + (made := product(a, b)), made.tanh()), False),
    "of a GEMM in 16 bits": (lambda a, b, x: x + (a.to(BF16) @ b.to(BF16).t()).view(2, 16, 32), False),
}


def traced(name: str) -> Graph:
    given = torch.zeros(32, 16).to(E4M3), torch.zeros(32, 16).to(E4M3), torch.zeros(2, 16, 32, dtype=BF16)
    return make_fx(SUMS[name][0], tracing_mode="fake")(*given).graph


@pytest.mark.parametrize("name", SUMS)
def test_which_sums(name: str) -> None:
    graph, (_, expected) = traced(name), SUMS[name]
    SavedSums("")(graph)
    assert marked(graph) == expected
    for key, value in (("recompute", CheckpointPolicy.PREFER_RECOMPUTE), ("partitioner_tag", "is_backward")):
        graph = traced(name)
        for node in graph.nodes:  # a checkpoint decides about it, or it is backward's
            node.meta[key] = value
        SavedSums("")(graph)
        assert not marked(graph)


def test_a_sum_around_a_checkpoint() -> None:
    """The checkpoint recomputes the GEMM, so nothing is saved instead of the sum."""
    graph = traced("a residual sum")
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._scaled_mm.default):
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    SavedSums("")(graph)
    assert not marked(graph)


@pytest.mark.parametrize(
    ("gemm", "reads", "returned", "again"),
    [
        (of_experts, True, False, {"add", "index"}),
        (of_experts, False, False, set()),
        (of_experts, True, True, set()),  # forward writes it anyway
        (product, True, False, set()),  # an embedding: the sum is a residual sum
    ],
)
def test_a_sum_with_each_row_s_bias_is_computed_again(gemm: Callable[..., Tensor], reads: bool, returned: bool, again: set[str]) -> None:
    """If backward reads it: then the experts' result is saved, and the rows of the biases are not."""

    def run(a: Tensor, b: Tensor, biases: Tensor, which: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        result = gemm(a, b).view(32, 32) + biases[which]
        return result if returned else result.sum(), grad * (result if reads else 2)

    fp8, matrix = torch.zeros(32, 16).to(E4M3), torch.zeros(32, 32, dtype=BF16)
    graph = make_fx(run, tracing_mode="fake")(fp8, fp8, matrix[:4], torch.arange(32) % 4, matrix).graph
    (of_grad,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    of_grad.meta["partitioner_tag"] = "is_backward"
    SavedSums("")(graph)
    found = {n.target.overloadpacket.__name__ for n in graph.nodes if n.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE}
    assert found == again and marked(graph) == (gemm is product)


def marked(graph: Graph) -> bool:
    return any(node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE for node in graph.nodes)


WITH_AND_WITHOUT = """
import json
from benchmarks.lab import built
from benchmarks.lab_models import CASES
from te_dynamo.lab.estimate import estimate_of
from te_dynamo.lowering.saved_sums import SavedSums

case = next(case for case in CASES if (case.name, case.shape) == ("Llama-3-8B layer", "4x2048"))
for instead in (SavedSums.__call__, lambda self, graph: None):
    SavedSums.__call__ = instead
    side = estimate_of(built(case)).sides[1]
    print(json.dumps([side.saved, side.ms, sum(launch.bytes for launch in side.launches if launch.kind == "triton")]))
"""


@pytest.mark.skipif(reason is not None, reason=str(reason))
def test_what_it_saves(forks: Forks) -> None:
    """In a Llama-3-8B layer: forward writes the sum and then reads it instead of its terms, backward reads it twice; as much is saved."""
    ours, others = map(json.loads, forks.run(WITH_AND_WITHOUT, path=[str(ROOT)]).splitlines()[-2:])
    assert ours[0] == others[0] and ours[1] < others[1]
    assert others[2] - ours[2] == pytest.approx(2 * 2 * 8192 * 4096, rel=0.01)
