"""Verification passes for the backend's own stages, names a pass that changed the result, and has no side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from te_dynamo import ops
from te_dynamo.ir.graph import copy_graph_module
from te_dynamo.report.verify import TOLERANCE, Difference, VerificationError, Verifier, compare, differs
from tests.capture import capture
from tests.models import CASES
from tests.pipeline import Recorded, stages_of

HIGH_PRECISION = ("canonicalize", "raise", "fuse", "plan")


class Block(nn.Module):
    """A checkpointed MLP with a norm; Q, K and V from one input; a head under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + checkpoint(self.mlp, x, use_reentrant=False)
        heads = [proj(x).view(2, -1, 4, 16).transpose(1, 2) for proj in (self.q, self.k, self.v)]
        x = x + F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(2, -1, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.q(x)


def verifier_of(recorded: Recorded) -> Verifier:
    verifier = Verifier(recorded.graphs["dynamo"])
    for stage in HIGH_PRECISION:
        verifier.stage(stage, recorded.graphs[stage])
    return verifier


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    torch.manual_seed(0)
    return stages_of(Block(), torch.randn(2, 8, 64))


def spoilt(gm: GraphModule, target: Callable[..., Any], spoil: Callable[[Any], None]) -> GraphModule:
    """A copy in which the first call of `target`, in the graph or in a sub-graph, is changed."""
    copy = copy_graph_module(gm)
    for unit in (copy, *(m for m in copy.children() if isinstance(m, GraphModule))):
        for node in unit.graph.nodes:
            if node.target is target:
                spoil(node)
                unit.recompile()
                return copy
    raise AssertionError(f"no {target}")


# ---- what the backend does passes


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("train", [True, False])
def test_the_stages_keep_the_result(dynamic: bool | None, train: bool) -> None:
    with torch.set_grad_enabled(train):
        recorded = stages_of(Block(), torch.randn(2, 8, 64), dynamic=dynamic)
    verifier = verifier_of(recorded)
    verifier(recorded.inputs)
    assert verifier.notes == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_the_stages_keep_the_result_of_transformers(name: str, attention: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    recorded = stages_of(case.model(attention, dtype), **case.inputs(dtype))
    verifier = verifier_of(recorded)
    verifier(recorded.inputs)
    assert verifier.notes == []


def test_it_compares_once_and_only_real_inputs(recorded: Recorded) -> None:
    wrong = spoilt(recorded.graphs["raise"], ops.norm, lambda n: n.update_kwarg("eps", 1.0))
    verifier = Verifier(recorded.graphs["canonicalize"])
    verifier.stage("raise", wrong)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        verifier([mode.from_tensor(x) if isinstance(x, Tensor) else x for x in recorded.inputs])
    with pytest.raises(VerificationError):
        verifier(recorded.inputs)
    verifier(recorded.inputs)


# ---- what is wrong is found


def test_the_pass_and_the_first_node_are_named(recorded: Recorded) -> None:
    graphs = recorded.graphs
    wrong = spoilt(graphs["raise"], ops.attention, lambda n: n.update_kwarg("causal", False))
    verifier = Verifier(graphs["dynamo"])
    for stage, gm in (("canonicalize", graphs["canonicalize"]), ("raise", wrong), ("fuse", graphs["fuse"])):
        verifier.stage(stage, gm)
    with pytest.raises(VerificationError, match="the stage 'raise' changed the result. output 0: differs, SQNR .* dB") as caught:
        verifier(recorded.inputs)
    found = caught.value.divergence
    assert (found.stage, found.output, found.target) == ("raise", "output 0", "te_dynamo.ir.attention.attention")
    assert found.at_node is not None and found.at_node.sqnr is not None and found.at_node.sqnr < 80
    assert found.difference.max_error is not None and found.difference.max_error > 0


def test_a_node_in_a_checkpointed_sub_graph(recorded: Recorded) -> None:
    before = recorded.graphs["canonicalize"]
    wrong = spoilt(recorded.graphs["raise"], ops.norm, lambda n: n.update_kwarg("eps", 10.0))
    found = compare(before, wrong, recorded.inputs, stage="raise")
    assert found is not None and (found.target, found.path) == ("te_dynamo.ir.norm.norm", "norm")


def test_a_member_of_a_merged_gemm(recorded: Recorded) -> None:
    def swap(node: Any) -> None:
        q, k, v = node.args[1]
        node.update_arg(1, [q, v, k])

    groups = [n for n in recorded.graphs["fuse"].graph.nodes if n.target is ops.linears and len(n.args[1]) == 3]
    assert groups, "the three linears share one input"
    found = compare(recorded.graphs["raise"], spoilt(recorded.graphs["fuse"], ops.linears, swap), recorded.inputs, stage="fuse")
    assert found is not None and found.path == "k"


def test_a_graph_that_does_not_run_any_more(recorded: Recorded) -> None:
    wrong = spoilt(recorded.graphs["raise"], ops.linear, lambda n: n.update_arg(1, n.args[0]))
    found = compare(recorded.graphs["canonicalize"], wrong, recorded.inputs, stage="raise")
    assert found is not None and "cannot be run any more" in str(found)


def test_a_write_to_an_input_is_compared_too() -> None:
    def fn(x: Tensor, buffer: Tensor, by: int) -> Tensor:
        buffer.add_(x.sum() * by)
        return x * 2

    one, two = (capture(lambda x, buffer, by=by: fn(x, buffer, by), torch.ones(3), torch.zeros(3)) for by in (1, 2))
    inputs = [torch.ones(3), torch.zeros(3)]
    names = [n.name for n in one.graph.nodes if n.op == "placeholder"]
    inputs = [inputs[0 if "x" in name else 1] for name in names]
    found = compare(one, two, inputs, stage="wrong")
    assert found is not None and found.output == "the input l_buffer_, written in place"
    assert compare(one, one, inputs, stage="right") is None
    assert inputs[names.index("l_buffer_")].sum() == 0


# ---- without a trace


def test_nothing_is_disturbed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y.mul_(2)
            return F.dropout(self.norm(self.linear(x)), 0.5) + y

    model, x, y = Noisy(), torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    recorded = stages_of(model, x, y.clone())
    inputs = [y if n.name == "l_y_" else value for n, value in zip(recorded.graphs["dynamo"].graph.nodes, recorded.inputs, strict=False)]
    copies = [v.clone() if isinstance(v, Tensor) else v for v in inputs]
    generator, autocast = torch.get_rng_state(), torch.is_autocast_enabled("cpu")
    verifier = verifier_of(recorded)
    verifier(inputs)
    assert verifier.notes == []
    assert torch.equal(torch.get_rng_state(), generator) and torch.is_autocast_enabled("cpu") == autocast and torch.is_grad_enabled()
    for value, copy in zip(inputs, copies, strict=True):
        assert value.grad is None if isinstance(value, Tensor) and value.is_leaf else True
        assert torch.equal(value, copy) if isinstance(value, Tensor) else value == copy


def test_autocast_is_what_it_was_after_an_error() -> None:
    """Its nesting depth too: in a region that is never left, the cache of cast weights would never be cleared."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()

    def fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.mm(x, x)

    gm = capture(fn, torch.randn(4, 4))
    notes: list[str] = []
    assert compare(gm, gm, [torch.randn(4, 3)], stage="any", note=notes.append) is None
    assert "cannot be run here" in notes[0] and not torch.is_autocast_enabled("cpu")
    assert torch.autocast_increment_nesting() == depth
    torch.autocast_decrement_nesting()


def test_other_random_numbers_are_a_note() -> None:
    one = capture(lambda x: F.dropout(x, 0.5), torch.ones(8))
    two = capture(lambda x: F.dropout(torch.cat([x, x]), 0.5)[:8], torch.ones(8))
    notes: list[str] = []
    assert compare(one, two, [torch.ones(8)], stage="raise", note=notes.append) is None
    assert "draws other random numbers" in notes[0]
    assert compare(one, one, [torch.ones(8)], stage="raise", note=notes.append) is None and len(notes) == 1


# ---- tolerances


@pytest.mark.parametrize("dtype", [d for d in TOLERANCE if d.itemsize > 1])
def test_a_rounding_passes_and_an_error_does_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    value = torch.randn(10_000, dtype=torch.float64).to(dtype)
    rounded = (value * (1 + torch.finfo(dtype).eps * torch.randn(10_000))).to(dtype)
    assert differs(value, rounded, TOLERANCE[dtype]) is None
    assert isinstance(differs(value, value * 1.1, TOLERANCE[dtype]), Difference)
    assert TOLERANCE[dtype].reason


@pytest.mark.parametrize(
    ("expected", "actual", "says"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "infinite or NaN"),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -float("inf")]), "infinite or NaN"),
        (torch.zeros(3), torch.full((3,), 0.1), "not zero"),
        (torch.zeros(3), torch.zeros(3, 1), "instead of"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64), "instead of"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), None),  # one turned by a tie
        (torch.arange(200), torch.arange(200) + 1, "200 of 200 elements differ"),
        (3, 4, "4 instead of 3"),
        (float("nan"), float("nan"), None),
        (torch.tensor([float("inf"), float("nan"), 1.0]), torch.tensor([float("inf"), float("nan"), 1.0]), None),
    ],
)
def test_differences(expected: Any, actual: Any, says: str | None) -> None:
    found = differs(expected, actual, TOLERANCE[torch.float32])
    assert (found is None) if says is None else (found is not None and says in str(found))


def test_what_no_float_went_into_must_be_equal() -> None:
    assert differs(torch.tensor([1, 2]), torch.tensor([1, 3]), None) is not None


def test_a_float32_result_of_a_bfloat16_matmul_is_as_good_as_bfloat16() -> None:
    def fn(x: Tensor) -> Tensor:
        return (x.bfloat16() @ x.bfloat16()).float()

    one = capture(fn, torch.randn(16, 16))
    two = capture(lambda x: x.bfloat16().float() @ x.bfloat16().float(), torch.randn(16, 16))
    assert compare(one, two, [torch.randn(16, 16)], stage="raise") is None
