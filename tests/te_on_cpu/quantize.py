"""Casts to FP8: `Float8Quantizer` (delayed: the scale is given) and `Float8CurrentScalingQuantizer` (from the amax)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FP8 = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}  # tex.DType
FLOAT32_MAX = torch.finfo(torch.float32).max
_EXPONENT = 0x7F800000


def create_empty_quantized_tensor(quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, pin_memory: bool) -> Any:
    """An FP8 tensor [..., K] with the copies that the quantizer asks for: row-wise [..., K], transposed [K, ...]."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    shape = list(shape)
    buffers = {
        "data": torch.empty(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": torch.empty(shape[-1:] + shape[:-1], dtype=torch.uint8) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": torch.empty(1),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **buffers)
    return Float8Tensor(shape=shape, dtype=dtype, requires_grad=False, **buffers)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` [..., K] in FP8, into `output` if there is one; a delayed quantizer's amax is max-written."""
    if noop is not None:
        raise NotImplementedError("the noop flag of tex.quantize has no stand-in")
    fp8 = FP8[int(quantizer.dtype)]
    top = torch.finfo(fp8).max
    values = tensor.detach().float()
    scale = _scale(quantizer, _amax(values), top)
    data = (values * scale).clamp(-top, top).to(fp8).view(torch.uint8)
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, tensor.device, False)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(data.movedim(-1, 0))
        output._transpose_invalid = False
    output._scale_inv.copy_((1 / scale).reshape(output._scale_inv.shape))
    return output


def bgrad_quantize(input: Tensor, quantizer: Any) -> list[Any]:
    """[the bias's gradient [N], the gradient in FP8] of a gradient [..., N]."""
    bias_grad = input.reshape(-1, input.shape[-1]).float().sum(0).to(input.dtype)
    return [bias_grad, input if quantizer is None else quantize(input, quantizer)]


def _amax(values: Tensor) -> Tensor:
    """[1]; a NaN does not count (the kernel's fmaxf)."""
    if values.numel() == 0:
        return torch.zeros(1)
    return values.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax().reshape(1)


def _scale(quantizer: Any, amax: Tensor, top: float) -> Tensor:
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer, Float8Quantizer

    if isinstance(quantizer, Float8Quantizer):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        return quantizer.scale
    if not isinstance(quantizer, Float8CurrentScalingQuantizer):
        raise NotImplementedError(f"{type(quantizer).__name__} has no stand-in")
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = (torch.full_like(amax, top) / amax).clamp(max=FLOAT32_MAX)
    scale = torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))
    if quantizer.force_pow_2_scales:  # the mantissa is cut
        scale = (scale.view(torch.int32) & _EXPONENT).view(torch.float32)
    return scale
