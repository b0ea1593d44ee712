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


# By `torch.cuda.get_device_name()`. Datasheets quote FP8 with sparsity: twice the dense figure given here. A MIG slice has
# another name, hence no peak.
PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak(1979, 989.5, 3350, "NVIDIA H100 datasheet, SXM"),
    "NVIDIA H100 PCIe": Peak(1513, 756, 2000, "NVIDIA H100 datasheet (2022), PCIe"),
    "NVIDIA H100 NVL": Peak(1670.5, 835.5, 3900, "NVIDIA H100 datasheet, NVL"),
    "NVIDIA H200": Peak(1979, 989.5, 4800, "NVIDIA H200 datasheet, SXM"),
    "NVIDIA H200 NVL": Peak(1670.5, 835.5, 4800, "NVIDIA H200 datasheet, NVL"),
    "NVIDIA B200": Peak(4500, 2250, 8000, "NVIDIA DGX B200 datasheet, an eighth"),
    "NVIDIA L40S": Peak(733, 362, 864, "NVIDIA L40S datasheet"),
    "NVIDIA L4": Peak(242.5, 121, 300, "NVIDIA L4 datasheet"),
    "NVIDIA RTX 6000 Ada Generation": Peak(728.5, 364.2, 960, "NVIDIA RTX 6000 Ada datasheet"),
    "NVIDIA GeForce RTX 4090": Peak(330.3, 165.2, 1008, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    "NVIDIA GeForce RTX 5090": Peak(419, 209.5, 1792, "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"),
}
H100 = PEAKS["NVIDIA H100 80GB HBM3"]


@cache
def peak_of(device: torch.device) -> Peak:
    """The peaks of a CUDA device; the H100's for one that is not in the table, or not there: what is planned may run elsewhere."""
    try:
        return PEAKS.get(torch.cuda.get_device_name(device), H100)
    except (AssertionError, RuntimeError):
        return H100
