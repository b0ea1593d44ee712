"""Which device this is, its peaks, and the versions of the software on it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from te_dynamo.lowering.devices import PEAKS, Peak


@dataclass(frozen=True)
class DeviceInfo:
    """The device of a run; peak is None if it is not known."""

    name: str
    capability: str
    memory_gib: float
    peak: Peak | None

    @property
    def slug(self) -> str:
        """The name as part of a file name.

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
    """The versions; None for what is not installed."""
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
