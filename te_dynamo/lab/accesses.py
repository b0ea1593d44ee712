"""The memory accesses of a generated Triton kernel, from its source."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SECTOR = 32  # bytes, the smallest transfer
VARIABLE = re.compile(r"[xyz]\d+|r\d_\d+")
AXES = ("xindex", "yindex", "r0_index")


@dataclass(frozen=True)
class Access:
    """stored: the source of what is written; empty for a load."""

    pointer: str
    index: ast.expr
    stored: str


class Accesses:
    """The loads and stores of one generated kernel."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source[source.index("@triton.jit") :])
        self.all = [access for call in ast.walk(self.tree) if (access := _access(call)) is not None]

    def strides(self, index: ast.expr) -> dict[str, int] | None:
        """By how many elements an address moves for each step along each axis: the smaller of two samples, since the index of an element
        that a mask leaves out may wrap around. None if it depends on a loaded value."""
        definitions = {
            node.targets[0].id: compile(ast.Expression(node.value), "", "eval")
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and VARIABLE.fullmatch(node.targets[0].id)
        }
        code = compile(ast.Expression(index), "", "eval")

        def address(**at: int) -> int:
            env: dict[str, Any] = dict.fromkeys(AXES, 0) | at
            return eval(code, env | {name: eval(value, env) for name, value in definitions.items()})

        try:
            steps = {name: [address(**{name: at + 1}) - address(**{name: at}) for at in (0, 2)] for name in AXES}
            return {name: min(samples, key=abs) for name, samples in steps.items()}
        except Exception:  # an index that was loaded, which has no value here
            return None

    def scattered_bytes(self, sizes: Sequence[int], reduction: bool, signature: Mapping[str, str], configs: Sequence[Any]) -> int:
        """Bytes of the sectors touched by accesses that cannot fill them, in the best autotuning configuration.

        sizes: of the axes; reduction: whether the last of two is summed over; signature: Triton's type of each pointer.
        """
        axes = [("xindex", "XBLOCK")]
        if len(sizes) == 2:
            axes = [("xindex", "XBLOCK"), ("r0_index", "R0_BLOCK")] if reduction else [("yindex", "YBLOCK"), ("xindex", "XBLOCK")]
        if len(axes) != len(sizes):
            return 0
        totals = []
        for config in configs:
            touched: dict[str, float] = {}  # by pointer: neighboring accesses through one share their sectors in the cache
            for access in self.all:
                strides = self.strides(access.index)
                if strides is None or not any(strides[name] for name, _ in axes):
                    continue
                kind = signature.get(access.pointer, "*fp32")
                itemsize = 1 if "8" in kind else 2 if "16" in kind else 4
                elements, each = 1, float(SECTOR)  # elements visited, and the bytes of sectors for each
                for (name, block), size in zip(axes, sizes, strict=True):
                    if strides[name]:
                        elements *= size
                        each = min(each, max(abs(strides[name]) * itemsize, SECTOR / config.kwargs.get(block, size)))
                if each > itemsize:
                    touched[access.pointer] = max(touched.get(access.pointer, 0.0), elements * each)
            totals.append(int(sum(touched.values())))
        return min(totals, default=0)

    def copies(self) -> int:
        """The largest number of buffers to which the same values are stored."""
        stores = Counter((ast.unparse(a.index), a.stored) for a in self.all if a.stored and any((self.strides(a.index) or {}).values()))
        return max(stores.values(), default=1)


def _access(node: ast.AST) -> Access | None:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("tl.load", "tl.store") or not isinstance(node.args[0], ast.BinOp):
        return None
    stored = ast.unparse(node.args[1]) if ast.unparse(node.func) == "tl.store" else ""
    return Access(ast.unparse(node.args[0].left), node.args[0].right, stored)
