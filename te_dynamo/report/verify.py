"""`verify=True`: compares the graph after each high-precision stage with the graph before it, on the real inputs of the first call.

The stages up to `plan` keep what the model computes, to rounding. If one does not, `VerificationError` names the stage,
the first output that differs and by how much, and the first node that differs and its module: both graphs are interpreted,
and each node is matched with the node of Dynamo's graph that it stands for. Verification has no side effects: no gradient is
recorded, inputs that may be written are copied, and both graphs draw the same random numbers, after which the generators'
states are restored.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from te_dynamo.ir.graph import copy_graph_module, hint, is_call
from te_dynamo.ir.meta import MEMBERS, ORIGIN
from te_dynamo.passes.effects import storage, writes
from te_dynamo.passes.higher_order import calls
from te_dynamo.passes.regions import SET_GRAD
from te_dynamo.passes.spec import target_name
from te_dynamo.passes.weights import is_owned
from te_dynamo.sites import module_path
from te_dynamo.state import is_fake

log = logging.getLogger(__name__)


class Tolerance(NamedTuple):
    """least_sqnr: the signal-to-noise ratio in dB that two ways to compute the same value must reach; reason: why that much."""

    least_sqnr: float
    reason: str


# By the coarsest dtype that a value went through: a float32 result of a bfloat16 matmul is only as good as bfloat16.
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(200.0, "53 bits give 320 dB; long sums and deep networks may cost 120 of them"),
    torch.float32: Tolerance(80.0, "24 bits give 146 dB; reordered sums and deep networks have been seen down to 100"),
    torch.float16: Tolerance(40.0, "11 bits give 68 dB; an intermediate that is rounded or not, a few dozen layers deep, costs up to 25"),
    torch.bfloat16: Tolerance(25.0, "8 bits give 50 dB; an intermediate that is rounded or not, a few dozen layers deep, costs up to 20"),
    torch.float8_e4m3fn: Tolerance(15.0, "4 bits give 26 dB; one step either way where the input is a rounding apart"),
    torch.float8_e5m2: Tolerance(10.0, "3 bits give 20 dB; as E4M3"),
}
MISMATCHED_INTEGERS = 0.01  # the fraction that may differ: at a tie, rounding decides a comparison or an argmax
COARSEST_FIRST = sorted(TOLERANCE, key=lambda dtype: TOLERANCE[dtype].least_sqnr)


class VerificationError(RuntimeError):
    """A stage changed what the model computes. `.divergence` says where."""

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence
        super().__init__(f"te_fp8: {divergence}")


@dataclass(frozen=True)
class Difference:
    """How far two values differ. sqnr: in dB, None if it has no meaning; max_error: the largest absolute error."""

    what: str
    sqnr: float | None = None
    max_error: float | None = None

    def __str__(self) -> str:
        sqnr = "" if self.sqnr is None else f", SQNR {self.sqnr:.1f} dB"
        return f"{self.what}{sqnr}" + ("" if self.max_error is None else f", largest error {self.max_error:.3g}")


@dataclass(frozen=True)
class Divergence:
    """What a stage changed.

    output: the first of the graph's results that differs ("output 0", or an input that is written in place), by
    `difference`, with `tolerance` allowed; node, target, path, at_node: the first node of the graph after the stage
    whose value differs, what it calls, its module, and how far it is off; None if every node that can be compared is
    within tolerance.
    """

    stage: str
    output: str
    difference: Difference
    tolerance: Tolerance | None = None
    node: str | None = None
    target: str | None = None
    path: str | None = None
    at_node: Difference | None = None

    def __str__(self) -> str:
        allowed = "" if self.tolerance is None else f" (at least {self.tolerance.least_sqnr:.0f} dB: {self.tolerance.reason})"
        where = "no single node that is in both graphs differs"
        if self.node is not None:
            where = f"the first node that differs is {self.node} ({self.target}) in module {self.path or 'the outermost'!r}: {self.at_node}"
        return f"the stage {self.stage!r} changed the result. {self.output}: {self.difference}{allowed}; {where}."


class Verifier:
    """Compares the graphs of one compilation, once, on its first real inputs.

    original: the graph before the first stage; add the graph after each stage with `stage`. Graphs are copied. `notes` says
    what could not be compared, and why.
    """

    def __init__(self, original: GraphModule) -> None:
        self.graphs = [("", copy_graph_module(original))]
        self.notes: list[str] = []

    def stage(self, name: str, gm: GraphModule) -> None:
        """Adds the graph that a stage left."""
        self.graphs.append((name, copy_graph_module(gm)))

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Compares each stage with the one before it, at the first call with real inputs; later calls do nothing.

        inputs: what Dynamo calls its graph with. Raises VerificationError if a stage changed the result.
        """
        if any(is_fake(x) for x in inputs):
            return
        graphs, self.graphs = self.graphs, []
        for (_, before), (stage, after) in pairwise(graphs):
            if divergence := compare(before, after, inputs, stage=stage, note=self._note):
                raise VerificationError(divergence)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        log.warning("te_dynamo: verify: %s", text)


