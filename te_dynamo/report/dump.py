"""`debug_dir`: each graph after each stage, as a script that a person can read and that runs by itself.

`<debug_dir>/graph_<n>/<index>_<stage>.py` holds the graph as straightforward Python, one line a node, with shapes, dtypes
and module paths as comments; inputs of the right kind from a fixed seed; and, run as a program, a forward and a backward
pass and a summary of what they give. The inputs imitate the real ones (their mean and deviation, the range of indices):
the model's own data is not in the file, but for scalars and small integer tensors, such as positions.
"""

from __future__ import annotations

import builtins
import enum
import keyword
import math
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.fx.graph import magic_methods
from torch.utils._dtype_abbrs import dtype_abbrs

from te_dynamo.ir.graph import example, hint, is_call, is_method, tensor
from te_dynamo.passes.effects import storage, writes
from te_dynamo.passes.higher_order import calls
from te_dynamo.sites import Site, module_path

SMALL = 16  # integer tensors of up to so many elements are written out: positions, lengths, counters
NO_HINT = 16  # the size taken for one that depends on data
ALREADY_IMPORTED = re.compile(r"torch(\._C\b.*|\.nn\.functional|\.ops)?$|builtins$")
PRECISE = torch.float64

FOOTER = """
def show(name, value):
    if isinstance(value, torch.Tensor):
        wide = torch.complex128 if value.is_complex() else torch.float64
        print(f"{name}: {value.dtype} {tuple(value.shape)}, norm {value.detach().to(wide).norm():.6g}")
    else:
        print(f"{name}: {value!r}")


if __name__ == "__main__":
    given = inputs()
    torch.manual_seed(1)
    with torch.set_grad_enabled(@grad_enabled@):
        outputs = graph(**given)
    for number, output in enumerate(outputs):
        show(f"output {number}", output)
    losses = [o.abs().sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    if losses:
        sum(loss.float() for loss in losses).backward()
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.is_leaf and value.grad is not None:
                show(f"gradient of {name}", value.grad)
"""


class Dump:
    """The dumps of one compiled graph.

    directory: `debug_dir`; graph_number: where to begin to look for a folder `graph_<n>` that no one has taken: other
    graphs, other processes and earlier runs keep theirs. `.folder` is the one found, made at the first stage.
    """

    def __init__(self, directory: str | os.PathLike[str], graph_number: int) -> None:
        self.directory, self.graph_number = Path(directory), graph_number
        self.folder: Path | None = None
        self.filled: dict[str, str] = {}  # how each input is made: found once, the same at every stage
        self.grad_enabled = torch.is_grad_enabled()

    def stage(self, index: int, name: str, gm: GraphModule, inputs: Sequence[Any]) -> Path:
        """Writes the graph as a stage left it, and returns the file.

        inputs: what the graph is called with, in the order of its placeholders: real values, fake ones, or fewer than
        placeholders. What is not there is made up from the placeholders' fake values. Raises OSError where the folder
        cannot be written.
        """
        if self.folder is None:
            self.folder, self.graph_number = _new_folder(self.directory, self.graph_number)
        path = self.folder / f"{index}_{name}.py"
        title = f"Graph {self.graph_number} after the stage {name!r}{_process()}; torch {torch.__version__}."
        path.write_text(Script(gm, inputs, self.filled).text(f"{title}\n\nRuns by itself: python {path.name}", self.grad_enabled))
        return path


def _new_folder(directory: Path, number: int) -> tuple[Path, int]:
    """Makes the first `graph_<n>` from `number` on that is not there; making it is what reserves it."""
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        folder = directory / f"graph_{number}"
        try:
            folder.mkdir()
            return folder, number
        except FileExistsError:
            number += 1


def _process() -> str:
    rank = os.environ.get("RANK")
    return f", process {os.getpid()}" + (f" (rank {rank})" if rank is not None else "")


