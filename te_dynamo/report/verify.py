"""`verify=True`: each high-precision stage is compared with the graph it was given, on the real inputs of the first call.

The stages up to `plan` keep what the model computes, to rounding. Where one does not, `VerificationError` names the pass,
the first output that differs and by how much, and the first node whose value differs and where in the model it stands:
both graphs are interpreted side by side, a node of one matched with the node of the other that it stands for.
Verification leaves everything as it was: no gradient is recorded, inputs that may be written are copied, and both graphs
draw the same random numbers, after which the generators are where they were.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

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


@dataclass(frozen=True)
class Tolerance:
    """least_sqnr: the signal-to-noise ratio in dB that two orders of computing the same must reach; reason: why that much."""

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
MISMATCHED_INTEGERS = 0.01  # the share that may differ: a comparison or an argmax of rounded values turns at a tie
COARSEST_FIRST = sorted(TOLERANCE, key=lambda dtype: TOLERANCE[dtype].least_sqnr)


class VerificationError(RuntimeError):
    """A stage changed what the model computes. `.divergence` tells where."""

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence
        super().__init__(f"te_fp8: {divergence}")


@dataclass(frozen=True)
class Difference:
    """How far two values are apart. sqnr: in dB, None where it has no meaning; max_error: the largest absolute error."""

    what: str
    sqnr: float | None = None
    max_error: float | None = None

    def __str__(self) -> str:
        sqnr = "" if self.sqnr is None else f", SQNR {self.sqnr:.1f} dB"
        return f"{self.what}{sqnr}" + ("" if self.max_error is None else f", largest error {self.max_error:.3g}")


@dataclass(frozen=True)
class Divergence:
    """What a stage changed.

    stage: the pass; output: which of the graph's results differs first ("output 0", or an input that is written in
    place); difference: how far; tolerance: what was allowed; node, target, path, at_node: the first node of the graph after
    the stage whose value differs, what it calls, the module it stands in, and how far it is off; None where every node that
    can be compared is equal.
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


