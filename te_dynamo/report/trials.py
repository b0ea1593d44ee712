"""What can be wrong with the kernels of a machine, tried: each kernel beside its definition, on small tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import E4M3, E5M2, FP8_MAX, amax, quantize
from te_dynamo.lowering.kernels.cast_transpose import cast_transpose
from te_dynamo.lowering.te import library

# The corruption depends on sizes, since these decide on blocks, warps and vectors.
SHAPES = ((96, 3072), (512, 1024), (2048, 2048))
MISCOMPILE = "Inductor: a transposed FP8 store beside a min or max (pytorch 188841, triton 11111)"
OWN = "te_dynamo's own cast and transpose (lowering/kernels/cast_transpose.py) against its definition"
TE = "Transformer Engine's cast and GEMM against their definitions"


@dataclass(frozen=True)
class Trial:
    """result: "ok", "wrong", "failed" (it raised) or "not tried"; detail: the reason, or what was compared."""

    what: str
    result: str
    detail: str


def trials(device: torch.device) -> list[Trial]:
    """All of them, on one device."""
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
    except Exception as error:  # whatever a compiler or a driver may raise is what is to be told
        return Trial(what, "failed", f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")


# --- Inductor


def _both_ways(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """An FP8 copy, its transpose and the amaxes of the rows, spelled as one would: one kernel of Inductor's."""
    values = x.float()
    q = (values * scale).clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)
    return q, q.t().contiguous(), values.abs().amax(-1)


def _only_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same without the reduction: another kind of kernel."""
    q = (x.float() * scale).clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)
    return q, q.t().contiguous(), scale


def _miscompile(device: torch.device) -> tuple[str, str]:
    wrong = []
    for function in (_both_ways, _only_cast):
        compiled = torch.compile(function, dynamic=False)
        for x, scale, dtype in _inputs(device):
            found = different(compiled(x, scale, dtype), function(x, scale, dtype))
            if found:
                wrong.append(f"{found} wrong values of {list(x.shape)} in {_name(dtype)}")
    if wrong:
        return "wrong", "; ".join(wrong) + ". te_dynamo writes transposed copies by a kernel of its own, which avoids it"
    return "ok", f"bit for bit as in eager mode, for {len(SHAPES)} sizes, E4M3 and E5M2 (a kernel of another size may still be wrong)"


# --- te_dynamo's own kernel


def _own_kernel(device: torch.device) -> tuple[str, str]:
    wrong = []
    for x, scale, dtype in _inputs(device):
        plain, across, peaks = cast_transpose([x], scale, dtype, 0, True, True)
        expected = quantize(x, scale, dtype)
        found = different((plain, across, peaks.amax()), (expected, expected.t().contiguous(), amax(x)))
        if found:
            wrong.append(f"{found} wrong values of {list(x.shape)} in {_name(dtype)}")
    return ("wrong", "; ".join(wrong)) if wrong else ("ok", f"bit for bit, for {len(SHAPES)} sizes, E4M3 and E5M2")


# --- Transformer Engine


def _transformer_engine(device: torch.device) -> tuple[str, str]:
    from te_dynamo.lowering import providers  # noqa: F401  (registers the operators)

    torch.manual_seed(0)
    x, w = (torch.randn(size, 128, device=device, dtype=torch.bfloat16) for size in (64, 96))
    scale, one = torch.tensor(3.5, device=device), torch.ones((), device=device)
    ops = torch.ops.te_dynamo
    plain, across, peak = ops.te_quantize(x, scale, E4M3, True, True)
    expected = quantize(x, scale, E4M3)
    found = different((plain, across, peak.reshape(())), (expected, expected.t().contiguous(), amax(x)))
    if found:
        return "wrong", f"te_quantize: {found} wrong values"
    w8 = quantize(w, scale, E4M3)
    y = ops.te_gemm(expected, w8, one, one.clone(), None, torch.bfloat16, False)
    exact = expected.float() @ w8.float().t()
    error = ((y.float() - exact).norm() / exact.norm()).item()
    return ("ok" if error < 0.01 else "wrong"), f"te_quantize bit for bit; te_gemm's relative error is {error:.1e} (bfloat16)"


# --- what they share


def _inputs(device: torch.device) -> Iterator[tuple[Tensor, Tensor, torch.dtype]]:
    """Some values lie beyond the scale's range: they saturate."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (E4M3, E5M2):
        for shape in SHAPES:
            x = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
            yield x, torch.tensor(FP8_MAX[dtype] / 3.0, device=device), dtype


def different(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> int:
    """How many values differ in a bit."""
    return sum(int((_bits(a) != _bits(b)).sum()) for a, b in zip(found, expected, strict=True))


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def _name(dtype: torch.dtype) -> str:
    return {E4M3: "E4M3", E5M2: "E5M2"}[dtype]