def compare(
    before: GraphModule, after: GraphModule, inputs: Sequence[Any], *, stage: str, note: Callable[[str], None] = log.warning
) -> Divergence | None:
    """How `after` differs from `before` on `inputs`; None if it does not, or if the two cannot be compared.

    stage: the name of the pass between them; note: called with the reason if they cannot be compared.
    """
    try:
        expected = run(before, inputs)
    except Exception as error:
        note(f"{stage} is not compared: its input graph cannot be run here ({type(error).__name__}: {error})")
        return None
    try:
        actual = run(after, inputs)
    except Exception as error:
        return Divergence(stage, "the graph", Difference(f"cannot be run any more ({type(error).__name__}: {error})"))
    if expected.random != actual.random:
        drawn = [", ".join(result.random) or "none" for result in (expected, actual)]
        note(f"{stage} is not compared: it draws other random numbers ({drawn[0]} before, {drawn[1]} after)")
        return None
    if expected.results.keys() != actual.results.keys():
        return Divergence(stage, "the graph", Difference(f"{len(actual.results)} results instead of {len(expected.results)}"))
    for name, result in expected.results.items():
        if difference := _apart(result, actual.results[name]):
            node = _first_node(run(before, inputs, keep_nodes=True), run(after, inputs, keep_nodes=True))
            return Divergence(stage, name, difference, tolerance_of(min(result.grain, actual.results[name].grain)), *(node or ()))
    return None


def _apart(expected: Seen, actual: Seen) -> Difference | None:
    return differs(expected.value, actual.value, tolerance_of(min(expected.grain, actual.grain)))


def _first_node(before: Run, after: Run) -> tuple[str, str, str, Difference] | None:
    """The first node of `after` whose value differs from that of the node of `before` that it stands for."""
    for name, seen in after.nodes.items():
        expected = before.nodes.get(name)
        if expected is None or seen.value.numel() != expected.value.numel():
            continue
        reshaped = replace(seen, value=seen.value.reshape(expected.value.shape))  # a merged GEMM gives [..., heads, head size]
        if difference := _apart(expected, reshaped):
            return seen.node.name, target_name(seen.node), module_path(seen.node), difference
    return None


# ---- running a graph


@dataclass(frozen=True)
class Seen:
    """A value, the node that computed it, and its grain: the index in `COARSEST_FIRST` of the coarsest dtype it went through."""

    node: Node
    value: Any
    grain: int


@dataclass
class Run:
    """The result of a run. results: outputs, and inputs written in place, by name; random: the random operations, in order;
    nodes: the values of nodes, by their name in Dynamo's graph, if they were asked for."""

    results: dict[str, Seen]
    random: list[str]
    nodes: dict[str, Seen]


