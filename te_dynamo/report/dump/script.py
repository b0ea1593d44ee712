"""A graph as a Python file: PyTorch prints the nodes; this module adds comments, imports and the code that runs the graph."""

from __future__ import annotations

import enum
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from itertools import zip_longest
from operator import attrgetter, getitem, setitem
from pkgutil import resolve_name
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.node import _get_qualified_name, map_aggregate
from torch.utils._dtype_abbrs import dtype_abbrs

from te_dynamo.ir.graph import copy_graph_module, example, is_call, tensor
from te_dynamo.passes.effects import storage, writes
from te_dynamo.report.dump.inputs import SYMBOLIC, fill, fill_placeholder, index_bounds, number
from te_dynamo.sites import Site, module_path

IMPORTED_BY_TORCH = re.compile(r"torch(\._C\b.*|\.nn\.functional|\.ops\b.*)?$|builtins$")
PRINTED_AS_IS = (bool, int, complex, str, bytes, range, set, torch.dtype, torch.layout, torch.memory_format, type(None))

UNAVAILABLE = """def unavailable(what):
    def call(*args, **kwargs):
        raise NotImplementedError(f"{what} cannot be imported")

    return call"""
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
        outputs = Graph()(**given)
    for number, output in enumerate(outputs):
        show(f"output {number}", output)
    losses = [o.abs().sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    if losses:
        sum(loss.float() for loss in losses).backward()
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.is_leaf and value.grad is not None:
                show(f"gradient of {name}", value.grad)
"""


class Script:
    """One graph as a Python file.

    inputs: the values, real or fake, of the first placeholders; filled: by placeholder, the expression for its input:
    existing entries are used, missing ones added.
    """

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], filled: dict[str, str]) -> None:
        self.imports = {"torch"}
        self.classes: dict[str, str] = {}  # the text of the graph and each sub-graph, by name; sub-graphs come before their users
        copy = copy_graph_module(gm)
        self._add_class("Graph", copy)
        self.inputs = self._inputs(gm, [n.name for n in copy.graph.find_nodes(op="placeholder")], inputs, filled)

    def text(self, title: str, grad_enabled: bool) -> str:
        parts = [*self.classes.values(), self.inputs]
        if any("unavailable(" in part for part in parts):
            parts.insert(0, UNAVAILABLE)
        imports = "\n".join(f"import {module}" for module in sorted(self.imports))
        return "\n\n\n".join([f'"""{title}\n"""', imports, *parts]) + "\n\n" + FOOTER.replace("@grad_enabled@", str(grad_enabled))

    def _inputs(self, gm: GraphModule, names: Sequence[str], inputs: Sequence[Any], filled: dict[str, str]) -> str:
        """The function that makes the inputs. names: what the file calls the placeholders."""
        bounds, written = index_bounds(gm), {storage(target) for node in gm.graph.nodes for target in writes(node)}
        lines = ["def inputs():  # symbolic sizes are what they were in this trace", "    torch.manual_seed(0)", "    return {"]
        for name, node, given in zip_longest(names, gm.graph.find_nodes(op="placeholder"), inputs[: len(names)]):
            value = tensor(node)
            if node.name not in filled:
                scalar = example(node) if given is None else given
                filled[node.name] = self._text(scalar) if value is None else fill_placeholder(node, given, bounds.get(node))
            grad = ""
            if value is not None and value.requires_grad:  # a leaf cannot be written in place: then the graph gets a copy
                grad = ".requires_grad_()" + (".clone()" if storage(node) in written or not value.is_leaf else "")
            lines.append(f'        "{name}": {filled[node.name]}{grad},{_comment(node)}')
        return "\n".join([*lines, "    }"])

    def _add_class(self, name: str, gm: GraphModule) -> str:
        """Adds a graph as a class, and returns the class's name. Changes `gm` so that it can be printed."""
        members: dict[str, str] = {}
        nodes = list(gm.graph.nodes)
        for node in nodes:
            self._make_printable(gm, node, members)
        roots = {module.partition(".")[0] for module in self.imports}
        for node in nodes:
            if node.name in roots:
                node._rename(f"{node.name}_")
        codegen = _CodeGen(nodes)
        gm.graph.set_codegen(codegen)
        gm.graph.on_generate_code(lambda _: codegen.annotated)
        code = gm.graph.python_code("self")
        # PyTorch prints "torch.add", but "te_dynamo_ops_linear" for `te_dynamo.ops.linear`.
        names = {short: full for short, value in code.globals.items() if value is not torch.device and (full := self._name_of(value))}
        source = re.sub(r"\b(\w+)\b", lambda word: names.get(word[0], word[0]), code.src.strip())
        while name in self.classes:
            name += "_"
        body = "\n".join([*(f"{member} = {made}" for member, made in members.items()), source])
        self.classes[name] = f"class {name}(torch.nn.Module):\n{textwrap.indent(body, '    ')}"
        return name

    def _make_printable(self, gm: GraphModule, node: Node, members: dict[str, str]) -> None:
        """Changes a node so that its printed form runs as plain Python. members: receives the attributes that the class needs."""
        node.type = None
        if node.op == "placeholder":
            node._rename(_parameter_name(node.name))
            node.target = node.name
        elif node.op in ("get_attr", "call_module"):
            value = attrgetter(str(node.target))(gm)
            node.target = str(node.target).replace(".", "_")
            if node.target not in members:
                is_graph = isinstance(value, GraphModule)
                members[node.target] = f"{self._add_class(node.target, value)}()" if is_graph else self._text(value)
        elif is_call(node, torch.ops.higher_order.tag_activation_checkpoint):  # in eager mode it takes GraphModules only
            node.target, node.kwargs = torch.utils.checkpoint.checkpoint, {**node.kwargs, "use_reentrant": False}
        elif is_call(node, torch.ops.higher_order.invoke_subgraph):
            node.op, node.target, node.args = "call_module", node.args[0].target, node.args[2:]
        elif node.op == "call_function" and self._name_of(node.target) is None:
            members[missing := f"missing_{len(members)}"] = self._text(node.target)
            node.op, node.target = "call_module", missing
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), self._leaf)
        if is_call(node, getitem, setitem) and isinstance(index := node.args[1], (slice, tuple)):
            node.args = (node.args[0], Verbatim(lambda: _subscript(index)), *node.args[2:])

    def _leaf(self, value: Any) -> Any:
        """An argument, or a replacement if PyTorch would print text that does not run."""
        if isinstance(value, Node) or (text := self._text(value)) == repr(value):
            return value
        return Verbatim(lambda: text)

    def _text(self, value: Any) -> str:
        """A value that is not a node, as Python."""
        if isinstance(value, enum.Enum):
            return f"{self._name_of(type(value))}.{value.name}"
        if isinstance(value, SYMBOLIC):
            return repr(number(value))
        if isinstance(value, torch.Tensor):
            return fill(value, value, None)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        if value is Ellipsis or isinstance(value, PRINTED_AS_IS):
            return "..." if value is Ellipsis else repr(value)
        called = "" if callable(value) else "()"
        return self._name_of(value) or f"unavailable({getattr(value, '__qualname__', repr(value))!r}){called}"

    def _name_of(self, value: Any) -> str | None:
        """The full name of a function or a class, and imports its module; None if it has none."""
        try:
            name = _get_qualified_name(value).replace("_operator.", "operator.")
            found = resolve_name(name if "." in name else f"builtins.{name}")
        except (AttributeError, ImportError, RuntimeError, ValueError):
            return None
        if found is not value:
            return None
        modules = {name.rpartition(".")[0]}
        packet = getattr(value, "_overloadpacket", value)
        if isinstance(packet, OpOverloadPacket) and (definition := OPDEFS.get(packet._qualified_op_name)):
            modules.add(definition._init_fn.__module__)
        self.imports |= {module for module in modules & sys.modules.keys() if not IMPORTED_BY_TORCH.match(module)}
        return name


