"""Whether FP8 pays for a linear on a GPU: a roofline of its GEMMs against the quantization that FP8 adds."""

from __future__ import annotations

from torch import Tensor

from te_dynamo.ir.sizes import number, product
from te_dynamo.lowering.devices import Peak, peak_of

# The fraction of the datasheet's peak that kernels reach.
BF16_REACHED, FP8_REACHED, MEMORY_REACHED = 0.75, 0.70, 0.85
# Bytes that FP8 moves beyond what bf16 moves, for each element: read in bf16, written in FP8, and in training a transposed
# copy made again in backward. An activation is usually quantized by the kernel that makes it: only the writes are counted.
WEIGHT_BYTES = {True: 6, False: 0}  # in inference weights are quantized once
ACTIVATION_BYTES = {True: 3, False: 1}
GRADIENT_BYTES = {True: 3, False: 0}


def not_worth_it(
    x: Tensor, weight: Tensor, *, training: bool, device: Peak | None = None, products: int = 3, weight_bytes: int | None = None
) -> str | None:
    """The reason why `x [..., K] @ weight [N, K].T` would be slower in FP8, or None; weight may be [E, N, K], a matrix for each group of
    rows. On a CPU nothing is refused: there FP8 is for its numerics.

    device: None is the tensors' own. products: how many of a training step's three GEMMs are in FP8; weight_bytes: what training moves
    for each element of the weight.
    """
    if x.device.type != "cuda":
        return None
    device = device or peak_of(x.device)
    tokens, (n, k), groups = product(x.shape[:-1]), map(number, weight.shape[-2:]), product(weight.shape[:-2])
    flops = flops_of_gemm(x, weight) * (products if training else 1)
    gained = flops / (device.bf16_tflops * BF16_REACHED) / 1e6 - flops / (device.fp8_tflops * FP8_REACHED) / 1e6
    for_weight = weight_bytes if weight_bytes is not None and training else WEIGHT_BYTES[training]
    moved = for_weight * groups * n * k + ACTIVATION_BYTES[training] * tokens * k + GRADIENT_BYTES[training] * tokens * n
    lost = moved / (device.gbs * MEMORY_REACHED) / 1e3
    if gained > lost:
        return None
    sizes = f"{tokens} tokens, {f'{groups} of ' if groups > 1 else ''}{k} x {n}"
    return f"too small to pay on this GPU: its FP8 GEMMs save {gained:.1f} us, quantization costs {lost:.1f} us ({sizes})"


def flops_of_gemm(x: Tensor, weight: Tensor) -> int:
    """FLOPs of the forward GEMM, at the sizes at hand (hints where they are symbolic)."""
    return 2 * product(x.shape[:-1]) * product(weight.shape[-2:])
