"""The cost of quantization besides the GEMMs: kernels that should be bound by memory, against its peak bandwidth.

A rate counts the bytes that must be moved (each input read once, each result written once), however many a contender moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import te_dynamo.lowering.kernels.activation
import te_dynamo.lowering.kernels.cast_both
import te_dynamo.lowering.kernels.cast_matrices
import te_dynamo.lowering.kernels.cast_transpose
import te_dynamo.lowering.kernels.qkv
import te_dynamo.lowering.kernels.qkv_gradient
import te_dynamo.lowering.kernels.transpose
import te_dynamo.lowering.te.linear  # noqa: F401  (registers its operators)
from benchmarks.gpu.cases import needs_te
from benchmarks.gpu.model import LLAMA_3_8B, TINY, LayerSize
from benchmarks.gpu.timing import clock_of, interleaved
from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.fp8 import E4M3, E5M2, quantize, row_amax

ROUNDS, CALLS = 5, 20
TOKENS, TINY_TOKENS = 4096, 32
CAST, CAST_TRANSPOSE, NORM_CAST = "cast", "cast + transpose", "norm + cast"  # each with the amax
OURS, TE, INDUCTOR = "Triton kernel", "te_dynamo::te_quantize", "Inductor"
Contenders = dict[tuple[str, str], tuple[Callable[[], Any], int]]  # (what, who) -> a run, and the bytes that it must move
BF16, FP8 = 2, 1  # bytes


def shapes(tiny: bool) -> list[tuple[int, int]]:
    """Rows and columns: the layer's activations, and a square that does not fit into a cache."""
    size, tokens, square = (TINY, TINY_TOKENS, 64) if tiny else (LLAMA_3_8B, TOKENS, 8192)
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


