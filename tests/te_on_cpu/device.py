"""A pretended device for TE, on the CPU: a Hopper, or the one that a caller of `cuda_is_cpu` names."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

HOPPER = (9, 0)
CUDNN = 92400  # 9.24.0
CUBLAS_LT = 130400  # 13.4: the oldest with grouped GEMMs on a Hopper, in 16 bits
_pretended = [HOPPER]
_listeners: list[list[tuple[str, Any]]] = []
_engine_run_backward = torch.autograd._engine_run_backward
_make_wrapper_subclass = torch.Tensor._make_wrapper_subclass


def capability() -> tuple[int, int]:
    """The pretended compute capability."""
    return _pretended[-1]


def any_fp8_layout() -> bool:
    """Whether FP8 GEMMs with a scale per tensor take operands that are not K-innermost (C/transformer_engine.cpp:1191)."""
    return (10, 0) <= capability() < (12, 0) or capability() >= (13, 0)


def get_cudnn_version() -> int:
    return CUDNN


def get_cublasLt_version() -> int:
    return CUBLAS_LT


def get_num_cublas_streams() -> int:
    return 4


@contextlib.contextmanager
def heard() -> Iterator[list[tuple[str, Any]]]:
    """While open, collects arguments of stand-ins that do not affect results, in order: (name, value)."""
    _listeners.append([])
    try:
        yield _listeners[-1]
    finally:
        _listeners.pop()


def hear(what: str, value: Any) -> None:
    """Called by a stand-in to record an argument that changes nothing here."""
    for listener in _listeners:
        listener.append((what, value))


class _DeviceArguments(TorchFunctionMode):
    """TE passes "cuda", or an index, as its device in many places: these arguments become "cpu"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # questions about a device's name keep their answers
            return func(*args, **(kwargs or {}))
        kwargs = {key: _on_cpu(value) for key, value in (kwargs or {}).items()}
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = "cpu"
        return func(*map(_on_cpu, args), **kwargs)


def _on_cpu(value: Any) -> Any:
    return type(value)("cpu") if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


def _wrapper_on_cpu(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    return _make_wrapper_subclass(cls, *args, device=torch.device("cpu"), **kwargs)


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    """A mode does not see functions called inside of one that it handles, such as `backward`: so it is opened again there."""
    with _DeviceArguments():
        return _engine_run_backward(*args, **kwargs)


def _properties(*_: Any, **__: Any) -> SimpleNamespace:
    major, minor = capability()
    return SimpleNamespace(
        major=major, minor=minor, multi_processor_count=132, total_memory=80 << 30, name=f"sm_{major}{minor} that is stood in for"
    )


_STAND_INS: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "device": lambda *_: contextlib.nullcontext(),
        "get_device_properties": _properties,
        "get_device_capability": lambda *_, **__: capability(),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: call(),
        "default_generators": (torch.default_generator,),
    },
    torch.cuda.nvtx: {"range_push": lambda *_: None, "range_pop": lambda *_: None},
    torch.autograd: {"_engine_run_backward": _run_backward},
    torch.version: {"cuda": "13.0"},
    torch.Tensor: {
        "is_cuda": property(lambda self: True),
        "is_cpu": property(lambda self: False),
        "cuda": lambda self, *_, **__: self,
        "_make_wrapper_subclass": staticmethod(_wrapper_on_cpu),
    },
}


@contextlib.contextmanager
def cuda_is_cpu(capability: tuple[int, int] | None = None) -> Iterator[None]:
    """While open, torch claims to have a device of that compute capability, and tensors that are moved there stay on the CPU.

    None: the capability that is already pretended, by default a Hopper's. Dynamo and Inductor do not work inside.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended(_pretended[-1] if capability is None else capability))
        for owner, names in _STAND_INS.items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_DeviceArguments())
        yield


@contextlib.contextmanager
def pretended(capability: tuple[int, int]) -> Iterator[None]:
    """While open, `cuda_is_cpu` pretends that compute capability; torch itself claims nothing, so this may be open around
    torch.compile."""
    _forget(_pretended[-1] != capability)
    _pretended.append(capability)
    try:
        yield
    finally:
        _pretended.pop()
        _forget(_pretended[-1] != capability)


def _forget(changed: bool) -> None:
    """Clears TE's caches of a device's capabilities."""
    if not changed:
        return
    for name in ("utils", "quantization", "cpp_extensions.gemm"):
        module = sys.modules.get(f"transformer_engine.pytorch.{name}")
        for value in vars(module).values() if module is not None else ():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    for name in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        if quantization is not None:
            setattr(quantization, name, None)
    attention = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention")
    if attention is not None:
        attention._attention_backends["backend_selection_requires_update"] = True
