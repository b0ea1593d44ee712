"""Whether FP8 pays for a linear on a GPU: a roofline of its GEMMs against the quantization that FP8 adds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from te_dynamo.ir.sizes import number, product
from te_dynamo.lowering.devices import Peak, peak_of

# The fraction of the datasheet's peak that kernels reach, and a kernel's fixed time in us: its first and last blocks.
BF16_REACHED, FP8_REACHED, MEMORY_REACHED = 0.75, 0.70, 0.85
KERNEL_US = 1.5


@dataclass(frozen=True)
class Overhead:
    """What FP8 adds to a linear: bytes moved per element beyond what bf16 moves, and kernels, some of which the linears of one input
    share."""

    weight: int
    activation: int
    gradient: int
    kernels: int


# An activation is usually quantized by the kernel that computes it: only the writes count and, in training, the transposed copy made in
# backward. A weight is read in bf16 and written in FP8, with its transposed copy; in inference that is done once.
TRAINING = Overhead(weight=6, activation=3, gradient=3, kernels=2)
INFERENCE = Overhead(weight=0, activation=1, gradient=0, kernels=1)
# Each copy has its own scales: an amax along the other dimension is another pass.
ROWWISE_TRAINING = Overhead(weight=8, activation=6, gradient=6, kernels=10)


def not_worth_it(
    x: Tensor,
    weight: Tensor,
    *,
    training: bool,
    shares_input: bool = False,
    device: Peak | None = None,
    products: int = 3,
    overhead: Overhead | None = None,
) -> str | None:
    """Why `x [..., K] @ weight [N, K].T` would be slower in FP8, or None; weight may be [E, N, K], one matrix for each group of rows. On a
    CPU nothing is refused: there FP8 is used for its numerics.

    shares_input: whether x is in FP8 anyway, for another linear. device: None for the tensors' own. products: how many of a training step's
    three GEMMs are in FP8; overhead: in training.
    """
    if x.device.type != "cuda":
        return None
    device, adds = device or peak_of(x.device), (overhead or TRAINING) if training else INFERENCE
    tokens, (n, k), groups = product(x.shape[:-1]), map(number, weight.shape[-2:]), product(weight.shape[:-2])
    flops = flops_of_gemm(x, weight) * (products if training else 1)
    gained = flops / (device.bf16_tflops * BF16_REACHED) / 1e6 - flops / (device.fp8_tflops * FP8_REACHED) / 1e6
    moved = adds.weight * groups * n * k + (0 if shares_input else adds.activation * tokens * k) + adds.gradient * tokens * n
    lost = moved / (device.gbs * MEMORY_REACHED) / 1e3 + adds.kernels * KERNEL_US
    if gained > lost:
        return None
    sizes = f"{tokens} tokens, {f'{groups} of ' if groups > 1 else ''}{k} x {n}"
    return f"too small to pay on this GPU: its FP8 GEMMs save {gained:.1f} us, quantization costs {lost:.1f} us ({sizes})"


def flops_of_gemm(x: Tensor, weight: Tensor) -> int:
    """FLOPs of the forward GEMM, at the sizes at hand (hints where they are symbolic)."""
    return 2 * product(x.shape[:-1]) * product(weight.shape[-2:])
