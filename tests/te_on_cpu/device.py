"""A device for TE to believe in: compute capability 9.0, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CAPABILITY = (9, 0)
_PROPERTIES = SimpleNamespace(
    major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, total_memory=80 << 30, name="a Hopper that is stood in for"
)
_make_wrapper_subclass = torch.Tensor._make_wrapper_subclass


class _DeviceArguments(TorchFunctionMode):
    """TE names its device "cuda" in many places: those arguments become "cpu"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_on_cpu, args), **{key: _on_cpu(value) for key, value in (kwargs or {}).items()})


def _on_cpu(value: Any) -> Any:
    return type(value)("cpu") if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


def _wrapper_on_cpu(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    return _make_wrapper_subclass(cls, *args, device=torch.device("cpu"), **kwargs)


_STAND_INS: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "device": lambda *_: contextlib.nullcontext(),
        "get_device_properties": lambda *_, **__: _PROPERTIES,
        "get_device_capability": lambda *_, **__: CAPABILITY,
        "is_current_stream_capturing": lambda: False,
    },
    torch.cuda.nvtx: {"range_push": lambda *_: None, "range_pop": lambda *_: None},
    torch.version: {"cuda": "13.0"},
    torch.Tensor: {
        "is_cuda": property(lambda self: True),
        "cuda": lambda self, *_, **__: self,
        "_make_wrapper_subclass": staticmethod(_wrapper_on_cpu),
    },
}


@contextlib.contextmanager
def cuda_is_cpu() -> Iterator[None]:
    """While it is open, torch claims a Hopper, and what is put on it stays on the CPU. Dynamo and Inductor do not run inside."""
    with contextlib.ExitStack() as stack:
        for owner, names in _STAND_INS.items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_DeviceArguments())
        yield
