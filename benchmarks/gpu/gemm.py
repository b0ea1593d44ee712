"""GEMMs alone: bf16, and FP8 with one scale per tensor through torch's and Transformer Engine's calls to cuBLAS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.cases import needs_te
from benchmarks.gpu.model import LLAMA_3_8B, TINY
from benchmarks.gpu.timing import clock_of, interleaved
from te_dynamo.lowering.per_tensor import scaled_mm
from te_dynamo.lowering.te.linear import gemm as te_gemm

CUBES = (2048, 4096, 8192)
TOKENS = 4096  # for the layer's own weights
ROUNDS, CALLS = 5, 20
BF16, FP8_NATIVE, FP8_TE = "bf16 matmul", "torch._scaled_mm", "te_dynamo::te_gemm"


def shapes(tiny: bool) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) by name: cubes, and the layer's forward GEMMs."""
    size, tokens, cubes = (TINY, 32, (64,)) if tiny else (LLAMA_3_8B, TOKENS, CUBES)
    return {f"{n} cubed": (n, n, n) for n in cubes} | {f"layer's {name}": (tokens, n, k) for name, (n, k) in size.gemms.items()}


def contenders(m: int, n: int, k: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """a [M, K] @ b [N, K].T -> [M, N] bf16. FP8 in E4M3, with fast accumulation as in forward."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(rows, k, device=device, generator=generator).bfloat16() for rows in (m, n))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return {
        BF16: lambda: a @ b.t(),
        FP8_NATIVE: lambda: scaled_mm(a8, b8, one, one, torch.bfloat16, None, True),
        FP8_TE: lambda: te_gemm(a8, b8, one, one, torch.bfloat16, None, True),
    }


def sweep(device: torch.device, tiny: bool = False) -> list[dict[str, Any]]:
    """A row for each GEMM and contender: {"gemm", "m", "n", "k", "contender", "ms", "tflops"}, or "reason" in place of the last two."""
    clock, missing, rows = clock_of(device), {FP8_TE: needs_te(device)}, []
    for name, (m, n, k) in shapes(tiny).items():
        runs = contenders(m, n, k, device)
        able = {who: run for who, run in runs.items() if not missing.get(who)}
        measures = {who: lambda run=run: clock.samples(run, CALLS, cold=True, queued=True) for who, run in able.items()}
        found, failed = interleaved(measures, 1 if tiny else ROUNDS)
        for who in runs:
            row: dict[str, Any] = {"gemm": name, "m": m, "n": n, "k": k, "contender": who}
            if who in found:
                rows.append(row | {"ms": found[who], "tflops": 2 * m * n * k / found[who] / 1e9})
            else:
                rows.append(row | {"reason": failed.get(who) or missing[who]})
    return rows


def not_measured(reason: str) -> list[dict[str, Any]]:
    return [{"gemm": "all", "m": 0, "n": 0, "k": 0, "contender": "all", "reason": reason}]
