"""What ptxas makes of hand-written Triton kernels, for a GPU that is not there: registers, spills, shared memory."""

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
    """Of one kernel as it was launched: registers a thread, bytes a thread of registers that did not fit (spills), bytes of shared memory
    a block, warps a block."""

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
    """While it is open, each launch of a Triton kernel compiles it for a GPU of this capability instead, and adds to the list.

    Tensors may be of shapes alone, fake or "meta". For a process of its own, which has no driver afterwards.
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
    """By the name of each launch, what the kernels are that it launches."""
    found = {}
    for name, launch in launches.items():
        with compiling(capability) as resources:
            launch()
        found[name] = resources
    return found
