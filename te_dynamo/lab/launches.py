"""What a step launches, recorded while it runs on fake tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORWARD, BACKWARD = "forward", "backward"
SHORT = {"bfloat16": "bf16", "float32": "f32", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "float16": "f16"}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SMALL_PART = 64  # an output whose size times this is no larger than the largest input comes from a reduction


@dataclass
class Launch:
    """A kernel, a GEMM or an attention.

    phase: "forward" or "backward". kind: "triton", "gemm", "attention" or "operator". bytes: read and written, each tensor once.
    math: for GEMMs the dtype of the operands, "fp8", "bf16" (any two-byte dtype) or "f32"; for attention always "bf16".
    role: the purpose of other launches: "weight" (cast of a weight to FP8), "amax", "transpose" (of FP8), "cast" (to FP8) or "math".
    attention: what kind of kernel an attention is: "generated" by Inductor (`flex_attention`), "flash" (FlashAttention-2), or "" for any
    other.
    scattered_bytes: bytes of the 32-byte sectors touched by accesses that do not fill them. us: microseconds, by `roofline`.
    """

    phase: str
    kind: str
    name: str
    bytes: int
    flops: int = 0
    math: str = ""
    role: str = "math"
    attention: str = ""
    scattered_bytes: int = 0
    detail: str = ""
    us: float = 0.0


class Recorder(TorchDispatchMode):
    """While open, records every operator that launches a kernel; Triton launches are added by `kernels`."""

    current: ClassVar[Recorder | None] = None

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.kernels: dict[str, Any] = {}  # Inductor's Triton kernels by name
        self.phase = FORWARD
        self.weights = {t.untyped_storage()._cdata for t in weights if t.dim() > 1}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __enter__(self) -> Recorder:
        Recorder.current = self
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        Recorder.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from te_dynamo.lab.operators import describe, inside, launches_kernel

        kwargs, known = kwargs or {}, len(self.launches)
        body = inside(func)
        if body is None:
            out = func(*args, **kwargs)
        else:
            with self:
                out = body(*args, **kwargs)
            Recorder.current = self
            if any(launch.kind == "gemm" for launch in self.launches[known:]):
                return out
            del self.launches[known:]  # it has its own fake implementation, which shows no GEMM
        if launches_kernel(func):
            self.launches.append(describe(self, func, args, kwargs, out))
        return out

    def role(self, name: str, ins: Sequence[Tensor], outs: Sequence[Tensor], *, tiled: bool = False) -> str:
        """A heuristic for the role of a kernel other than a GEMM or attention, from its inputs and outputs. tiled: it has a 2D grid."""
        largest = max((t.numel() for t in ins), default=0)
        big = [t for t in outs if t.numel() * SMALL_PART > largest]
        if not big:
            return "amax" if "amax" in name else "math"
        if any(t.dtype not in FP8 for t in big):
            return "math"
        if any(t.untyped_storage()._cdata in self.weights for t in ins if t.numel() * SMALL_PART > largest):
            return "weight"
        return "transpose" if tiled or all(t.dtype in FP8 for t in ins if t.numel() * SMALL_PART > largest) else "cast"


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct memory of tensors; an expanded dimension counts once."""
    total, seen = 0, set()
    for t in tensors:
        key = (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), tuple(t.stride()))
        if key not in seen:
            seen.add(key)
            numel = 1
            for size, stride in zip(t.shape, t.stride(), strict=True):
                numel *= size if stride else 1
            total += numel * t.dtype.itemsize
    return total


def short(t: Tensor) -> str:
    """
    >>> short(torch.empty(2, 3, dtype=torch.bfloat16))
    'bf16[2x3]'
    """
    return f"{short_dtype(t)}[{'x'.join(map(str, t.shape))}]"


def short_dtype(t: Tensor) -> str:
    name = str(t.dtype).removeprefix("torch.")
    return SHORT.get(name, name)


def math_of(t: Tensor) -> str:
    return {1: "fp8", 2: "bf16"}.get(t.dtype.itemsize, "f32")
