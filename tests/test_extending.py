"""The package can be extended from outside: this one file adds a gated activation as an operation.

It has the definition, the rule that finds it, and how `reference` and `native` compute a linear's FP8 operand with it; then the whole
path: taken by `torch.compile(..., backend="te_fp8")`, in FP8, explained, verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.ir import operation
from te_dynamo.ir.graph import emit, fake, is_call
from te_dynamo.ir.op import Invariant
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.per_tensor import matrix
from te_dynamo.lowering.quantized import Quantized, ScaleOf
from te_dynamo.lowering.registry import PER_TENSOR, Needs, Producer, Quantize, produces
from te_dynamo.passes import raising
from te_dynamo.passes.rules import Match, Rule
from tests.numerics import sqnr
from tests.pipeline import stages_of

# --- the operation

SOFTPLUS = torch._C._nn.softplus  # `F.softplus` in Dynamo's graphs


@operation(
    kind="glu",
    fake=lambda gate, up: torch.empty_like(gate),
    invariants=(Invariant("gate and up are alike", lambda a: a.gate.shape == a.up.shape and a.gate.dtype == a.up.dtype),),
)
def softglu(gate: Tensor, up: Tensor) -> Tensor:
    """`softplus(gate) * up`. gate, up: [..., N]; returns the same."""
    return F.softplus(gate) * up


# --- the rule


class RaiseSoftGLU(Rule):
    kind = "glu"
    ends_at = frozenset({torch.mul})

    def match(self, node: Node) -> Match | None:
        for activated, up in (node.args, node.args[::-1]):
            if is_call(activated, SOFTPLUS) and len(activated.users) == 1 and isinstance(up, Node):
                gate = activated.args[0]
                if fake(gate).shape == fake(up).shape and fake(gate).dtype == fake(up).dtype:
                    return Match(node, [activated, node], {"gate": gate, "up": up})
        return None

    def rewrite(self, graph: Graph, match: Match) -> Node:
        return emit(graph, softglu, (match.values["gate"], match.values["up"]), like=match.output)


# --- its implementation: the FP8 operand of the linear that reads it, and its backward


@produces("softglu", provider=("reference", "native"), recipes=PER_TENSOR)
class FP8SoftGLU(Producer):
    kernel = "with the linear's FP8 operand"

    def backward_reads(self, call):
        return ("gate", "up")

    def forward(self, call: Call, inputs: Sequence[Any], scale: ScaleOf, quantize: Quantize) -> tuple[Quantized, list[Quantized]]:
        gate, up = inputs
        return quantize(matrix(softglu(gate, up))), []

    def backward(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, needs: Needs) -> list[Any]:
        gate, up = inputs
        d_gate = grad.float() * up.float() * torch.sigmoid(gate.float())
        return [d_gate.to(gate.dtype), (grad.float() * F.softplus(gate.float())).to(up.dtype)]


# --- the whole path


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.softplus(self.gate(x)) * self.up(x))


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch, no_codegen: None) -> Iterator[None]:
    monkeypatch.setattr(raising, "FAMILIES", [list(family) for family in raising.FAMILIES])
    monkeypatch.setattr("te_dynamo.backend.FAMILIES", raising.FAMILIES)
    raising.add_rule(RaiseSoftGLU())
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("recipe", ["delayed", "current"])
@pytest.mark.parametrize("provider", ["native", "reference"])
def test_it_trains_in_fp8(provider: str, recipe: str) -> None:
    model, x, seen = MLP(), torch.randn(4, 8, 64, requires_grad=True), []
    run = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": provider, "recipe": recipe, "strict": True})
    exact = [(model(x) - x).detach(), *torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])]
    with observing(lambda gm, sites, options: seen.extend(sites.taken())):
        for _ in range(3):
            y = run(x)
            found = [(y - x).detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]
    errors = [round(sqnr(e, f)) for e, f in zip(exact, found, strict=True)]
    assert min(errors[0], *errors[2:]) > 15 and max(errors[0], *errors[2:5]) < 40, errors  # right, and in FP8; dx has another path too
    assert sorted((s.kind, s.path, s.provider) for s in seen) == [
        ("glu_linear", "down", provider),
        ("linear", "gate", provider),
        ("linear", "up", provider),
    ]
    keys = te_dynamo.scale_state(model).state_dict()
    assert ("down.input.scale" in keys) == (recipe == "delayed")


def test_the_operand_is_made_with_the_activation() -> None:
    graphs = stages_of(MLP(), torch.randn(4, 8, 64), options={"provider": "native"}).graphs
    assert any(n.target is softglu for n in graphs["plan"].graph.nodes)
    keys = [n.args[0] for n in graphs["lower"].graph.nodes if n.op == "call_function" and n.args and isinstance(n.args[0], str)]
    producers = [Call.parse(key).producer for key in keys]
    assert [p and p.op for p in producers] == [None, "softglu"]
    assert not any(n.target is softglu for n in graphs["lower"].graph.nodes)


def test_explain_and_verify() -> None:
    model, x = MLP(), torch.randn(4, 8, 64)
    report = te_dynamo.explain(model, x, backward=True, options={"verify": True, "strict": True})
    assert report.fp8_flop_fraction == 1
    (site,) = (s for s in report.sites if s.path == "down")
    assert (site.kind, site.detail["glu"]) == ("glu_linear", "with the linear's FP8 operand")


def test_where_no_fp8_linear_reads_it_nothing_changes() -> None:
    model, x = MLP(), torch.randn(4, 8, 64)
    recorded = stages_of(model, x, options={"skip": ["down"]})
    assert not any(n.target is softglu for n in recorded.graphs["plan"].graph.nodes)
    run = torch.compile(lambda x: F.softplus(x) * x, backend=te_fp8, options={"recipe": None})
    assert torch.equal(run(x), F.softplus(x) * x)