@dataclass
class Verifier:
    """Compares the graphs of one compile, once, when its first real inputs come.

    original: the graph before the first stage; add what each stage leaves with `stage`. Graphs are copied.
    """

    original: GraphModule
    graphs: list[tuple[str, GraphModule]] = field(init=False)
    notes: list[str] = field(default_factory=list)  # what could not be compared, and why

    def __post_init__(self) -> None:
        self.graphs = [("", copy_graph_module(self.original))]

    def stage(self, name: str, gm: GraphModule) -> None:
        """Remembers the graph that a stage left."""
        self.graphs.append((name, copy_graph_module(gm)))

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Compares each stage with the one before it, at the first call with real inputs; later calls do nothing.

        inputs: what Dynamo calls its graph with. Raises VerificationError where a stage changed the result.
        """
        if any(is_fake(x) for x in inputs):
            return
        graphs, self.graphs = self.graphs, []
        for (_, before), (stage, after) in pairwise(graphs):
            divergence = compare(before, after, inputs, stage=stage, note=self._note)
            if divergence is not None:
                raise VerificationError(divergence)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        log.warning("te_dynamo: verify: %s", text)


def compare(
    before: GraphModule, after: GraphModule, inputs: Sequence[Any], *, stage: str, note: Callable[[str], None] = log.warning
) -> Divergence | None:
    """Runs both graphs on `inputs` and tells how `after` differs from `before`; None where it does not.

    stage: the name of the pass between them; note: is told why where they cannot be compared. The two graphs take the same
    inputs (`after` may take more at the end only if it does without them).
    """
    try:
        reference = run(before, inputs)
    except Exception as error:
        note(f"{stage} is not compared: its input graph cannot be run here ({type(error).__name__}: {error})")
        return None
    try:
        result = run(after, inputs)
    except Exception as error:
        return Divergence(stage, "the graph", Difference(f"cannot be run any more ({type(error).__name__}: {error})"))
    if reference.random != result.random:
        note(f"{stage} is not compared: it draws other random numbers ({_drawn(reference.random)} before, {_drawn(result.random)} after)")
        return None
    if reference.values.keys() != result.values.keys():
        return Divergence(stage, "the graph", Difference(f"{len(result.values)} results instead of {len(reference.values)}"))
    for name, expected in reference.values.items():
        tolerance = tolerance_of(min(reference.grain[name], result.grain[name]))
        difference = differs(expected, result.values[name], tolerance)
        if difference is not None:
            node = _first_node(before, after, inputs)
            return Divergence(stage, name, difference, tolerance, *(node or ()))
    return None


# ---- running a graph


@dataclass
class Run:
    """What a run gave. values: outputs and inputs written in place, by name; grain: for each, the place in `COARSEST_FIRST` of
    the coarsest dtype it went through; random: the random operations, in order; nodes: the values of the nodes, by what
    they stand for, where they were asked for."""

    values: dict[str, Any]
    grain: dict[str, int]
    random: list[tuple[Any, ...]]
    nodes: dict[str, Seen]


@dataclass(frozen=True)
class Seen:
    """A node as it ran: its value, and how coarse it is."""

    node: Node
    value: Any
    grain: int


def run(gm: GraphModule, inputs: Sequence[Any], keep_nodes: bool = False) -> Run:
    """Runs a graph without leaving a trace."""
    given, written = _private(gm, inputs)
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    seen: dict[str, Seen] = {}
    with _undisturbed(inputs), torch.no_grad(), _RandomOps() as random:
        tracker = _Tracker(gm, seen if keep_nodes else None)
        outputs = tracker.run(*given)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    values: dict[str, Any] = {f"output {i}": value for i, value in enumerate(outputs)}
    grain = {f"output {i}": tracker.output_grain(i) for i in range(len(outputs))}
    for i in written:
        name = f"the input {placeholders[i]}, written in place"
        values[name], grain[name] = given[i], min(grain.values(), default=EXACT)
    return Run(values, grain, random.drawn, seen)


def _private(gm: GraphModule, inputs: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The inputs, those that a graph might write as copies, and the places of these. Parameters are large and written in no
    forward pass but by an operation that says so; batch norm writes buffers without saying so."""
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    memory = {storage(w) for body in [gm, *(c.body for c in calls(gm))] for n in body.graph.nodes for w in writes(n)} - {None}
    given: list[Any] = []
    copied: list[int] = []
    for i, (node, value) in enumerate(zip(nodes, inputs, strict=False)):
        if isinstance(value, torch.Tensor) and (not is_owned(node) or storage(node) in memory) and not _overlaps(value):
            copied.append(i)
            given.append(value.detach().clone())
        elif isinstance(value, torch.SymInt):  # at compile time: the number it stands for
            given.append(hint(value))
        else:
            given.append(value.detach() if isinstance(value, torch.Tensor) else value)
    return given, copied


def _overlaps(value: torch.Tensor) -> bool:
    """Whether elements share memory (an expanded tensor): torch refuses to write these."""
    return any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))


@contextmanager
def _undisturbed(inputs: Sequence[Any]) -> Iterator[None]:
    """Random generators, and autocast even after an error, are afterwards what they were."""
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
    with ExitStack() as stack:
        cuda = sorted({d.index for d in devices if d.type == "cuda" and d.index is not None})
        stack.enter_context(torch.random.fork_rng(cuda, device_type="cuda") if cuda else torch.random.fork_rng([]))
        for kind in {"cpu", *(d.type for d in devices)} & {"cpu", "cuda", "xpu"}:
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
        yield


class _RandomOps(TorchDispatchMode):
    """Notes each operation that draws random numbers, with what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs or {}):
            self.drawn.append((str(func), *(tuple(t.shape) for t in tree_leaves(result) if isinstance(t, torch.Tensor))))
        return result


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation that may draw does: fused attention does so only with dropout."""
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip([a.name for a in arguments], args, strict=False)) | dict(kwargs)
    return given.get("dropout_p", 1) != 0