def contenders(rows: int, columns: int, device: torch.device) -> Contenders:
    """The casts by each contender. A kernel that cannot fuse the norm reads the output of Inductor's norm."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, columns, device=device, generator=generator).bfloat16()
    weight, scale = torch.ones(columns, device=device, dtype=torch.bfloat16), torch.full((), 64.0, device=device)
    ours, te = torch.ops.te_dynamo.cast_transpose, torch.ops.te_dynamo.te_quantize
    cast, both, norm, norm_cast = (torch.compile(f, dynamic=False) for f in (generated, generated_both, normalized, generated_norm))
    once, twice = (BF16 + FP8) * x.numel(), (BF16 + 2 * FP8) * x.numel()
    return {
        (CAST, OURS): (lambda: ours([x], scale, E4M3, 0, True, False), once),
        (CAST, TE): (lambda: te(x, scale, E4M3, True, False), once),
        (CAST, INDUCTOR): (lambda: cast(x, scale), once),
        (CAST_TRANSPOSE, OURS): (lambda: ours([x], scale, E4M3, 0, True, True), twice),
        (CAST_TRANSPOSE, TE): (lambda: te(x, scale, E4M3, True, True), twice),
        (CAST_TRANSPOSE, INDUCTOR): (lambda: both(x, scale), twice),
        (NORM_CAST, OURS): (lambda: ours([norm(x, weight)], scale, E4M3, 0, True, False), once),
        (NORM_CAST, TE): (lambda: te(norm(x, weight), scale, E4M3, True, False), once),
        (NORM_CAST, INDUCTOR): (lambda: norm_cast(x, weight, scale), once),
    }


def fused(size: LayerSize, tokens: int, device: torch.device) -> Contenders:
    """The kernels that fuse a cast with other work, as one layer launches them; and the casts of two experts' weights."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    ops, scale, width, heads = torch.ops.te_dynamo, torch.full((), 4.0, device=device), size.ffn, (size.heads, size.kv_heads, size.kv_heads)
    gate, up = random(tokens, 2 * width).split(width, 1)
    grad, experts = random(tokens, width), random(2, width, size.hidden)
    swiglu = Call(
        "activation", "native", "cuda", spec_of((gate, up)), attributes={"spelling": "silu", "out_dtype": torch.bfloat16} | NO_LIMIT
    )
    kept = list(ops.activation(swiglu.key, [gate, up], [], scale, E4M3, True, 16, True, True, True)[3:])
    q, k, v = random(1, tokens, sum(heads) * size.head_size).unflatten(-1, (-1, size.head_size)).transpose(1, 2).split(heads, 1)
    angles = random(1, 1, tokens, size.head_size)
    tables = [angles.cos(), angles.sin()]
    attributes = {"form": "bshd", "packing": "h2d", "rotary": "halves", "width": size.head_size, "out_dtype": torch.bfloat16} | NO_NORM
    turn = Call("qkv", "native", "cuda", spec_of((q, k, v, angles, angles)), attributes=attributes)
    grads = [random(*t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)]
    starts = [0, size.heads * size.head_size, (size.heads + size.kv_heads) * size.head_size]
    values, features = grad.numel(), q.numel() + k.numel() + v.numel()
    gradient = (swiglu.key, grad)
    into = (scale, E5M2, True, 16, [0, width], True, True, False)
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "SwiGLU, both ways": (
            lambda: ops.activation(swiglu.key, [gate, up], [], scale, E4M3, True, 16, True, True, False),
            (2 * BF16 + 2 * FP8) * values,
        ),
        "SwiGLU, inputs kept in FP8": (
            lambda: ops.activation(swiglu.key, [gate, up], [], scale, E4M3, True, 16, True, False, True),
            (2 * BF16 + 3 * FP8) * values,
        ),
        "SwiGLU again, transposed": (
            lambda: ops.activation(swiglu.key, [], kept, scale, E4M3, True, 16, False, True, False),
            3 * FP8 * values,
        ),
        "SwiGLU's gradient, both ways": (lambda: ops.activation_gradient(*gradient, [gate, up], [], *into), (3 * BF16 + 4 * FP8) * values),
        "SwiGLU's gradient, of inputs in FP8": (lambda: ops.activation_gradient(*gradient, [], kept, *into), (BF16 + 6 * FP8) * values),
        "RoPE into bshd_bsh2d": (lambda: ops.qkv(turn.key, [q, k, v, *tables]), 2 * BF16 * features),
        "RoPE's gradient, both ways": (
            lambda: ops.qkv_gradient(turn.key, grads, [None] * 3 + tables + [None] * 4, scale, E5M2, True, 16, starts, True, True, False),
            (BF16 + 2 * FP8) * features,
        ),
        "cast of a gradient, both ways": (
            lambda: ops.cast_both(grad, scale, E5M2, True, 16, True, False),
            (BF16 + 2 * FP8) * values,
        ),
        "FP8 transpose": (lambda: ops.transpose(kept[0][0]), 2 * FP8 * values),
        "experts' weights by row, both ways": (
            lambda: ops.cast_matrices(experts, None, E4M3, False, True, True),
            (BF16 + 2 * FP8) * experts.numel(),
        ),
    }
    return {(what, OURS): run for what, run in runs.items()}


NO_LIMIT = {"alpha": 0.0, "limit": 0.0}
NO_NORM = {"normalized": "", "eps": 0.0, "zero_centered": False, "round_before_weight": None, "norm_last": False}


def sweep(device: torch.device, tiny: bool = False) -> list[dict[str, Any]]:
    """A row for each: {"what", "rows", "columns", "contender", "ms", "gbs"}, or "reason" in place of the last two."""
    size, tokens = (TINY, TINY_TOKENS) if tiny else (LLAMA_3_8B, TOKENS)
    table = []
    for rows, columns in shapes(tiny):
        torch._dynamo.reset()
        table += measured(contenders(rows, columns, device), rows, columns, device, tiny)
    return table + measured(fused(size, tokens, device), tokens, size.ffn, device, tiny)


def measured(runs: Contenders, rows: int, columns: int, device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    clock, missing = clock_of(device), {TE: needs_te(device)}
    measures = {
        str(key): lambda run=run: clock.samples(run, CALLS, cold=True, queued=True)
        for key, (run, _) in runs.items()
        if not missing.get(key[1])
    }
    found, failed = interleaved(measures, 1 if tiny else ROUNDS)
    table = []
    for (what, who), (_, moved) in runs.items():
        row: dict[str, Any] = {"what": what, "rows": rows, "columns": columns, "contender": who}
        key = str((what, who))
        if key in found:
            table.append(row | {"ms": found[key], "gbs": moved / found[key] / 1e6})
        else:
            table.append(row | {"reason": failed.get(key) or missing[who]})
    return table


def not_measured(reason: str) -> list[dict[str, Any]]:
    return [{"what": "all", "rows": 0, "columns": 0, "contender": "all", "reason": reason}]
