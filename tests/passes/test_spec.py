"""The specs hold after each stage of the real pipeline, and each kind of violation is reported."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from te_dynamo import ops
from te_dynamo.ir.graph import EXAMPLE, copy_graph_module, emit, is_call, tensor
from te_dynamo.passes.attach import SLOTS, Slots
from te_dynamo.passes.fuse import MEMBERS
from te_dynamo.passes.plan import PLAN, SITE
from te_dynamo.passes.spec import SPECS, SpecError, check, fits, require
from tests.models import CASES
from tests.pipeline import Recorded, stages_of


class Block(nn.Module):
    """A checkpointed MLP with a norm, then attention over three linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + checkpoint(self.mlp, x, use_reentrant=False)
        heads = [proj(x).view(2, -1, 4, 16).transpose(1, 2) for proj in (self.q, self.k, self.v)]
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(2, -1, 64)


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return stages_of(Block(), torch.randn(2, 8, 64, requires_grad=True))


@pytest.fixture
def stage(recorded: Recorded) -> Callable[[str], GraphModule]:
    """A function that copies the graph after a stage, for a test to break."""
    return lambda name: copy_graph_module(recorded.graphs[name])


def find(gm: GraphModule, target: object) -> Node:
    return next(n for n in gm.graph.nodes if n.target is target or n.target == target)


def violations(recorded: Recorded) -> dict[str, list[str]]:
    """The violations in the graphs, by stage; "lower_calibrating" is the first step's variant of "lower"."""
    graphs = {name: gm for name, gm in recorded.graphs.items() if name != "dynamo"}
    found = {name: check(gm, SPECS[name.removesuffix("_calibrating")]) for name, gm in graphs.items()}
    return {name: wrong for name, wrong in found.items() if wrong}


# ---- the pipeline keeps its specs