def run(gm: GraphModule, inputs: Sequence[Any], keep_nodes: bool = False) -> Run:
    """Runs a graph without side effects."""
    given, written = _private(gm, inputs)
    nodes: dict[str, Seen] = {}
    with _undisturbed(inputs), torch.no_grad(), _RandomOps() as random:
        tracker = _Tracker(gm, nodes if keep_nodes else None)
        values = tracker.run(*given)
    output = gm.graph.output_node()
    sources: Any = output.args[0]
    if not isinstance(values, (tuple, list)):
        values, sources = (values,), (sources,)
    results = {f"output {i}": Seen(output, v, tracker.grain.get(sources[i], EXACT)) for i, v in enumerate(values)}
    coarsest = min((result.grain for result in results.values()), default=EXACT)
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if i in written:
            results[f"the input {node.name}, written in place"] = Seen(node, given[i], coarsest)
    return Run(results, random.drawn, nodes)


def _private(gm: GraphModule, inputs: Sequence[Any]) -> tuple[list[Any], set[int]]:
    """The inputs, with copies of those that the graph might write, and the positions of these copies.

    Parameters are large, and a forward pass only writes them by an operation that declares it; batch norm writes buffers
    without declaring it.
    """
    memory = {storage(w) for body in [gm, *(c.body for c in calls(gm))] for n in body.graph.nodes for w in writes(n)} - {None}
    given: list[Any] = [x.detach() if isinstance(x, torch.Tensor) else hint(x) if isinstance(x, torch.SymInt) else x for x in inputs]
    copied: set[int] = set()
    for i, (node, x) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), given, strict=False)):
        if not isinstance(x, torch.Tensor) or (is_owned(node) and storage(node) not in memory):
            continue
        if all(stride or size <= 1 for size, stride in zip(x.shape, x.stride(), strict=True)):  # torch writes no expanded tensor
            copied.add(i)
            given[i] = x.clone()
    return given, copied


@contextmanager
def _undisturbed(inputs: Sequence[Any]) -> Iterator[None]:
    """Restores the state of random generators and, even after an error, of autocast."""
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
    cuda = sorted({d.index for d in devices if d.type == "cuda" and d.index is not None})
    with ExitStack() as stack:
        stack.callback(_leave_autocast, torch.autocast_increment_nesting())
        stack.enter_context(torch.random.fork_rng(cuda))
        for kind in {"cpu", *(d.type for d in devices)} & {"cpu", "cuda", "xpu"}:
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
        yield


def _leave_autocast(depth: int) -> None:
    """Leaves the autocast regions from `depth` on that a failed graph left open; else the weights that it cast would be cached forever."""
    while torch.autocast_decrement_nesting() >= depth:
        pass
    if depth == 1:
        torch.clear_autocast_cache()