class Verbatim:
    """An argument printed as the result of `text`, which is called when printing: nodes get their names then."""

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text()


class _CodeGen(CodeGen):
    """PyTorch's code generation, with each parameter and its comment on a line of its own."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        self.nodes = nodes

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        return "\n".join(["def forward(", "    self,", *(f"    {n.target},{_comment(n)}" for n in placeholders), "):"])

    def annotated(self, body: Sequence[str]) -> list[str]:
        """Puts a comment after each statement, in place of PyTorch's deletion of unused values.

        body: for each node "# COUNTER: <its index>", its statement, and a newline, possibly after ";  x = None".
        """
        lines, node = [], None
        for text in body:
            if text.startswith("# COUNTER: "):
                node = self.nodes[int(text.removeprefix("# COUNTER: "))]
            elif node is not None and re.fullmatch(r"(;  .* = None)?\n", text):
                text = ("" if node.op == "output" else _comment(node)) + "\n"
            lines.append(text)
        return lines


def _subscript(index: Any) -> str:
    """`:, 1` instead of `(slice(None, None, None), 1)`."""
    if isinstance(index, slice):
        start, stop, step = ("" if i is None else repr(i) for i in (index.start, index.stop, index.step))
        return f"{start}:{stop}" + (f":{step}" if step else "")
    if isinstance(index, tuple) and len(index) > 1 and not any(isinstance(i, tuple) for i in index):
        return ", ".join(_subscript(i) for i in index)
    return repr(index)


def _parameter_name(name: str) -> str:
    """A placeholder's name without what Dynamo adds to a parameter's path."""
    name = re.sub(r"^l_.*?_(?=(?:modules|parameters|buffers)_)", "_", name)
    return re.sub(r"_(?:modules|parameters|buffers)_", "_", name).strip("_")


def _comment(node: Node) -> str:
    """A comment with a node's value, its path in the model, and what is planned for it."""
    site = node.meta.get("te_site")
    path = site.path if isinstance(site, Site) else "" if node.op == "placeholder" else module_path(node)
    text = " | ".join(note for note in [_described(example(node)), path, *_planned(node)] if note)
    return f"  # {text}" if text else ""


def _described(value: Any) -> str:
    """A fake value in short: `bf16[2, s77, 64]`."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_abbrs.get(value.dtype, value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described, value))})"
    return str(value) if isinstance(value, (int, *SYMBOLIC)) else ""


def _planned(node: Node) -> list[str]:
    """The notes of the later stages on a node."""
    plan, layout, slots = (node.meta.get(f"te_{key}") for key in ("plan", "layout", "slots"))
    recipe = getattr(plan, "recipe", None)
    precision = f"{recipe.name} scaling" if recipe else "high precision"
    notes = [plan and f"{getattr(plan, 'provider', plan)}, {precision}", layout and f"layout {getattr(layout, 'name', layout)}", slots]
    return [str(note) for note in notes if note is not None]