class Script:
    """One graph as a Python file."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], filled: dict[str, str]) -> None:
        self.gm, self.inputs, self.filled = gm, inputs, filled
        self.imports = {"torch"}
        self.stubs: dict[str, str] = {}  # what cannot be imported: its name here -> what it is
        self.functions: dict[int, str] = {}  # sub-graphs: id -> name
        self.bodies: list[str] = []
        self.bounds = index_bounds(gm)

    def text(self, title: str, grad_enabled: bool) -> str:
        self._function("graph", self.gm)
        made = self._inputs()
        stubs = [f"def {name}(*args, **kwargs):\n    raise NotImplementedError({what!r})" for name, what in self.stubs.items()]
        imports = "\n".join(f"import {module}" for module in sorted(self.imports))
        parts = [f'"""{title}\n"""', imports, *stubs, *self.bodies, made]
        return "\n\n\n".join(parts) + "\n\n" + FOOTER.replace("@grad_enabled@", str(grad_enabled))

    # ---- the graph

    def _function(self, name: str, gm: GraphModule) -> None:
        """Adds `gm` as a function; what it calls comes before it."""
        names = node_names(gm, self._taken())
        lines = [line for node in gm.graph.nodes for line in self._line(gm, node, names)]
        parameters = [f"    {names[n]},{_comment(n)}" for n in gm.graph.nodes if n.op == "placeholder"]
        head = f"def {name}(\n" + "\n".join(parameters) + "\n):" if parameters else f"def {name}():"
        self.bodies.append("\n".join([head, *(f"    {line}" for line in lines)]))

    def _taken(self) -> set[str]:
        """Names that no variable may have: of modules, and of the functions of the file."""
        targets = (n.target for m in self.gm.modules() if isinstance(m, GraphModule) for n in m.graph.nodes if n.op == "call_function")
        roots = {qualified_name(t).partition(".")[0] for t in targets}
        return {"torch", "graph", "inputs", "show", *roots, *dir(builtins), *self.functions.values()}

    def _line(self, gm: GraphModule, node: Node, names: Mapping[Node, str]) -> Iterator[str]:
        if node.op == "output":
            yield f"return {self._value(node.args[0], names, gm)}"
        elif node.op in ("call_function", "call_method", "call_module"):
            yield f"{self._statement(gm, node, names)}{_comment(node)}"
        elif node.op == "get_attr" and not isinstance(getattr(gm, str(node.target), None), GraphModule):
            yield f"{names[node]} = {self._constant(_attribute(gm, str(node.target)))}{_comment(node)}"

    def _statement(self, gm: GraphModule, node: Node, names: Mapping[Node, str]) -> str:
        args = [self._value(a, names, gm) for a in node.args]
        kwargs = [f"{k}={self._value(v, names, gm)}" for k, v in node.kwargs.items()]
        left = names[node]
        if is_call(node, operator.setitem) and len(args) == 3:
            return f"{args[0]}[{self._index(node.args[1], names, gm)}] = {args[2]}"
        if is_call(node, operator.getitem) and len(args) == 2:
            return f"{left} = {args[0]}[{self._index(node.args[1], names, gm)}]"
        if is_call(node, getattr) and len(args) == 2 and isinstance(node.args[1], str):
            return f"{left} = {args[0]}.{node.args[1]}"
        if node.op == "call_method":
            return f"{left} = {args[0]}.{node.target}({', '.join([*args[1:], *kwargs])})"
        if node.op == "call_module":
            return f"{left} = {self._stub(f'the module {node.target}')}({', '.join([*args, *kwargs])})"
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in HIGHER_ORDER:
            return f"{left} = {HIGHER_ORDER[node.target.name()](args, kwargs)}"
        form = magic_methods.get(node.target.__name__) if getattr(operator, _name(node.target), None) is node.target else None
        if form is not None and not kwargs and form.count("{}") == len(args):
            return f"{left} = {form.format(*(f'({a})' if a.startswith('-') else a for a in args))}"
        return f"{left} = {self._reference(node.target)}({', '.join([*args, *kwargs])})"

    def _index(self, index: Any, names: Mapping[Node, str], gm: GraphModule) -> str:
        if isinstance(index, tuple) and index:
            return ", ".join(self._index(i, names, gm) if not isinstance(i, tuple) else self._value(i, names, gm) for i in index) + (
                "," if len(index) == 1 else ""
            )
        if not isinstance(index, slice):
            return self._value(index, names, gm)
        start, stop, step = ("" if i is None else self._value(i, names, gm) for i in (index.start, index.stop, index.step))
        return f"{start}:{stop}" + (f":{step}" if step else "")

    def _value(self, value: Any, names: Mapping[Node, str], gm: GraphModule) -> str:
        """An argument as Python."""

        def inner(values: Iterable[Any]) -> str:
            return ", ".join(self._value(v, names, gm) for v in values)

        if isinstance(value, Node):
            body = getattr(gm, str(value.target), None) if value.op == "get_attr" else None
            return self._subgraph(str(value.target), body) if isinstance(body, GraphModule) else names[value]
        if isinstance(value, tuple):
            return f"({inner(value)}{',' if len(value) == 1 else ''})"
        if isinstance(value, (list, set)) and (value or isinstance(value, list)):
            return f"[{inner(value)}]" if isinstance(value, list) else f"{{{inner(value)}}}"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self._value(v, names, gm)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({inner((value.start, value.stop, value.step))})"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        """A value that no node makes."""
        if value is Ellipsis:
            return "..."
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, enum.Enum):
            return f"{self._reference(type(value))}.{value.name}"
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, range)):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return repr(_number(value))
        if isinstance(value, torch.Tensor):
            return fill(value, value, None)
        if callable(value):
            return self._reference(value)
        return f"{self._stub(repr(value))}()"

    def _subgraph(self, name: str, body: GraphModule) -> str:
        if id(body) not in self.functions:
            self.functions[id(body)] = _unique(_identifier(name), self._taken())
            self._function(self.functions[id(body)], body)
        return self.functions[id(body)]

    def _reference(self, target: Any) -> str:
        """The name of a function or a class, imported; a stub that says so where it has none."""
        name = qualified_name(target)
        module = _module_of(name)
        if module is None or _resolve(name, module) is not target:
            return self._stub(f"{name} cannot be imported")
        for needed in (module, *_registering_module(target)):
            if not ALREADY_IMPORTED.match(needed):
                self.imports.add(needed)
        return name

    def _stub(self, what: str) -> str:
        known = {described: name for name, described in self.stubs.items()}
        name = known.get(what) or f"not_here_{len(self.stubs)}"
        self.stubs[name] = what
        return name

    # ---- its inputs

    def _inputs(self) -> str:
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        names = node_names(self.gm, self._taken())
        written = {storage(w) for n in self.gm.graph.nodes for w in writes(n)}
        lines = ["def inputs():", "    torch.manual_seed(0)", "    return {"]
        for i, node in enumerate(placeholders):
            if node.name not in self.filled:
                self.filled[node.name] = self._fill(node, self.inputs[i] if i < len(self.inputs) else None)
            grad = _gradient(node, storage(node) in written)
            lines.append(f'        "{names[node]}": {self.filled[node.name]}{grad},{_comment(node, source=True)}')
        return "\n".join([*lines, "    }"])

    def _fill(self, node: Node, given: Any) -> str:
        value = tensor(node)
        if value is None:
            number = example(node) if given is None else given
            return repr(_number(number)) if isinstance(number, SYMBOLIC) else self._constant(number)
        state = next((made for prefix, made in STATE_INPUTS.items() if str(node.target).startswith(prefix)), None)
        if state is not None and getattr(node, "_dynamo_source", None) is None:
            return made_of(value, state)
        items = [_number(example(user)) for user in node.users if is_method(user, "item") and isinstance(example(user), SYMBOLIC)]
        if items and not _is_real(given):
            return made_of(value, f"torch.full({{size}}, {items[0]!r}, {{kind}})")
        return fill(value, given if _is_real(given) else None, self.bounds.get(node))


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
HIGHER_ORDER = {
    # Both run the function; in eager mode the operators themselves take GraphModules only.
    "tag_activation_checkpoint": lambda args, kwargs: (
        "torch.utils.checkpoint.checkpoint("
        + ", ".join([*args, *(k for k in kwargs if not k.startswith("use_reentrant=")), "use_reentrant=False"])
        + ")"
    ),
    "invoke_subgraph": lambda args, kwargs: f"{args[0]}({', '.join([*args[2:], *kwargs])})",
    "cond": lambda args, kwargs: f"({args[1]} if {args[0]} else {args[2]})(*{args[3]})",
}
STATE_INPUTS = {  # see `made_of`; a scale of 0 would be one that was never set
    "te_scale": "torch.ones({size}, {kind})",
    "te_grad_scale": "torch.ones({size}, {kind})",
    "te_grad_amax": "torch.zeros({size}, {kind})",
    "te_sink": "torch.zeros({size}, {kind})",
    "te_w_inv": "torch.full({size}, 0.01, {kind})",
}


def _gradient(node: Node, written: bool) -> str:
    """A leaf that requires grad may not be written in place: then the graph gets a copy, as in the model."""
    value = tensor(node)
    if value is None or not value.requires_grad:
        return ""
    return ".requires_grad_()" + (".clone()" if written or not value.is_leaf else "")


# ---- names


def node_names(gm: GraphModule, taken: set[str]) -> dict[Node, str]:
    """The variable of each node: its name in the graph, without what Dynamo wraps around a parameter's path."""
    names: dict[Node, str] = {}
    used = set(taken)
    for node in gm.graph.nodes:
        name = node.name
        if node.op == "placeholder":
            name = re.sub(r"_(?:modules|parameters|buffers)_", "_", re.sub(r"^l_.*?_(?=(?:modules|parameters|buffers)_)", "_", name))
        names[node] = _unique(_identifier(name.strip("_") if node.op == "placeholder" else name), used)
        used.add(names[node])
    return names


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name) or "_"
    return f"_{name}" if name[0].isdigit() else name


