"""What an operator that runs on the device reads, writes and multiplies.

An operator from outside of torch counts as a GEMM if it registers its FLOPs (`torch.utils.flop_counter.register_flop_formula`). What it
runs inside is not seen: an operator that runs three kernels counts as one. te_dynamo's own operators that run others are traced into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from te_dynamo.lab.launches import Launch, Recorder, math_of, nbytes, short, short_dtype, tensors_in
from te_dynamo.lowering import opaque

NO_KERNEL = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "device", "_local_scalar_dense"),
    *("detach", "alias", "reshape", "_unsafe_view", "lift_fresh", "is_same_size"),
}


def launches_kernel(func: Any) -> bool:
    name = func._schema.name.split("::")[1]
    is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
    return name not in NO_KERNEL and not is_view and func.namespace != "prim"


def inside(func: Any) -> Callable[..., Any] | None:
    """A function that runs an operator's own operators: for te_dynamo's opaque ones, and for products that autograd has not decomposed."""
    return func.decompose if func._schema.name in COMPOSITE else INSIDE.get(func._schema.name)


def describe(recorder: Recorder, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Launch:
    name = func._schema.name.split("::")[1]
    ins, outs = tensors_in((args, {k: v for k, v in kwargs.items() if k != "out"})), tensors_in(out)
    detail = f"{' '.join(map(short, ins[:2]))} -> {' '.join(map(short, outs[:1]))}"
    launch = Launch(recorder.phase, "operator", name, nbytes(ins) + nbytes(outs), detail=detail)
    if name in GEMMS:
        GEMMS[name](launch, ins, outs)
    elif "attention" in name and func.namespace == "aten":
        _attention(launch, name, dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs)
    elif func.overloadpacket in flop_registry and func.namespace != "aten":
        launch.kind, launch.flops = "gemm", int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
        launch.math = "fp8" if any(t.dtype.itemsize == 1 for t in (*ins, *outs)) else "bf16"
    else:
        launch.role = recorder.role(name, ins, outs)
    return launch


def _product(launch: Launch, a: Tensor, b: Tensor, out: Tensor) -> None:
    batch = a.shape[0] if a.dim() == 3 else 1
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    layout = "".join("T" if t.stride(-1) != 1 else "N" for t in (a, b))
    launch.kind, launch.flops, launch.math = "gemm", 2 * batch * m * n * k, math_of(a)
    launch.detail = f"m={m} n={n} k={k} {short_dtype(a)}.{short_dtype(b)}->{short_dtype(out)} {layout}"


def _grouped(launch: Launch, a: Tensor, b: Tensor) -> None:
    """[T, K] and [G, K, N], [M, T] and [T, N], [G, M, K] and [K, T], or [G, M, K] and [G, K, N]."""
    rows = a[0].numel() if a.dim() == 3 and b.dim() == 2 else a.numel()
    launch.kind, launch.flops, launch.math = "gemm", 2 * rows * b.shape[-1], math_of(a)
    launch.detail = f"grouped {launch.detail}"


def _attention(launch: Launch, name: str, bound: dict[str, Any]) -> None:
    """[B, H, S, D], or [T, H, D] of sequences up to `max_k` long, which is the length that counts: the others have no values here."""
    backward, q, k, causal = "backward" in name, bound["query"], bound["key"], bool(bound.get("is_causal"))
    keys = k.shape[2] if k.dim() == 4 else bound["max_k"]
    launch.kind, launch.math, launch.attention = "attention", "bf16", "flash" if name.startswith("_flash") else ""
    launch.flops = (10 if backward else 4) * q.numel() * keys // (2 if causal else 1)
    launch.detail += " causal" if causal else " not causal"


def _first_two(launch: Launch, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    _product(launch, ins[0], ins[1], outs[0])


def _after_bias(launch: Launch, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    _product(launch, ins[1], ins[2], outs[0])


def _in_groups(launch: Launch, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    _grouped(launch, ins[0], ins[1])


GEMMS: dict[str, Callable[[Launch, Sequence[Tensor], Sequence[Tensor]], None]] = {
    **dict.fromkeys(("mm", "bmm", "_scaled_mm", "_int_mm"), _first_two),
    **dict.fromkeys(("addmm", "baddbmm"), _after_bias),
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2"), _in_groups),
}
COMPOSITE = frozenset({"aten::matmul", "aten::linear"})
INSIDE: dict[str, Callable[..., Any]] = {
    "te_dynamo::site_fwd": partial(opaque.forward, fake=True),
    "te_dynamo::site_bwd": partial(opaque.backward, fake=True),
}
