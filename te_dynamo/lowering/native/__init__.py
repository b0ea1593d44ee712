"""On a GPU, torch's own FP8 GEMM among kernels that Inductor generates; on a CPU, C++ in opaque operators (`lowering.cpu`)."""

from __future__ import annotations

import torch

from te_dynamo.lowering.devices import ADA, too_old
from te_dynamo.lowering.registry import provider


def unavailable(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"no FP8 provider for device {device.type}"
    return too_old(device, ADA, "FP8 GEMMs") if device.type == "cuda" else None


provider("native", unavailable)

from te_dynamo.lowering.native import activation, attention, grouped, linears, qkv, unpadded  # noqa: E402, F401  (register themselves)