def _unique(name: str, taken: set[str]) -> str:
    while name in taken or keyword.iskeyword(name):
        name += "_"
    return name


def _name(target: Any) -> str:
    return getattr(target, "__name__", "")


def qualified_name(target: Any) -> str:
    """Where a function or a class is found: "torch.nn.functional.embedding", "torch.ops.aten.add.Tensor"."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    if isinstance(target, type):
        return f"{target.__module__}.{target.__qualname__}"
    if getattr(torch, _name(target), None) is target:
        return f"torch.{_name(target)}"
    try:
        name = torch.fx.node._get_qualified_name(target)
    except (AttributeError, RuntimeError):
        name = repr(target)
    return f"operator.{name.removeprefix('_operator.')}" if name.startswith("_operator.") else name


def _module_of(name: str) -> str | None:
    """The module in which a qualified name is looked up."""
    if name.startswith("torch.ops."):
        return "torch"
    if "." not in name:
        return "builtins" if hasattr(builtins, name) else None
    parts = name.split(".")
    return next((m for i in range(len(parts) - 1, 0, -1) if (m := ".".join(parts[:i])) in sys.modules), None)


def _resolve(name: str, module: str) -> Any:
    found: Any = sys.modules[module]
    for part in (name if module == "builtins" else name.removeprefix(f"{module}.")).split("."):
        found = getattr(found, part, None)
    return found


def _registering_module(target: Any) -> Iterator[str]:
    """The module that registers a custom operator, where it was defined with `torch.library.custom_op`."""
    packet = target._overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if isinstance(packet, torch._ops.OpOverloadPacket):
        definition = torch._library.custom_ops.OPDEFS.get(packet._qualified_op_name)
        if definition is not None:
            yield definition._init_fn.__module__


def _attribute(gm: GraphModule, target: str) -> Any:
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


# ---- comments


def describe(value: Any) -> str:
    """A fake value in short: `bf16[2, s77, 64]`."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_abbrs.get(value.dtype, str(value.dtype))}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, torch.Size):
        return f"size {tuple(value)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(v) for v in value)})"
    return str(value) if isinstance(value, SYMBOLIC) else ""


