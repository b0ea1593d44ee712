"""What quantization costs beside the GEMMs: kernels that should do nothing but move memory, against what memory can do.

A rate counts what must be moved (the bf16 matrix is read once, each FP8 matrix written once), whatever a contender moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import te_dynamo.lowering.kernels.cast_transpose
import te_dynamo.lowering.te.linear  # noqa: F401  (registers its operators)
from benchmarks.gpu.cases import needs_te
from benchmarks.gpu.model import LLAMA_3_8B, TINY
from benchmarks.gpu.timing import clock_of, interleaved
from te_dynamo.lowering.fp8 import E4M3, quantize, row_amax

ROUNDS, CALLS = 5, 20
CAST, CAST_TRANSPOSE, NORM_CAST = "cast", "cast + transpose", "norm + cast"  # each with the amax
BYTES = {CAST: 3, CAST_TRANSPOSE: 4, NORM_CAST: 3}  # that must be moved for each element
OURS, TE, INDUCTOR = "Triton kernel", "te_dynamo::te_quantize", "Inductor"


def shapes(tiny: bool) -> list[tuple[int, int]]:
    """Rows and columns: the layer's activations, and a square that no cache holds."""
    size, tokens, square = (TINY, 32, 64) if tiny else (LLAMA_3_8B, 4096, 8192)
    return [(tokens, size.hidden), (tokens, size.ffn), (square, square)]


def generated(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(x, scale, E4M3), row_amax(x)


def generated_both(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = quantize(x, scale, E4M3)
    return q, q.t().contiguous(), row_amax(x)


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight)


def generated_norm(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return generated(normalized(x, weight), scale)


def contenders(rows: int, columns: int, device: torch.device) -> dict[tuple[str, str], Callable[[], Any]]:
    """(what, who) -> a run. A kernel that cannot fuse the norm reads what Inductor's norm wrote."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, columns, device=device, generator=generator).bfloat16()
    weight, scale = torch.ones(columns, device=device, dtype=torch.bfloat16), torch.full((), 64.0, device=device)
    ours, te = torch.ops.te_dynamo.cast_transpose, torch.ops.te_dynamo.te_quantize
    cast, both, norm, norm_cast = (torch.compile(f, dynamic=False) for f in (generated, generated_both, normalized, generated_norm))
    return {
        (CAST, OURS): lambda: ours([x], scale, E4M3, 0, True, False),
        (CAST, TE): lambda: te(x, scale, E4M3, True, False),
        (CAST, INDUCTOR): lambda: cast(x, scale),
        (CAST_TRANSPOSE, OURS): lambda: ours([x], scale, E4M3, 0, True, True),
        (CAST_TRANSPOSE, TE): lambda: te(x, scale, E4M3, True, True),
        (CAST_TRANSPOSE, INDUCTOR): lambda: both(x, scale),
        (NORM_CAST, OURS): lambda: ours([norm(x, weight)], scale, E4M3, 0, True, False),
        (NORM_CAST, TE): lambda: te(norm(x, weight), scale, E4M3, True, False),
        (NORM_CAST, INDUCTOR): lambda: norm_cast(x, weight, scale),
    }


def sweep(device: torch.device, tiny: bool = False) -> list[dict[str, Any]]:
    """A row for each: {"what", "rows", "columns", "contender", "ms", "gbs"} or, for the last two, "reason"."""
    clock, missing, table = clock_of(device), {TE: needs_te(device)}, []
    for rows, columns in shapes(tiny):
        torch._dynamo.reset()
        runs = contenders(rows, columns, device)
        measures = {
            str(key): lambda run=run: clock.samples(run, CALLS, cold=True, queued=True)
            for key, run in runs.items()
            if not missing.get(key[1])
        }
        found, failed = interleaved(measures, 1 if tiny else ROUNDS)
        for (what, who), key in ((k, str(k)) for k in runs):
            row: dict[str, Any] = {"what": what, "rows": rows, "columns": columns, "contender": who}
            if key in found:
                table.append(row | {"ms": found[key], "gbs": BYTES[what] * rows * columns / found[key] / 1e6})
            else:
                table.append(row | {"reason": failed.get(key) or missing[who]})
    return table


def not_measured(reason: str) -> list[dict[str, Any]]:
    return [{"what": "all", "rows": 0, "columns": 0, "contender": "all", "reason": reason}]
