"""Makes this process believe that it has a GPU. It cannot be undone, so it needs a separate process (`isolated`) without CUDA tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from te_dynamo.lab.kernels import NotedKernel, note_jit
from te_dynamo.lowering.devices import ADA, BLACKWELL_RTX, GPU, HOPPER, Capability

aten = torch.ops.aten
_kept: list[Any] = []  # objects that must live as long as the process

# CUDA C++ programming guide, technical specifications by compute capability: threads and bytes of shared memory per multiprocessor, and
# the most shared memory that one block may use.
LIMITS: dict[Capability, tuple[int, int, int]] = {ADA: (1536, 102400, 101376), BLACKWELL_RTX: (1536, 102400, 101376)}
LIMITS_OF_DATA_CENTERS = (2048, 233472, 232448)


def unavailable() -> str | None:
    """Why this process cannot pretend, with the remedy, as a clause."""
    if sys.platform != "linux":
        return "estimates need Linux"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Inductor writes GPU kernels in Triton, which is not installed (pip install triton)"
    if torch.cuda.is_available():
        return "this process sees a real GPU (set CUDA_VISIBLE_DEVICES= before the first use of CUDA)"
    return None


def pretend(gpu: GPU) -> None:
    """Raises RuntimeError if this process cannot pretend."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"te_dynamo.estimate: {reason}")
    _install_shim()
    _answer_for_cuda(gpu)
    _answer_for_triton(gpu)
    _note_what_inductor_generates()
    _choose_attention(gpu)
    _configure()


def _install_shim() -> None:
    from torch._inductor.codecache import CppCodeCache

    CppCodeCache.load((Path(__file__).parent / "shim.cpp").read_text()).pretend_install()


def _properties(gpu: GPU) -> SimpleNamespace:
    """The fields of `torch.cuda.get_device_properties` that Inductor reads."""
    threads, shared, shared_of_block = LIMITS.get(gpu.capability, LIMITS_OF_DATA_CENTERS)
    return SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=gpu.memory * 10**9,
        shared_memory_per_multiprocessor=shared,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared_of_block,
        L2_cache_size=50 << 20,
        gcnArchName="",
        uuid="0",
        is_integrated=False,
    )


def _answer_for_cuda(gpu: GPU) -> None:
    import torch._dynamo.device_interface as device_interface
    import torch._subclasses.fake_tensor as fake_tensor

    fake_tensor.init_gpu_context = lambda device: None  # type: ignore[assignment]
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment,method-assign]
    torch.accelerator.is_available = lambda: False  # else Dynamo asks for the current stream
    memory = gpu.memory * 10**9
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": _properties(gpu),
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "is_bf16_supported": True,
        "synchronize": None,
        "set_device": None,
        "is_current_stream_capturing": False,
        "set_rng_state": None,
        "is_initialized": True,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "mem_get_info": (memory, memory),
        "memory_allocated": 0,
    }
    interface = device_interface.CudaInterface
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *args, _value=value, **kwargs: _value)
        if hasattr(interface, name.removeprefix("_")):
            setattr(interface, name.removeprefix("_"), staticmethod(getattr(torch.cuda, name)))
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    device_interface.get_cuda_stream = lambda index: 0
    interface.get_raw_stream = staticmethod(lambda index: 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.version.cuda = torch.version.cuda or "13.0"  # None in a CPU build


def _answer_for_triton(gpu: GPU) -> None:
    import torch._inductor.runtime.triton_helpers as triton_helpers
    import torch.utils._triton as questions
    import triton

    for question in vars(questions).values():  # whether Triton works: the process may have cached the answer
        if hasattr(question, "cache_clear"):
            question.cache_clear()
    triton.runtime.driver.set_active(driver(gpu.capability))
    triton_helpers.set_driver_to_gpu = lambda: None
    triton.runtime.jit.JITFunction.run = note_jit


def driver(capability: Capability, device: int = 0) -> Any:
    """A Triton driver for a GPU that is not present; Triton caches compiled kernels by `device`."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: device,
        get_current_stream=lambda index=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", device),
        is_active=lambda: True,
    )


def _note_what_inductor_generates() -> None:
    import torch._inductor.async_compile as async_compile
    import torch._inductor.compile_fx as compile_fx
    import torch._inductor.fx_passes.joint_graph as joint_graph

    guards: Any = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda")
    guards._reinterpret_tensor = lambda t, size, stride, offset=0: torch.as_strided(t, size, stride, t.storage_offset() + offset)
    async_compile.AsyncCompile.triton = lambda self, name, source, device_str="cuda": NotedKernel(name, source)  # type: ignore[assignment,method-assign]
    compile_fx.get_input_idxs_to_check = lambda inputs, static: []  # type: ignore[assignment]  # it would read data_ptr()
    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:  # constants of one value are folded with real tensors of one element
        with _OnCpu():
            return deduce(self, node)

    joint_graph.UniformValueConstantFolder._deduce_value = deduce_on_cpu  # type: ignore[method-assign]


def _choose_attention(gpu: GPU) -> None:
    """Replaces the composite operator, which asks the device for a kernel: cuDNN, Flash before Hopper, memory-efficient with a mask."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None:
            return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
        if gpu.capability >= HOPPER:
            return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, dropout_p, is_causal, False, scale=scale)[0]
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_mm.out", lambda *args, out, **kwargs: out, "Meta")  # missing in PyTorch
    for key in ("AutogradCUDA", "CUDA"):
        library.impl("scaled_dot_product_attention", attention, key)
    _kept.append(library)


def _configure() -> None:
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    inductor_config.force_disable_caches = True
    inductor_config.compile_threads = 1
    inductor_config.profile_bandwidth = True  # adds kernel_num_gb to each kernel's metadata
    inductor_config.force_shape_pad = True  # the alternative is a benchmark of padded GEMMs on the device
    functorch_config.enable_autograd_cache = False


class _OnCpu(TorchDispatchMode):
    """Creates CUDA tensors on the CPU instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def move(a: Any) -> Any:
            return torch.device("cpu") if isinstance(a, torch.device) and a.type == "cuda" else a

        return func(*map(move, args), **{k: move(v) for k, v in (kwargs or {}).items()})
