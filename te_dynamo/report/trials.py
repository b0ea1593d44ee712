"""Runs kernels that are known to go wrong on some machines on small tensors, and compares each with its definition."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import E4M3, E5M2, FP8_MAX, amax, quantize
from te_dynamo.lowering.kernels.cast_transpose import cast_transpose
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te.library import first_line

Outputs = tuple[Tensor, ...]
Kernel = Callable[[Tensor, Tensor, torch.dtype], Outputs]  # of the values, their scale and the FP8 dtype

# Whether a kernel is miscompiled depends on its sizes: they decide block sizes, warps and vector widths.
SHAPES = ((96, 3072), (512, 1024), (2048, 2048))
MISCOMPILE = "Inductor: a transposed FP8 store beside a min or max (pytorch 188841, triton 11111)"
OWN = "te_dynamo's own cast and transpose (lowering/kernels/cast_transpose.py) against its definition"
TE = "Transformer Engine's cast and GEMM against their definitions"


@dataclass(frozen=True)
class Trial:
    what: str
    result: str  # "ok", "wrong", "failed" (it raised) or "not tried"
    detail: str  # what was compared, or the reason


def trials(device: torch.device) -> list[Trial]:
    """All trials, on one device."""
    return [
        _tried(MISCOMPILE, why_no_triton(device), lambda: _miscompile(device)),
        _tried(OWN, why_no_triton(device), lambda: _own_kernel(device)),
        _tried(TE, library.unavailable(device), lambda: _transformer_engine(device)),
    ]


def why_no_triton(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it is about kernels for CUDA devices, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _tried(what: str, why_not: str | None, run: Callable[[], tuple[str, str]]) -> Trial:
    if why_not is not None:
        return Trial(what, "not tried", why_not)
    try:
        return Trial(what, *run())
    except Exception as error:  # compilers and drivers raise all kinds
        return Trial(what, "failed", f"{type(error).__name__}: {first_line(error)}")


def _cast_transpose_amax(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Outputs:
    """An FP8 copy, its transpose and each row's amax, as a user would write them: one Inductor kernel."""
    return *_cast_transpose(x, scale, dtype)[:2], x.float().abs().amax(-1)


def _cast_transpose(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Outputs:
    """The same without the reduction, which makes Inductor generate another kind of kernel."""
    q = (x.float() * scale).clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)
    return q, q.t().contiguous(), scale


def _miscompile(device: torch.device) -> tuple[str, str]:
    wrong = ""
    for function in (_cast_transpose_amax, _cast_transpose):
        wrong = "; ".join(filter(None, (wrong, _wrong_values(torch.compile(function, dynamic=False), function, device))))
    if wrong:
        return "wrong", f"{wrong}. te_dynamo writes transposed copies by a kernel of its own, which avoids it"
    return "ok", f"bit for bit as in eager mode, for {len(SHAPES)} sizes, E4M3 and E5M2 (a kernel of another size may still be wrong)"


def _own_kernel(device: torch.device) -> tuple[str, str]:
    def kernel(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Outputs:
        plain, transposed, amaxes = cast_transpose([x], scale, dtype, 0, True, True)
        return plain, transposed, amaxes.amax()

    wrong = _wrong_values(kernel, _definition, device)
    return ("wrong", wrong) if wrong else ("ok", f"bit for bit, for {len(SHAPES)} sizes, E4M3 and E5M2")


def _transformer_engine(device: torch.device) -> tuple[str, str]:
    from te_dynamo.lowering import registry

    registry.load()  # the operators

    torch.manual_seed(0)
    x, w = (torch.randn(size, 128, device=device, dtype=torch.bfloat16) for size in (64, 96))
    scale, one = (torch.tensor(v, dtype=torch.float32, device=device) for v in (3.5, 1.0))
    ops = torch.ops.te_dynamo
    plain, transposed, peak = ops.te_quantize(x, scale, E4M3, True, True)
    if wrong := different((plain, transposed, peak.reshape(())), _definition(x, scale, E4M3)):
        return "wrong", f"te_quantize: {wrong} wrong values"
    x8, w8 = quantize(x, scale, E4M3), quantize(w, scale, E4M3)
    y = ops.te_gemm(x8, w8, one, one.clone(), None, torch.bfloat16, False)
    exact = x8.float() @ w8.float().t()
    error = ((y.float() - exact).norm() / exact.norm()).item()
    return ("ok" if error < 0.01 else "wrong"), f"te_quantize bit for bit; te_gemm's relative error is {error:.1e} (bfloat16)"


def _definition(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Outputs:
    expected = quantize(x, scale, dtype)
    return expected, expected.t().contiguous(), amax(x)


def _wrong_values(kernel: Kernel, definition: Kernel, device: torch.device) -> str:
    """How many values a kernel gets wrong, for each size and dtype; empty if none. Some inputs exceed the scaled range, and saturate."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype, name in ((E4M3, "E4M3"), (E5M2, "E5M2")):
        for shape in SHAPES:
            x = torch.randn(shape, generator=generator, dtype=torch.float32).to(device, torch.bfloat16)
            inputs = x, torch.tensor(FP8_MAX[dtype] / 3.0, dtype=torch.float32, device=device), dtype
            if wrong := different(kernel(*inputs), definition(*inputs)):
                found.append(f"{wrong} wrong values of {list(shape)} in {name}")
    return "; ".join(found)


def different(found: Outputs, expected: Outputs) -> int:
    """How many values are not bitwise equal."""
    return sum(int((_bits(a) != _bits(b)).sum()) for a, b in zip(found, expected, strict=True))


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t
