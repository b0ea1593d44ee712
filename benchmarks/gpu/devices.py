"""Which device this is, what it could reach at best, and which versions run on it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch


@dataclass(frozen=True)
class Peak:
    """What a device's maker says it reaches: dense TFLOP/s with float32 accumulation, GB/s of memory; and where he says it."""

    fp8_tflops: float
    bf16_tflops: float
    gbs: float
    source: str


# By `torch.cuda.get_device_name()`. Makers state FP8 with sparsity, which is twice the dense figure given here. A part of a
# device (MIG) has another name, and so no peak.
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


@dataclass(frozen=True)
class DeviceInfo:
    """The device of a run; peak is None where it is not known."""

    name: str
    capability: str
    memory_gib: float
    peak: Peak | None

    @property
    def slug(self) -> str:
        """The name as a file's.

        >>> DeviceInfo("NVIDIA H100 80GB HBM3", "9.0", 79.1, None).slug
        'nvidia-h100-80gb-hbm3'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def describe(device: torch.device) -> DeviceInfo:
    if device.type != "cuda":
        return DeviceInfo(device.type, "", 0.0, None)
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return DeviceInfo(properties.name, capability, properties.total_memory / 2**30, PEAKS.get(properties.name))


def versions(device: torch.device) -> dict[str, str | None]:
    """What runs; None for what is not installed."""
    from te_dynamo import __version__

    packages = {name: _version(name) for name in ("triton", "transformers", "transformer_engine", "torchao")}
    return {
        "te_dynamo": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
    } | packages


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
