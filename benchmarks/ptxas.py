"""Compiles every Triton kernel of te_dynamo with ptxas: `python -m benchmarks --only ptxas`; `python -m benchmarks.ptxas 9.0` prints JSON.

Each is launched with "meta" tensors, in its most different variants.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import te_dynamo.lowering.kernels
from te_dynamo.lab.ptxas import resources_of
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.kernels import (
    activation,
    cast_both,
    cast_matrices,
    cast_rotated,
    cast_transpose,
    qkv,
    qkv_gradient,
    roll,
    transpose,
    transpose_rows,
)

CAPABILITIES = ((9, 0), (10, 0))
E4M3, E5M2, BF16, F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
FOLDER = Path(te_dynamo.lowering.kernels.__path__[0])
Launches = dict[str, Callable[[], None]]


def kernels() -> set[str]:
    """The names of all kernels that are launched: the package's Triton functions whose names end in `_kernel`."""
    found = set()
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found |= {node.name} if node.name.endswith("_kernel") else set()
    return found


def tensor(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches() -> Launches:
    """All launches, by name."""
    return {**_casts(), **_matrices(), **_transposes(), **_rolls(), **_qkv(), **_both_ways(), **_refresh(), **_rotations()}


def _casts() -> Launches:
    def cast(dtype: torch.dtype, out: torch.dtype, interleave: int, plain: bool) -> Callable[[], None]:
        def launch() -> None:
            parts = [tensor(4096, 4096, dtype=dtype), tensor(4096, 4096, dtype=dtype)]
            cast_transpose.launch(parts, tensor(dtype=F32), *cast_transpose._empty(parts, out, plain, True), interleave)

        return launch

    forms = [(BF16, E4M3, 0, True), (BF16, E5M2, 0, True), (BF16, E4M3, 128, False), (F32, E4M3, 128, True)]
    return {f"cast_transpose {d} {o} {i} {p}": cast(d, o, i, p) for d, o, i, p in forms}


def _matrices() -> Launches:
    def cast(dtype: torch.dtype, by_row: bool, plain: bool, across: bool, strided: bool) -> Callable[[], None]:
        def launch() -> None:
            x = tensor(8, 4096, 1024, dtype=dtype).transpose(1, 2) if strided else tensor(8, 1024, 4096, dtype=dtype)
            scale = None if by_row else tensor(dtype=F32)
            cast_matrices.launch(x, scale, True, *cast_matrices._empty(x, scale, E4M3, plain, across))

        return launch

    forms = [
        (BF16, True, True, True, False),
        (BF16, False, True, True, True),
        (BF16, True, True, False, True),
        (F32, True, True, True, False),
        (BF16, True, False, True, False),
        (BF16, False, False, True, False),
    ]
    return {f"cast_matrices {d} {r} {p} {a} {s}": cast(d, r, p, a, s) for d, r, p, a, s in forms}


def _transposes() -> Launches:
    def rows(multiply: bool) -> Callable[[], None]:
        factor = tensor(4096, dtype=F32) if multiply else None
        return lambda: void(transpose_rows.launch(tensor(4096, 4096, dtype=E4M3), tensor(4096, dtype=torch.int32), factor))

    return {
        "transpose": lambda: void(transpose.launch(tensor(4096, 14336, dtype=E4M3))),
        "transpose_rows": rows(False),
        "transpose_rows, multiplied": rows(True),
    }


def void(_: object) -> None: ...


def _rolls() -> Launches:
    def update(longest: int) -> Callable[[], None]:
        def launch() -> None:
            n = 200
            flags = [tensor(2, n, dtype=F32) for _ in range(2)]
            history, cursor = tensor(2, n, longest, dtype=F32), tensor(2, n, dtype=torch.int64)
            others = [tensor(2, n, dtype=F32), tensor(2, n, dtype=F32), tensor(2, n, dtype=torch.int64), tensor(2, n, dtype=torch.bool)]
            roll.launch(flags[0], flags[1], history, cursor, *others)

        return launch

    return {f"roll, history of {longest}": update(longest) for longest in (1, 16, 1024)}


def _qkv() -> Launches:
    from te_dynamo.ir.qkv import views
    from te_dynamo.lowering.call import Call, spec_of

    def write(rotary: str, normalized: str, packing: str, head: int, dtype: torch.dtype) -> Callable[[], None]:
        def launch() -> None:
            whole = tensor(1, 4096, (32 + 16) * head, dtype=dtype).unflatten(-1, (-1, head)).transpose(1, 2)
            q, k, v = whole.split([32, 8, 8], 1)
            tables = [tensor(1, 1, 4096, head, dtype=dtype) if rotary else None] * 2
            weights = [tensor(head, dtype=dtype) if normalized else None] * 2
            inputs = [q, k, v if packing else None, *tables, *weights, None, None]
            attributes = {
                "form": "bshd",
                "packing": packing,
                "out_dtype": dtype,
                "rotary": rotary,
                "width": head if rotary else 0,
                "normalized": normalized,
                "eps": 1e-6,
                "zero_centered": False,
                "round_before_weight": dtype if normalized else None,
                "norm_last": False,
            }
            call = Call("qkv", "native", "cuda", spec_of(tuple(inputs)), attributes=attributes)
            qkv.launch(call, inputs, views(qkv._empty(call, inputs), "bshd", packing))

        return launch

    forms = [
        ("halves", "", "2hd", 128, BF16),
        ("halves", "rms", "2hd", 128, BF16),
        ("interleaved", "", "", 64, BF16),
        ("halves", "rms", "2hd", 256, BF16),
        ("halves", "layer", "2hd", 128, F32),
        ("", "rms", "", 128, F32),
    ]
    return {"qkv " + " ".join(map(str, form)): write(*form) for form in forms}


def _rotations() -> Launches:
    def cast(width: int, centered: bool, dtype: torch.dtype) -> Callable[[], None]:
        def launch() -> None:
            x = tensor(2, 4096, 8, width, dtype=dtype)
            center = tensor(2, 1, 8, width, dtype=dtype) if centered else None
            cast_rotated.launch(x, center, tensor(dtype=F32), *cast_rotated._empty(x, E4M3))

        return launch

    forms = [(128, False, BF16), (128, True, BF16), (64, True, BF16), (96, False, torch.float16)]
    return {f"cast_rotated {w} {c} {d}": cast(w, c, d) for w, c, d in forms}


def _both_ways() -> Launches:
    """The kernels that write FP8 plain and transposed; those of gradients also with the sums for a bias."""

    def act(spelling: str, gated: bool, kept: bool) -> tuple[Call, list[Tensor | None], list[Tensor]]:
        attributes = {"spelling": spelling, "out_dtype": BF16, "alpha": 1.702, "limit": 7.0}
        x, *up = tensor(4096, 28672).split(14336, 1)
        call = Call("activation", "native", "cuda", (BF16, BF16 if gated else None), attributes=attributes)
        parts = 1 + gated
        keeping = [tensor(parts, 4096, 14336, dtype=E4M3), tensor(parts, 4096, 14336 // 64, dtype=F32)]
        return (call, [], keeping) if kept else (call, [x, up[0] if gated else None], [])

    def forward(spelling: str, gated: bool, keep: bool) -> Callable[[], None]:
        call, *read = act(spelling, gated, False)
        both, keeping = activation._empty(*read, E4M3, 16, True, True, keep)
        return lambda: activation.launch(call, *read, tensor(dtype=F32), both, keeping, False)

    def backward(spelling: str, gated: bool, sums: bool, kept: bool) -> Callable[[], None]:
        (call, *read), grad = act(spelling, gated, kept), tensor(4096, 14336)
        both = activation._empty_gradient(grad, 1 + gated, E5M2, 16, True, True, sums)
        return lambda: activation.launch_gradient(call, grad, *read, tensor(dtype=F32), both, False, [0, 14336][: 1 + gated])

    def rotary(kind: str, normalized: str, head: int, sums: bool) -> Callable[[], None]:
        grads = [tensor(1, 4096, heads, head).transpose(1, 2) for heads in (32, 8, 8)]
        tables = [tensor(1, 1, 4096, head) for _ in range(2)] if kind else [None, None]
        vectors = {"": 0, "rms": 2, "layer": 4}[normalized]
        read = [*(grads[:2] if normalized else [None] * 2), None, *tables, *[tensor(head)] * vectors, *[None] * (4 - vectors)]
        attributes = {"rotary": kind, "width": head if kind else 0, "normalized": normalized, "eps": 1e-6, "zero_centered": False}
        call = Call("qkv", "native", "cuda", (), attributes=attributes)
        made = qkv_gradient._empty(grads, read, E5M2, 16, True, True, sums)
        return lambda: qkv_gradient.launch(call, grads, read, tensor(dtype=F32), *made, False, [0, 32 * head, 40 * head])

    def cast(sums: bool) -> Callable[[], None]:
        x = tensor(4096, 4096)
        return lambda: cast_both.launch(x, tensor(dtype=F32), cast_both._empty(x, E5M2, 16, True, sums), False)

    kinds = [
        ("silu", True),
        ("gelu", True),
        ("gelu", False),
        ("gelu_tanh", False),
        ("mish", True),
        ("relu_squared", False),
        ("clamped_swiglu", True),
    ]
    ways = [(spelling, gated, kept) for spelling, gated in kinds for kept in (False, True)]
    made: Launches = {f"activation {s} {g} {kept}": forward(s, g, kept) for s, g, kept in ways}
    made |= {f"activation_gradient {s} {g} {sums} {kept}": backward(s, g, sums, kept) for s, g, kept in ways for sums in (False, True)}
    turned = [(kind, "", 128) for kind in ("", "halves", "interleaved")]
    turned += [("halves", "rms", 128), ("halves", "rms", 256), ("interleaved", "layer", 64), ("halves", "layer", 256)]
    made |= {f"qkv_gradient {' '.join(map(str, way))} {sums}": rotary(*way, sums) for way in turned for sums in (False, True)}
    return made | {f"cast_both {sums}": cast(sums) for sums in (False, True)}


def _refresh() -> Launches:
    def tables() -> list[Tensor]:
        """The tables of 8 GEMMs of one weight each: parts, offsets, amaxes, changed."""
        parts, offsets = tensor(8, 16, dtype=torch.int64), tensor(8, 512, dtype=torch.int64)
        return [parts, offsets, tensor(8, 8, dtype=F32), tensor(8, dtype=torch.int32)]

    def look(record: bool) -> Callable[[], None]:
        def launch() -> None:
            from te_dynamo.lowering.kernels.refresh_triton import look_kernel

            look_kernel[(8,)](tensor(8, 16, dtype=torch.int64), *tables(), RECORD=record, num_warps=4)

        return launch

    def write() -> None:
        from te_dynamo.lowering.kernels.refresh_triton import write_kernel

        write_kernel[(8,)](tensor(8, 16, dtype=torch.int64), tensor(8, 2, dtype=F32), *tables(), 8, COUNT=8, num_warps=8)

    return {"look": look(False), "look, recording": look(True), "write": write}


def main(arguments: Sequence[str]) -> None:
    """Prints one JSON object: for each given capability, the resources of each launch."""
    found = {}
    for text in arguments:
        major, minor = map(int, text.split("."))
        resources = resources_of(launches(), (major, minor))
        found[text] = {name: [asdict(r) for r in rows] for name, rows in resources.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
