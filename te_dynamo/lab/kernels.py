"""Records Triton kernels instead of launching them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from te_dynamo.lab.accesses import Accesses
from te_dynamo.lab.flex import flops_of
from te_dynamo.lab.launches import Launch, Recorder, nbytes, short, tensors_in


class NotedKernel:
    """Replaces the `CachingAutotuner` that Inductor makes for a kernel that it generated."""

    def __init__(self, name: str, source: str) -> None:
        from torch._inductor.codecache import PyCodeCache

        self.name, self.source = name, source
        self.tuner = getattr(PyCodeCache.load(source), name)

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        recorder = Recorder.current
        if recorder is None:
            return
        named = [(name, t) for name, t in zip(self.tuner.fn.arg_names, args, strict=False) if isinstance(t, Tensor)]
        ins, outs = [t for name, t in named if not name.startswith("out_")], [t for name, t in named if "out_" in name]
        sizes = [a for a in args if isinstance(a, int)]
        told = self.tuner.inductor_meta.get("kernel_num_gb")
        partial_sums = nbytes(t for name, t in named if name.startswith("ws_"))  # of which Inductor's own count knows nothing
        moved = int(told * 1e9) + partial_sums if told else nbytes(t for _, t in named)
        reduction = self.name.startswith(("triton_red", "triton_per"))
        scattered = self.accesses.scattered_bytes(sizes, reduction, self.tuner.triton_meta["signature"], self.tuner.configs)
        copies, tiled = self.accesses.copies(), "ynumel" in self.tuner.fn.arg_names
        notes = [str(sizes), "tiled" * tiled, "scattered" * (scattered > 2 * moved), f"{copies} copies" * (copies > 1)]
        detail = " ".join([*filter(None, notes), *(f"{name.split('_ptr')[0]}:{short(t)}" for name, t in named)])
        role = "math" if self.tuner.custom_kernel else recorder.role(self.name, ins, outs, tiled=tiled)
        recorder.kernels[self.name] = self
        launch = Launch(recorder.phase, "triton", self.name, moved, role=role, scattered_bytes=scattered, detail=detail)
        if (flops := self.flops) is not None:
            launch.kind, launch.math, launch.flops, launch.attention, launch.role = "attention", "bf16", flops, "generated", "math"
        recorder.launches.append(launch)

    @cached_property
    def flops(self) -> int | None:
        return flops_of(self.name, self.source)

    @cached_property
    def accesses(self) -> Accesses:
        return Accesses(self.source)


def note_jit(function: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
    """Replaces `JITFunction.run`: for a handwritten kernel that is launched outside of Inductor's generated code."""
    recorder = Recorder.current
    if recorder is not None and not warmup:
        tensors = tensors_in((args, kwargs))
        detail = " ".join(map(short, tensors))
        recorder.launches.append(Launch(recorder.phase, "triton", function.fn.__name__, nbytes(tensors), detail=detail))
