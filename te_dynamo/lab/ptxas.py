"""What ptxas reports for handwritten Triton kernels, for a GPU that is not present: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from te_dynamo.lowering.devices import Capability


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel as launched: registers per thread, spilled bytes per thread, bytes of shared memory per block, warps
    per block."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    warps: int


def unavailable() -> str | None:
    """Why kernels cannot be compiled here, as a clause."""
    try:
        import triton.backends.nvidia as nvidia
    except ImportError:
        return "triton, which brings ptxas, is not installed"
    tools = Path(nvidia.__path__[0]) / "bin"
    missing = [name for name in ("ptxas", "cuobjdump") if not (tools / name).exists()]
    return f"triton is installed without {' and '.join(missing)}" if missing else None


@contextmanager
def compiling(capability: Capability) -> Iterator[list[Resources]]:
    """While open, each launch of a Triton kernel only compiles it for a GPU of this capability, and adds to the list.

    Tensors may be fake or on "meta". Only for a separate process, which has no driver afterwards.
    """
    import triton
    from triton.runtime.jit import JITFunction, MockTensor

    from te_dynamo.lab.pretend import driver

    found: list[Resources] = []
    run = JITFunction.run

    def compiled(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        mocked = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, Tensor) else a for a in args]
        made = run(function, *mocked, grid=grid, warmup=True, **kwargs)
        found.append(_resources(function.fn.__name__, made))

    triton.runtime.driver.set_active(driver(capability, device=10 * capability[0] + capability[1]))
    JITFunction.run = compiled
    try:
        yield found
    finally:
        JITFunction.run = run


def _resources(name: str, made: Any) -> Resources:
    used = usage(made.asm["cubin"])
    return Resources(name, used["REG"], used["STACK"] + used["LOCAL"], made.metadata.shared, made.metadata.num_warps)


def usage(cubin: bytes) -> dict[str, int]:
    """By cuobjdump's names: REG, STACK, LOCAL, SHARED."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(nvidia.__path__[0]) / "bin" / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def resources_of(launches: dict[str, Callable[[], None]], capability: Capability) -> dict[str, list[Resources]]:
    """The resources of the kernels of each launch, by the launch's name."""
    found = {}
    for name, launch in launches.items():
        with compiling(capability) as resources:
            launch()
        found[name] = resources
    return found
