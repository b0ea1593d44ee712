"""NVIDIA GPUs: the compute capabilities that gate FP8, and peak throughput by datasheet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

Capability = tuple[int, int]
AMPERE: Capability = (8, 0)
ADA: Capability = (8, 9)  # the first with FP8 GEMMs
HOPPER: Capability = (9, 0)
BLACKWELL: Capability = (10, 0)
BLACKWELL_RTX: Capability = (12, 0)  # RTX 50, RTX PRO: no MXFP8 in Transformer Engine, FP8 GEMMs only in TN layout


def dotted(version: tuple[int, ...]) -> str:
    """
    >>> dotted((9, 0))
    '9.0'
    """
    return ".".join(map(str, version))


def too_old(device: torch.device, least: Capability, what: str) -> str | None:
    """Why a CUDA device cannot compute `what` (a plural noun), as a clause; None if it can."""
    found = torch.cuda.get_device_capability(device)
    return None if found >= least else f"{what} need compute capability {dotted(least)} or newer, this device has {dotted(found)}"


@dataclass(frozen=True)
class Peak:
    """Datasheet peaks: dense TFLOP/s with float32 accumulation, memory bandwidth in GB/s, and the source."""

    fp8_tflops: float
    bf16_tflops: float
    gbs: float
    source: str


@dataclass(frozen=True)
class GPU:
    """A GPU as `torch.cuda` describes it.

    short: its name on a command line; name: by `torch.cuda.get_device_name()`; memory: in GB, by datasheet; source: of the
    multiprocessors and the memory.
    """

    short: str
    name: str
    capability: Capability
    multiprocessors: int
    memory: int
    source: str
    peak: Peak


# Datasheets quote FP8 with sparsity: twice the dense figure given here. A MIG slice has another name, hence no peak.
_HOPPER = "NVIDIA H100 Tensor Core GPU architecture whitepaper, table 4"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_RTX6000 = "NVIDIA RTX 6000 Ada datasheet"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"
_XLA = "XLA's target_config/specs, as the driver reports them"
_SXM, _PCIE, _NVL = (f"NVIDIA H100 datasheet{form}" for form in (", SXM", " (2022), PCIe", ", NVL"))
_H200, _H200_NVL = "NVIDIA H200 datasheet, SXM", "NVIDIA H200 datasheet, NVL"
GPUS = (
    GPU("h100", "NVIDIA H100 80GB HBM3", HOPPER, 132, 80, _HOPPER, Peak(1979, 989.5, 3350, _SXM)),
    GPU("h100-pcie", "NVIDIA H100 PCIe", HOPPER, 114, 80, _HOPPER, Peak(1513, 756, 2000, _PCIE)),
    GPU("h100-nvl", "NVIDIA H100 NVL", HOPPER, 132, 94, "NVIDIA H100 NVL product brief", Peak(1670.5, 835.5, 3900, _NVL)),
    GPU("h200", "NVIDIA H200", HOPPER, 132, 141, _XLA, Peak(1979, 989.5, 4800, _H200)),
    GPU("h200-nvl", "NVIDIA H200 NVL", HOPPER, 132, 141, _H200_NVL, Peak(1670.5, 835.5, 4800, _H200_NVL)),
    GPU("b200", "NVIDIA B200", BLACKWELL, 148, 180, _XLA, Peak(4500, 2250, 8000, "NVIDIA DGX B200 datasheet, an eighth")),
    GPU("gb200", "NVIDIA GB200", BLACKWELL, 152, 186, _XLA, Peak(5000, 2500, 8000, "NVIDIA GB200 NVL72 datasheet, a 72nd")),
    GPU("l40s", "NVIDIA L40S", ADA, 142, 48, "NVIDIA L40S datasheet", Peak(733, 362, 864, "NVIDIA L40S datasheet")),
    GPU("l4", "NVIDIA L4", ADA, 58, 24, "NVIDIA L4 datasheet", Peak(242.5, 121, 300, "NVIDIA L4 datasheet")),
    GPU(
        "rtx6000-ada",
        "NVIDIA RTX 6000 Ada Generation",
        ADA,
        142,
        48,
        "NVIDIA RTX 6000 Ada datasheet",
        Peak(728.5, 364.2, 960, "NVIDIA RTX 6000 Ada datasheet"),
    ),
    GPU("rtx4090", "NVIDIA GeForce RTX 4090", ADA, 128, 24, _ADA, Peak(330.3, 165.2, 1008, _ADA)),
    GPU("rtx5090", "NVIDIA GeForce RTX 5090", BLACKWELL_RTX, 170, 32, _BLACKWELL, Peak(419, 209.5, 1792, _BLACKWELL)),
)
PEAKS = {gpu.name: gpu.peak for gpu in GPUS}
H100 = GPUS[0].peak


@cache
def peak_of(device: torch.device) -> Peak:
    """The peaks of a CUDA device; the H100's if the device is not in the table or not present: a plan may run elsewhere."""
    try:
        return PEAKS.get(torch.cuda.get_device_name(device), H100)
    except (AssertionError, RuntimeError):
        return H100


def gpu_named(short: str) -> GPU:
    """The GPU with this short name, in any case. Raises ValueError listing the known names."""
    found = next((gpu for gpu in GPUS if gpu.short == short.lower()), None)
    if found is None:
        raise ValueError(f"te_dynamo knows no device {short!r}; it knows {', '.join(gpu.short for gpu in GPUS)}")
    return found