class _RandomOps(TorchDispatchMode):
    """Records each operation that draws random numbers, with the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            arguments = func._schema.arguments
            given = {a.name: a.default_value for a in arguments} | dict(zip([a.name for a in arguments], args, strict=False))
            if (given | (kwargs or {})).get("dropout_p", 1) != 0:  # fused attention draws only with dropout
                self.drawn.append(f"{func}{[list(t.shape) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]}")
        return result


class _Tracker(Interpreter):
    """Runs a graph and its checkpointed or repeated sub-graphs node by node, and tracks how coarse each value is.

    It skips changes of grad mode: nothing here is recorded. seen: receives each node's value, None if that is not needed;
    path: the prefix of the names in it; inherited: the grains of a sub-graph's inputs.
    """

    def __init__(self, gm: GraphModule, seen: dict[str, Seen] | None, path: str = "", inherited: Sequence[int] = ()) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.seen, self.path, self.inherited = seen, path, iter(inherited)
        self.bodies = {call.node: call for call in calls(gm)}
        self.grain: dict[Any, int] = {}

    def run_node(self, n: Node) -> Any:
        grain = min((self.grain[i] for i in n.all_input_nodes), default=EXACT)
        if n in self.bodies:
            call = self.bodies[n]
            inner = _Tracker(call.body, self.seen, f"{self.path}{n.name}/", [self.grain.get(o, EXACT) for o in call.operands])
            value = inner.run(*self.map_nodes_to_values(call.operands, n))  # type: ignore[misc]
            grain = min(grain, *inner.grain.values())
        else:
            value = None if is_call(n, SET_GRAD) else super().run_node(n)
        if n.op == "placeholder":
            grain = next(self.inherited, EXACT)
        self.grain[n] = min(_grain(value), grain)
        if self.seen is not None and n.op in ("call_function", "call_method") and isinstance(value, torch.Tensor):
            self.seen.setdefault(f"{self.path}{stands_for(n)}", Seen(n, value.detach().clone(), self.grain[n]))
        return value


def stands_for(node: Node) -> str:
    """The name of the node of Dynamo's graph that has this node's value."""
    if is_call(node, operator.getitem) and MEMBERS in (group := node.args[0]).meta:
        return group.meta[MEMBERS][node.args[1]].get(ORIGIN, node.name)
    return node.meta.get(ORIGIN, node.name)


# ---- comparing values

EXACT = len(COARSEST_FIRST)  # the grain of values that no float went into
PIECE = 1 << 22  # elements compared at a time, in float64


def _grain(value: Any) -> int:
    dtypes = {leaf.dtype for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)}
    return min((COARSEST_FIRST.index(d) for d in dtypes if d in TOLERANCE), default=EXACT)


def tolerance_of(grain: int) -> Tolerance | None:
    """The tolerance for a value of this grain; None if it must be equal."""
    if grain == EXACT:
        return None
    dtype = COARSEST_FIRST[grain]
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16  # TF32 has as many bits
    return TOLERANCE[dtype]


def differs(expected: Any, actual: Any, tolerance: Tolerance | None) -> Difference | None:
    """How `actual` differs from `expected` if by more than the tolerance allows; else None."""
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        equal = expected == actual or (expected != expected and actual != actual)
        return None if equal else Difference(f"{actual!r} instead of {expected!r}")
    kinds = [f"{value.dtype} {list(value.shape)} on {value.device}" for value in (expected, actual)]
    if kinds[0] != kinds[1]:
        return Difference(f"{kinds[1]} instead of {kinds[0]}")
    if tolerance is not None and (expected.dtype.is_floating_point or expected.dtype.is_complex):
        return _differing_floats(expected, actual, tolerance)
    wrong = int((expected != actual).sum())
    allowed = 0 if tolerance is None else math.ceil(MISMATCHED_INTEGERS * expected.numel())
    return Difference(f"{wrong} of {expected.numel()} elements differ") if wrong > allowed else None


def _differing_floats(expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance) -> Difference | None:
    signal = noise = largest = 0.0
    for e, a in zip(expected.reshape(-1).split(PIECE), actual.reshape(-1).split(PIECE), strict=True):
        e, a = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (e, a))
        finite = torch.isfinite(e)
        strange = int(((e != a) & ~(e.isnan() & a.isnan()) & ~(finite & torch.isfinite(a))).sum())
        if strange:
            return Difference(f"{strange} elements are infinite or NaN in one of the two only")
        error = (e - a)[finite].abs()
        signal += e[finite].abs().square().sum().item()
        noise += error.square().sum().item()
        largest = max(largest, error.max().item() if error.numel() else 0.0)
    if signal == 0:
        return Difference("not zero", max_error=largest) if largest > torch.finfo(expected.dtype).eps else None
    sqnr = 10 * math.log10(signal / noise) if noise else math.inf
    return None if sqnr >= tolerance.least_sqnr else Difference("differs", sqnr, largest)
