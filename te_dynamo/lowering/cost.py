"""Whether FP8 pays for a linear on a GPU: a roofline of its GEMMs against the quantization that FP8 adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from te_dynamo.ir.graph import tensor


@dataclass(frozen=True)
class Device:
    """What a GPU reaches: TFLOP/s in bf16 and FP8, GB/s of memory."""

    bf16_tflops: float
    fp8_tflops: float
    gbs: float


H100 = Device(bf16_tflops=989 * 0.75, fp8_tflops=1979 * 0.70, gbs=3350 * 0.85)
# Bytes that FP8 moves beyond what bf16 moves, for each element: read in bf16, written in FP8, and in training a transposed
# copy made again in backward. An activation is usually quantized by the kernel that makes it: only the writes are counted.
WEIGHT_BYTES = {True: 6, False: 0}  # in inference weights are quantized once
ACTIVATION_BYTES = {True: 3, False: 1}
GRADIENT_BYTES = {True: 3, False: 0}


def not_worth_it(node: Node, *, training: bool, device: Device = H100) -> str | None:
    """The reason why a linear would be slower in FP8, or None. On a CPU FP8 is for its numerics: nothing is refused."""
    x, weight = tensor(node.args[0]), tensor(node.args[1])
    if x is None or weight is None or x.device.type != "cuda":
        return None
    tokens = tokens_of(x)
    n, k = (int(s) for s in weight.shape)
    flops = 2 * tokens * n * k * (3 if training else 1)
    gained = flops / device.bf16_tflops / 1e6 - flops / device.fp8_tflops / 1e6
    moved = WEIGHT_BYTES[training] * n * k + ACTIVATION_BYTES[training] * tokens * k + GRADIENT_BYTES[training] * tokens * n
    lost = moved / device.gbs / 1e3
    if gained > lost:
        return None
    return (
        f"too small to pay on this GPU: its FP8 GEMMs save {gained:.1f} us, quantization costs {lost:.1f} us ({tokens} tokens, {k} x {n})"
    )


def tokens_of(x: torch.Tensor) -> int:
    """The rows of an activation [..., K]; a hint where they are symbolic, so that no guard is set."""
    tokens = 1
    for size in x.shape[:-1]:
        tokens *= size if isinstance(size, int) else int(size.node.hint or 1)
    return tokens


def flops_of_linear(x: torch.Tensor, weight: torch.Tensor) -> int:
    """FLOPs of the forward GEMM, at the sizes at hand (hints where they are symbolic)."""
    return 2 * tokens_of(x) * int(weight.shape[0]) * int(weight.shape[1])
