"""The time of a launch: the longer of its arithmetic and memory times, at the fraction of the datasheet's peaks that good kernels reach."""

from __future__ import annotations

from collections.abc import Iterable

from te_dynamo.lab.launches import FORWARD, Launch
from te_dynamo.lowering.cost import BF16_REACHED, FP8_REACHED, KERNEL_US, MEMORY_REACHED
from te_dynamo.lowering.devices import HOPPER, Capability, Peak

# Of the bf16 peak, in forward and backward, without what a mask hides: by kernels made for the GPU (cuDNN, FlashAttention-3; before
# Hopper FlashAttention-2), by FlashAttention-2 on an H100 (arXiv 2407.08608, figures 5 and 6), and by generated kernels, which PyTorch has
# measured at 0.9 and 0.85 of its speed.
ATTENTION_REACHED = {"": (0.55, 0.45), "flash": (0.33, 0.31), "generated": (0.30, 0.26)}
BEFORE_HOPPER = {"": (0.55, 0.45), "flash": (0.55, 0.45), "generated": (0.50, 0.38)}
L2_GBS = 5500.0  # H100's, for partially filled sectors
HOST_US = 4.0  # host time of each launch, if the step is not a CUDA graph
SMALL_US = 8.0


def microseconds(launch: Launch, peak: Peak, capability: Capability = HOPPER) -> float:
    tflops = peak.bf16_tflops * BF16_REACHED
    if launch.kind == "attention":
        reached = ATTENTION_REACHED if capability >= HOPPER else BEFORE_HOPPER
        tflops = peak.bf16_tflops * reached[launch.attention][launch.phase != FORWARD]
    elif launch.math == "fp8":
        tflops = peak.fp8_tflops * FP8_REACHED
    elif launch.math == "f32":
        tflops /= 2  # TF32
    memory = launch.bytes / (peak.gbs * MEMORY_REACHED) / 1e3
    return KERNEL_US + max(launch.flops / tflops / 1e6, memory, launch.scattered_bytes / L2_GBS / 1e3)


# A launch belongs to the first group that fits.
GROUPS = {
    "GEMMs": lambda launch: launch.kind == "gemm",
    "attention": lambda launch: launch.kind == "attention",
    "weights to FP8": lambda launch: launch.role == "weight",
    "transposed copies": lambda launch: launch.role == "transpose",
    "scales and other small kernels": lambda launch: launch.us < SMALL_US,
    "kernels that write FP8": lambda launch: launch.role in ("cast", "amax"),
    "norms, activations, sums": lambda launch: True,
}


def by_group(launches: Iterable[Launch]) -> dict[str, float]:
    """Microseconds by group, in the order of `GROUPS`."""
    found = dict.fromkeys(GROUPS, 0.0)
    for launch in launches:
        found[next(name for name, fits in GROUPS.items() if fits(launch))] += launch.us
    return found
