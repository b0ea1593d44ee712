"""tex.quantize and related functions, for every quantizer with a stand-in: per tensor (delayed, current), blocks of 128, MXFP8."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu import block, mx, per_tensor
from tests.te_on_cpu.rounding import HIGH_PRECISION, amax_of

COPIES_WITH_SCALES = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")
ARGUMENTS = {"_data": "data", "_transpose": "data_transpose", "_scale_inv": "fp8_scale_inv"}  # of a per-tensor one's constructor


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` [..., K] quantized, into `output` if there is one, which then gets the copies that the quantizer requests.

    noop: a float32 [1]; if it is 1, nothing is written.
    """
    return _quantize(tensor.detach().float(), tensor.dtype, quantizer, output, noop)


def store(values: Tensor, dtype: torch.dtype, quantizer: Any, output: Any = None) -> Any:
    """The result of a kernel that computes float32 `values` and quantizes them; without a quantizer, `values` in `dtype`.

    A delayed quantizer's cast is part of the kernel, from float32. Others read a result rounded to `dtype`.
    """
    if quantizer is None:
        rounded = values.to(dtype)
        return rounded if output is None else output.copy_(rounded)
    return _quantize(values if is_delayed(quantizer) else values.to(dtype).float(), dtype, quantizer, output, None)


def is_delayed(quantizer: Any) -> bool:
    from transformer_engine.pytorch import Float8Quantizer

    return isinstance(quantizer, Float8Quantizer)


def _quantize(values: Tensor, dtype: torch.dtype, quantizer: Any, output: Any, noop: Tensor | None) -> Any:
    format = format_of_quantizer(quantizer)
    if output is None:
        output = create_empty_quantized_tensor(quantizer, values.shape, dtype, values.device, False)
    else:
        _make_copies(output, quantizer, values.shape)
    if noop is None or noop.item() != 1:
        format.fill(output, values, quantizer, dtype)
        if quantizer.optimize_for_gemm:
            mx.swizzle_scales_for_gemm_(output)
    return output


def create_empty_quantized_tensor(quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, pin_memory: bool) -> Any:
    """An uninitialized quantized tensor with the copies that the quantizer requests, from TE's own descriptions of it."""
    shape = tuple(shape)
    description = _describing(quantizer).storage_metadata(quantizer, dtype)
    buffers = {ARGUMENTS.get(name, name[1:]): buffer for name, buffer in _buffers(quantizer, shape).items()}
    for name in ("data",) if "fp8_scale_inv" in buffers else (copy[1:] for copy in COPIES_WITH_SCALES):
        buffers.setdefault(name, None)
    arguments = {**description["nontensor_kwargs"], **buffers}
    if not quantizer.internal:
        arguments |= {"shape": shape, "dtype": arguments.pop("fake_dtype")}
    return description["cls"](**arguments)


def _describing(quantizer: Any) -> type:
    """The quantizer class that describes the tensors: a delayed quantizer makes the same ones as a current one."""
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer

    return Float8CurrentScalingQuantizer if is_delayed(quantizer) else type(quantizer)


def _buffers(quantizer: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    if not shape and format_of_quantizer(quantizer) is per_tensor:  # TE's description of a transpose does not handle this shape
        return {name: torch.empty(shape, dtype=torch.uint8) for name in ("_data", "_transpose")} | {"_scale_inv": torch.empty(1)}
    specs = _describing(quantizer).inner_tensor_specs(quantizer, shape)
    return {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in specs.items()}


def _make_copies(output: Any, quantizer: Any, shape: Sequence[int]) -> None:
    """Drops the copies of `output` that the quantizer does not request, and adds missing ones."""
    wanted = _buffers(quantizer, tuple(shape))
    names = ("_data", "_transpose") if hasattr(output, "_data") else COPIES_WITH_SCALES
    for name in names:
        if name not in wanted:
            setattr(output, name, None)
        elif getattr(output, name) is None:
            setattr(output, name, wanted[name])
    if "_transpose" in names:
        output._transpose_invalid = output._transpose is None
    output._fp8_dtype = quantizer.dtype


def format_of_quantizer(quantizer: Any) -> ModuleType:
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer, Float8Quantizer, MXFP8Quantizer

    if isinstance(quantizer, (Float8Quantizer, Float8CurrentScalingQuantizer)):
        return per_tensor
    if isinstance(quantizer, Float8BlockQuantizer):
        return block
    if isinstance(quantizer, MXFP8Quantizer):
        return mx
    raise NotImplementedError(f"{type(quantizer).__name__} has no stand-in")


def format_of(t: Any) -> ModuleType | None:
    """The module for a quantized tensor, None for any other."""
    if hasattr(t, "_is_2D_scaled"):
        return block
    if hasattr(t, "_with_gemm_swizzled_scales") and hasattr(t, "_fp8_dtype"):
        return mx
    return per_tensor if hasattr(t, "_fp8_dtype") else None


def dequantize(input: Any, otype: Any) -> Tensor:
    """`input` [..., K] in the dtype `otype`."""
    format = format_of(input)
    if format is None:
        raise NotImplementedError(f"{type(input).__name__} has no stand-in")
    return format.dequantize(input).to(HIGH_PRECISION[int(otype)])


def multi_tensor_quantize(tensor_list: Sequence[Tensor], quantizer_list: Sequence[Any]) -> list[Any]:
    return [quantize(tensor, quantizer) for tensor, quantizer in zip(tensor_list, quantizer_list, strict=True)]


def split_quantize(
    tensor: Tensor, split_sections: Sequence[int], quantizer_list: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    """The parts of `tensor` along its first dimension, each quantized by its quantizer."""
    return multi_tensor_quantize(tensor.split(list(split_sections)), quantizer_list)


def bgrad_quantize(input: Tensor, quantizer: Any) -> list[Any]:
    """[the bias's gradient [N], the gradient quantized] of a gradient [..., N]."""
    bias_grad = input.reshape(-1, input.shape[-1]).float().sum(0).to(input.dtype)
    return [bias_grad, input if quantizer is None else quantize(input, quantizer)]


def compute_amax(input: Tensor, amax: Tensor) -> None:
    """Writes max |input| to `amax`, float32 [1]."""
    if amax.dtype != torch.float32 or amax.numel() != 1:
        raise RuntimeError("amax must be a float tensor with exactly one element")
    amax.copy_(amax_of(input.detach().float()).reshape(amax.shape))


def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None) -> Tensor:
    """Transposes bytes [..., K] to [K, ...]."""
    transposed = (input.movedim(-1, 0) if input.dim() else input).contiguous()
    return transposed if out is None else out.copy_(transposed)