@pytest.mark.parametrize("provider", ["native", "reference"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dynamic", [None, True])
def test_each_stage_keeps_its_spec(provider: str, train: bool, dynamic: bool | None) -> None:
    with torch.set_grad_enabled(train):
        recorded = stages_of(Block(), torch.randn(2, 8, 64), dynamic=dynamic, options={"provider": provider})
    assert {"canonicalize", "raise", "fuse", "plan", "state"} <= recorded.graphs.keys()
    assert violations(recorded) == {}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_the_specs_hold_for_transformers(name: str, attention: str) -> None:
    case = CASES[name]
    recorded = stages_of(case.model(attention), **case.inputs(), options={"attention": "fp8"})
    assert violations(recorded) == {}


# ---- violations


@pytest.mark.parametrize(
    ("fn", "remedy"),
    [
        (lambda x: x + 1, "torch.add"),
        (lambda x: -x, "torch.neg"),
        (lambda x: x.transpose(0, 1), "torch.transpose"),
        (lambda x: x.view(-1), "torch.reshape"),
        (lambda x: x.float(), "call_method 'to'"),
        (lambda x: x.to(dtype=torch.float64), "call_method 'to'"),
        (lambda x: torch.nn.functional.softmax(x, -1), "torch.softmax"),
        (lambda x: torch.nn.functional.layer_norm(x, (4,)), "all by position"),
    ],
)
def test_a_spelling_that_is_not_canonical(fn: Callable[[Tensor], Tensor], remedy: str) -> None:
    graph = stages_of(lambda x, w: (fn(x), torch.nn.functional.linear(x, w)), torch.randn(4, 4), nn.Parameter(torch.randn(4, 4))).graphs
    assert any(remedy in violation for violation in check(graph["dynamo"], SPECS["canonicalize"]))
    assert check(graph["canonicalize"], SPECS["canonicalize"]) == []


def divided_size(x: Tensor) -> Tensor:  # Longformer
    return x.view(torch.div(x.shape[0], 2, rounding_mode="trunc"), -1)


def in_a_transform(x: Tensor) -> Tensor:  # masks of transformers
    return torch.vmap(lambda row: (row.float() - 1).le(0).to(torch.bool))(x)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("fn", [lambda x: (x + 1).view(x.shape), lambda x: x.view(size=(2, 8)), divided_size, in_a_transform])
def test_what_canonicalize_leaves_is_no_violation(fn: Callable[[Tensor], Tensor], dynamic: bool | None) -> None:
    if fn is divided_size and dynamic and torch.__version__ < (2, 13):
        pytest.skip("Dynamo may not divide a symbolic size yet")
    weight = nn.Parameter(torch.randn(4, 4))
    assert violations(stages_of(lambda x: (fn(x), torch.nn.functional.linear(x, weight)), torch.randn(4, 4), dynamic=dynamic)) == {}


def test_arithmetic_on_sizes_and_views_of_bits_are_no_violation() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(torch.int32) * (x.shape[0] + 1), torch.nn.functional.linear(x, w)

    graphs = stages_of(fn, torch.randn(4, 4), nn.Parameter(torch.randn(4, 4)), dynamic=True).graphs
    assert check(graphs["canonicalize"], SPECS["canonicalize"]) == []


def test_semantic_ops_stand_only_where_their_stage_is(recorded: Recorded) -> None:
    raised, fused = recorded.graphs["raise"], recorded.graphs["fuse"]
    assert any("te_dynamo.ir.linear.linear" in v for v in check(raised, SPECS["canonicalize"]))
    assert any("te_dynamo.ir.linear.linears" in v for v in check(fused, SPECS["raise"]))
    assert any("every linear is a group" in v for v in check(raised, SPECS["fuse"]))
    assert any("te_dynamo.ir.linear.linears" in v for v in check(fused, SPECS["lower"]))


def test_a_missing_fake_value(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("canonicalize")
    find(gm, torch.transpose).meta.pop(EXAMPLE)
    (violation,) = check(gm, SPECS["canonicalize"])
    assert "no meta['example_value']" in violation and "Remedy" in violation


def test_a_shape_that_is_no_shape(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("canonicalize")
    node = find(gm, torch.reshape)
    node.update_arg(1, ((2, 8), 64))
    assert any("(2, 8) in a shape" in violation for violation in check(gm, SPECS["canonicalize"]))


def test_the_sub_graphs_are_checked_too(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("raise")
    body = next(m for m in gm.children() if isinstance(m, GraphModule))
    find(body, ops.linear).kwargs = {}
    assert any("'out_dtype' is missing" in violation for violation in check(gm, SPECS["raise"]))


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (lambda n: n.update_kwarg("out_dtype", "bf16"), "out_dtype='bf16' is not dtype"),
        (lambda n: n.update_kwarg("provider", "te"), "the keyword 'provider'"),
        (lambda n: n.update_kwarg("out_dtype", torch.float16), "the result is [..., N] in out_dtype"),
        (lambda n: n.update_arg(1, n.args[0]), "weight is [N, K]"),
        (lambda n: setattr(n, "args", n.args[:1]), "1 positional arguments"),
        (lambda n: n.update_arg(2, 1.0), "bias=1.0 is not"),
    ],
)
def test_the_arguments_of_a_semantic_op(stage: Callable[[str], GraphModule], spoil: Callable[[Node], object], wrong: str) -> None:
    gm = stage("raise")
    spoil(find(gm, ops.linear))
    assert any(wrong in violation for violation in check(gm, SPECS["raise"])), check(gm, SPECS["raise"])


def test_the_shapes_of_attention(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("raise")
    node = find(gm, ops.attention)
    node.update_arg(1, node.args[0].args[0])
    assert any("v [B, H_kv, S_kv, D_v]" in violation for violation in check(gm, SPECS["raise"]))


@pytest.mark.parametrize(("key", "name"), [(SITE, "Site"), (PLAN, "Plan"), (MEMBERS, "list")])
def test_the_metadata_of_a_plan(stage: Callable[[str], GraphModule], key: str, name: str) -> None:
    gm = stage("plan")
    find(gm, ops.linears).meta.pop(key)
    (violation,) = check(gm, SPECS["plan"])
    assert f"meta[{key!r}] is nothing, not a {name}" in violation


def test_the_state_comes_last(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("state")
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    placeholders[0].prepend(find(gm, "te_scale"))
    assert any("stands after an input of the state" in violation for violation in check(gm, SPECS["state"]))


def test_what_a_state_input_is(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("state")
    find(gm, "te_sink").meta[EXAMPLE] = tensor(find(gm, "te_scale"))
    find(gm, "te_scale").meta["tensor_dict"] = {}
    found = "\n".join(check(gm, SPECS["state"]))
    assert "only the sink" in found and "not marked as a static input" in found


def test_slots_are_in_the_graph(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("state")
    find(gm, ops.linears).meta[SLOTS] = Slots("te_lost", None, None, 0, 0)
    assert any("'te_lost', which is not in the graph" in violation for violation in check(gm, SPECS["state"]))


def test_a_function_of_ours_that_was_not_lowered(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("lower")
    first = next(n for n in gm.graph.nodes if n.op == "call_function" and tensor(n) is not None)
    with gm.graph.inserting_after(first):
        emit(gm.graph, fits, (1, int), like=first)
    assert any("only te_dynamo.lowering and torch" in violation for violation in check(gm, SPECS["lower"]))


def test_require_raises_with_all_violations(stage: Callable[[str], GraphModule]) -> None:
    gm = stage("plan")
    groups = [n for n in gm.graph.nodes if is_call(n, ops.linears)]
    for node in groups:
        node.meta.pop(SITE)
    with pytest.raises(SpecError, match="after stage 'plan' breaks its spec") as caught:
        require(gm, SPECS["plan"])
    assert len(caught.value.violations) == len(groups)
    require(stage("plan"), SPECS["plan"])


def test_numbers_may_be_symbolic() -> None:
    graph = stages_of(lambda x, w: torch.nn.functional.linear(x, w), torch.randn(3, 4), nn.Parameter(torch.randn(5, 4)), dynamic=True)
    size = next(n for n in graph.graphs["dynamo"].graph.nodes if isinstance(n.meta.get(EXAMPLE), torch.SymInt))
    assert fits(size, int) and fits(size, float) and not fits(size, bool) and not fits(True, int)
    assert fits(None, float | None) and not fits("layer", float) and fits(operator.add, Callable) is True