def _comment(node: Node, source: bool = False) -> str:
    """What is known of a node: its value, where it stands in the model, and what was planned for it."""
    site, plan, layout, slots = (node.meta.get(f"te_{key}") for key in ("site", "plan", "layout", "slots"))
    value = example(node)
    path = site.path if isinstance(site, Site) else "" if node.op == "placeholder" else module_path(node)
    notes = [describe(value), path]
    if source and isinstance(value, SYMBOLIC):
        notes.append("symbolic, its hint")
    elif source and isinstance(value, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in value.shape):
        notes.append("symbolic sizes are their hints")
    if plan is not None:
        notes.append(f"{plan.provider}, {f'{plan.recipe.name} scaling' if plan.recipe else 'high precision'}")
    if layout is not None:
        notes.append(f"layout {layout.name}")
    if slots is not None:
        notes.append(f"scale {slots.f}, grad_scale {slots.g}")
    text = " | ".join(note for note in notes if note)
    return f"  # {text}" if text else ""


# ---- values that imitate the real ones


def _number(value: Any) -> Any:
    """What a symbolic number is in this run."""
    known = value.node.hint if isinstance(value, SYMBOLIC) else value
    kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}.get(type(value), lambda v: v)
    return kind(NO_HINT if known is None else known)


def _sizes(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(NO_HINT if hint(v) is None else hint(v) for v in values)  # type: ignore[misc]


def _is_real(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type != "meta"


def fill(value: torch.Tensor, real: torch.Tensor | None, bound: int | None) -> str:
    """An expression for a tensor like `value` (often fake), with numbers that resemble those of `real`.

    bound: what a tensor of indices must stay below; None where it is not known to be one.
    """
    if real is not None and not _is_real(real):
        real = None
    if value.dtype == torch.bool:
        return made_of(value, "torch.rand({size}{device}) < 0.9")
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        return _fill_integers(value, real, bound)
    mean, deviation, positive = _moments(value, real)
    if deviation == 0:
        return made_of(value, f"torch.full({{size}}, {mean!r}, {{kind}})")
    numbers = "torch.randn({size}, {kind})" + (f" * {deviation:.3g}" if deviation != 1 else "") + (f" + {mean:.3g}" if mean else "")
    return made_of(value, f"({numbers}).abs()" if positive else numbers)


def _moments(value: torch.Tensor, real: torch.Tensor | None) -> tuple[float, float, bool]:
    """(mean, standard deviation, whether nothing is negative)."""
    if real is None or real.numel() == 0 or real.is_complex():
        is_parameter = isinstance(value, torch.nn.Parameter)
        return (1.0, 0.0, True) if is_parameter and value.dim() == 1 else (0.0, 0.02 if is_parameter else 1.0, False)
    with torch.no_grad():
        wide = real.detach().to(torch.float32)
        finite = wide[torch.isfinite(wide)] if not torch.isfinite(wide).all() else wide
        if finite.numel() == 0:
            return 0.0, 1.0, False
        mean, deviation, least = finite.mean().item(), finite.std(correction=0).item(), finite.min().item()
    if finite.numel() == 1:
        return finite.to(PRECISE).item() if real.numel() > 1 else real.detach().to(PRECISE).item(), 0.0, least >= 0
    if least >= 0 and deviation and mean < 2 * deviation:  # as an absolute value of something around 0
        return 0.0, (mean**2 + deviation**2) ** 0.5, True
    return (mean if abs(mean) > deviation / 10 else 0.0), deviation, least >= 0


def _fill_integers(value: torch.Tensor, real: torch.Tensor | None, bound: int | None) -> str:
    low, high = 0, 2
    if real is not None and real.numel():
        if real.numel() <= SMALL and real.numel() == math.prod(_sizes(value.shape)):
            return made_of(value, f"torch.tensor({real.tolist()}, {{kind}})")
        low, high = int(real.min()), int(real.max()) + 1
    if bound is not None:
        low, high = max(low, 0), bound if real is None else min(bound, max(high, 1))
    return made_of(value, f"torch.randint({low}, {high}, {{size}}, {{kind}})")


def made_of(value: torch.Tensor, numbers: str) -> str:
    """The expression `numbers`, with `{size}`, `{kind}` (dtype and device) and `{device}` put in as `value` has them.

    Strides that are not those of a dense tensor are laid over numbers made in a row.
    """
    size, stride = _sizes(value.shape), _sizes(value.stride())
    device = "" if value.device.type == "cpu" else f', device="{value.device}"'
    narrow = value.dtype.is_floating_point and value.dtype.itemsize == 1  # float8: its random numbers are made wider
    strided = "{size}" in numbers and not _is_dense(size, stride)
    extent = (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if math.prod(size) else 0,) if strided else size
    made = numbers.replace("{size}", str(extent)).replace("{device}", device)
    made = made.replace("{kind}", f"dtype={torch.float32 if narrow else value.dtype}{device}")
    if " " in re.sub(r"\(.*\)", "", made):  # what follows belongs to all of it
        made = f"({made})"
    return made + (f".to({value.dtype})" if narrow else "") + (f".as_strided({size}, {stride})" if strided else "")


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True


# ---- what an integer input indexes


def index_bounds(gm: GraphModule) -> dict[Node, int]:
    """For each integer input that is used to look something up, directly or after moves and slices: the smallest number of
    rows it is looked up in."""
    found: dict[Node, int] = {}
    for node in gm.graph.nodes:
        value = tensor(node)
        if node.op == "placeholder" and value is not None and _is_integer(value):
            bounds = list(_bounds(gm, node, set()))
            if bounds:
                found[node] = min(bounds)
    return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _bounds(gm: GraphModule, node: Node, seen: set[Node]) -> Iterator[int]:
    seen.add(node)
    bodies = {call.node: call for call in calls(gm)}
    for user in node.users:
        if user in bodies:
            call = bodies[user]
            inner = [n for n in call.body.graph.nodes if n.op == "placeholder"]
            for placeholder, operand in zip(inner, call.operands, strict=False):
                if operand is node:
                    yield from _bounds(call.body, placeholder, seen)
            continue
        bound = _rows_looked_up(user, node)
        if bound is not None:
            yield bound
        elif user not in seen and _is_integer(tensor(user)):
            yield from _bounds(gm, user, seen)


def _rows_looked_up(user: Node, index: Node) -> int | None:
    """The number of rows among which `user` looks up `index`; None where it does something else with it."""
    args = (*user.args, *user.kwargs.values())
    if is_call(user, F.embedding, F.embedding_bag) and args[0] is index:
        return _size(args[1], 0)
    if is_call(user, F.cross_entropy, F.nll_loss) and len(args) > 1 and args[1] is index:
        logits = tensor(args[0])
        return None if logits is None else _size(args[0], 0 if logits.dim() == 1 else 1)
    if user.target in (F.one_hot, "one_hot") and args[0] is index and len(args) > 1 and isinstance(args[1], int):
        return args[1] if args[1] > 0 else None
    if user.target in (torch.gather, torch.index_select, "gather", "index_select", "scatter", "scatter_", "scatter_add_", "index_add_"):
        given: dict[str, Any] = dict(zip(("input", "dim", "index"), user.args, strict=False)) | dict(user.kwargs)
        if given.get("index") is index and isinstance(given.get("dim"), int):
            return _size(given["input"], given["dim"])
    if is_call(user, operator.getitem):
        places = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
        at = next((i for i, place in enumerate(places) if place is index), None)
        return None if at is None else _size(user.args[0], _dimension(places, at))
    return None


def _dimension(places: Sequence[Any], at: int) -> int:
    """The dimension for which the place `at` of an index stands: None stands for none, an ellipsis for the rest."""
    if any(p is Ellipsis for p in places[:at]):
        return -sum(p is not None for p in places[at:])
    return sum(p is not None for p in places[:at])


def _size(node: Any, dim: int) -> int | None:
    value = tensor(node)
    return None if value is None or not -value.dim() <= dim < value.dim() else _sizes(value.shape)[dim]