def _drawn(random: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(f"{name}{list(shapes[0]) if shapes else ''}" for name, *shapes in random) or "none"


class _Tracker(Interpreter):
    """Runs a graph and its checkpointed or repeated sub-graphs node by node, and knows how coarse each value is.

    It leaves grad mode alone: nothing here is recorded. seen: takes what each node gave, where that is wanted; inherited:
    how coarse the inputs of a sub-graph are.
    """

    def __init__(self, gm: GraphModule, seen: dict[str, Seen] | None, path: str = "", inherited: Sequence[int] = ()) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.seen, self.path, self.inherited = seen, path, iter(inherited)
        self.bodies = {call.node: call for call in calls(gm)}
        self.grain: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        sources = [self.grain[i] for i in n.all_input_nodes]
        if n in self.bodies:
            value, inner = self._run_body(n)
            sources.append(inner)
        elif is_call(n, SET_GRAD):
            value = None
        else:
            value = super().run_node(n)
        if n.op == "placeholder":
            sources.append(next(self.inherited, EXACT))
        self.grain[n] = min([_grain(value), *sources])
        if self.seen is not None and n.op in ("call_function", "call_method") and isinstance(value, torch.Tensor):
            self.seen.setdefault(f"{self.path}{stands_for(n)}", Seen(n, value.detach().clone(), self.grain[n]))
        return value

    def _run_body(self, n: Node) -> tuple[Any, int]:
        """What a sub-graph gives, and how coarse that is."""
        call = self.bodies[n]
        inherited = [self.grain[o] if isinstance(o, Node) else EXACT for o in call.operands]
        inner = _Tracker(call.body, self.seen, f"{self.path}{n.name}/", inherited)
        operands: Any = self.map_nodes_to_values(call.operands, n)
        value = inner.run(*operands)
        return value, min(inner.grain.values())

    def output_grain(self, i: int) -> int:
        """How coarse the graph's i-th output is."""
        outputs = next(n for n in self.graph.nodes if n.op == "output").args[0]
        value = outputs[i] if isinstance(outputs, (tuple, list)) else outputs
        return self.grain[value] if isinstance(value, Node) else EXACT


def stands_for(node: Node) -> str:
    """The name of the node of Dynamo's graph whose value this node gives."""
    group: Any
    place: Any
    group, place = (*node.args, None, None)[:2]
    if node.target is operator.getitem and isinstance(group, Node) and MEMBERS in group.meta:
        return group.meta[MEMBERS][place].get(ORIGIN, node.name)
    return node.meta.get(ORIGIN, node.name)


# ---- comparing values

EXACT = len(COARSEST_FIRST)  # the grain of what no float went into


def _grain(value: Any) -> int:
    """The place in `COARSEST_FIRST` of the coarsest dtype in a value."""
    dtypes = {leaf.dtype for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)}
    return min((COARSEST_FIRST.index(d) for d in dtypes if d in TOLERANCE), default=EXACT)


def tolerance_of(grain: int) -> Tolerance | None:
    """What is allowed of a value so coarse; None where it must be equal."""
    if grain == EXACT:
        return None
    dtype = COARSEST_FIRST[grain]
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16  # TF32 has as many bits
    return TOLERANCE[dtype]


def _first_node(before: GraphModule, after: GraphModule, inputs: Sequence[Any]) -> tuple[str, str, str, Difference] | None:
    """The first node of `after` that gives something else than the node of `before` that it stands for."""
    reference, result = run(before, inputs, keep_nodes=True).nodes, run(after, inputs, keep_nodes=True).nodes
    for name, seen in result.items():
        if name not in reference or seen.value.numel() != reference[name].value.numel():
            continue
        value = seen.value.reshape(reference[name].value.shape)  # a merged GEMM gives [..., heads, head size]
        difference = differs(reference[name].value, value, tolerance_of(min(seen.grain, reference[name].grain)))
        if difference is not None:
            return seen.node.name, target_name(seen.node), module_path(seen.node), difference
    return None


def differs(expected: Any, actual: Any, tolerance: Tolerance | None) -> Difference | None:
    """How `actual` is further from `expected` than the tolerance allows; None where it is not."""
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        equal = expected == actual or (expected != expected and actual != actual)
        return None if equal else Difference(f"{actual!r} instead of {expected!r}")
    if expected.dtype != actual.dtype or expected.shape != actual.shape or expected.device != actual.device:
        return Difference(f"{_kind(actual)} instead of {_kind(expected)}")
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        return _differing_integers(expected, actual, tolerance)
    if tolerance is None:
        return None if torch.equal(expected, actual) else Difference("is not equal")
    return _differing_floats(expected, actual, tolerance)


def _kind(value: torch.Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def _differing_integers(expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance | None) -> Difference | None:
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
    if noise == 0:
        return None
    if signal == 0:
        negligible = largest <= torch.finfo(expected.dtype).eps
        return None if negligible else Difference("not zero", max_error=largest)
    sqnr = 10 * math.log10(signal / noise)
    return None if sqnr >= tolerance.least_sqnr else Difference("differs", sqnr, largest)


PIECE = 1 << 22  # elements compared at a time, in float64
