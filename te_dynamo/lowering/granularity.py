"""How an operand of a GEMM is quantized: to which format, with one scale for the tensor, for each row, or for each block.

An operand is a matrix [R, C], and the GEMM sums over C. A granularity turns it into plain tensors and back:

    Blocks   FP8, a float32 scale a block: 128 x 128, 1 x 128, a row (1 x all) or the tensor (all x all)
    MX       FP8, an E8M0 scale (a power of two in 8 bits) for each 1 x 32 or 32 x 32
    NVFP4    E2M1, an E4M3 scale for each 1 x 16 or 16 x 16, and a float32 scale for the tensor

The last blocks of a matrix may be smaller than the others. In all of them a NaN element does not count towards an amax, and
stays NaN; casts saturate. An infinite element does not become finite, so that a GradScaler finds the overflow: the scale_inv of
its block is NaN, or, in MX, the largest.

Sources: for blocks arXiv 2412.19437 (DeepSeek-V3, section 3.3); for MX the OCP Microscaling specification 1.0, with the scale
rounded up (arXiv 2506.08027), so that no element saturates; for NVFP4 arXiv 2509.25149. What these leave open is done as in
Transformer Engine 2.20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from te_dynamo.lowering import fp8
from te_dynamo.lowering.fp8 import E4M3, FLOAT32_MAX, FP8_MAX, scale_of
from te_dynamo.lowering.quantized import Quantized

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; code + 8 is the negative
# Transformer Engine's signs for the random Hadamard transform: drawn once, the same for all tensors.
HADAMARD_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


class Granularity(Protocol):
    """Implementations are frozen dataclasses: equal ones quantize equally."""

    def quantize(self, t: Tensor) -> Quantized:
        """t: [R, C], float32, bfloat16 or float16, of any strides. The results are contiguous and share no memory with it."""
        ...

    def dequantize(self, quantized: Quantized, columns: int) -> Tensor:
        """The values, float32 [R, columns]."""
        ...


@dataclass(frozen=True)
class _FP8:
    """FP8 with a scale for each block of `rows` x `columns`; None: the whole dimension."""

    scale_dtype: ClassVar[torch.dtype]

    dtype: torch.dtype
    rows: int | None
    columns: int | None

    def dequantize(self, quantized: Quantized, columns: int) -> Tensor:
        data = _blocks(quantized.data.float(), self.rows, self.columns)
        return _matrix(data * _spread(quantized.scale_inv.float()), *quantized.data.shape)


@dataclass(frozen=True)
class Blocks(_FP8):
    """FP8 with a float32 scale, fp8_max / amax, for each block of `rows` x `columns`; None: the whole dimension.

    data [R, C] in `dtype`; scale_inv float32 [blocks down, blocks across].

    power_of_2: the scale is truncated to a power of two. epsilon: the least amax. The scale is 1 where the amax is 0 or infinite; where
    it is infinite, scale_inv is NaN.
    """

    scale_dtype = torch.float32

    power_of_2: bool = False
    epsilon: float = 0.0

    def quantize(self, t: Tensor) -> Quantized:
        blocks = _blocks(t.float(), self.rows, self.columns)
        amax = _amax(blocks).clamp(min=self.epsilon)
        scale = scale_of(amax, self.dtype)
        if self.power_of_2:
            scale = fp8.power_of_2(scale)
        data = fp8.quantize(blocks, _spread(scale), self.dtype)
        return Quantized(_matrix(data, *t.shape), scale.reciprocal().masked_fill(amax.isinf(), torch.nan))


@dataclass(frozen=True)
class MX(_FP8):
    """FP8 with a power-of-two scale_inv for each `rows` x 32: amax / fp8_max, rounded up.

    data [R, C] in `dtype`; scale_inv float8_e8m0fnu [blocks down, blocks across]. An amax of 0 has the smallest scale_inv,
    2**-127; an infinite one the largest, 2**127.
    """

    scale_dtype = torch.float8_e8m0fnu

    rows: int | None = 1
    columns: int | None = 32

    def quantize(self, t: Tensor) -> Quantized:
        blocks = _blocks(t.float(), self.rows, self.columns)
        exponent = _exponent_above(_amax(blocks) * (1 / FP8_MAX[self.dtype]))
        data = fp8.quantize(blocks, _spread(torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), -exponent)), self.dtype)
        return Quantized(_matrix(data, *t.shape), (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu))


@dataclass(frozen=True)
class NVFP4:
    """E2M1 with a scale for each `rows` x 16, itself rounded to E4M3 under one float32 scale for the tensor.

    data: uint8 [R, 8 for each block across], two codes a byte, the first of each pair in the low half. scale_inv: float32
    [blocks down, blocks across], the product of the two levels. E2M1 has no NaN: a block with a NaN or an infinity has scale_inv NaN.

    hadamard: each 16 columns are multiplied by a randomly signed Hadamard matrix before quantization, which spreads
    outliers; `dequantize` multiplies by the inverse. stochastic: rounds up or down at random, so that the expected value is
    exact, using torch's generator for the device: two calls differ, and `torch.manual_seed` makes them reproducible.
    """

    columns: ClassVar[int] = 16

    rows: int = 1
    hadamard: bool = False
    stochastic: bool = False

    def quantize(self, t: Tensor) -> Quantized:
        blocks = _blocks(t.float(), self.rows, self.columns)
        if self.hadamard:
            blocks = blocks @ _hadamard(t.device)
        amaxes = _amax(blocks)
        encode = _scale_of_tensor(amaxes)
        decode = encode.reciprocal()
        scale = (amaxes * (encode * (1 / E2M1_MAX))).clamp(max=FP8_MAX[E4M3]).to(E4M3).float()
        values = blocks * _spread((scale * decode).reciprocal().clamp(max=FLOAT32_MAX))
        lost = ~blocks.isfinite()
        codes = _e2m1(values.masked_fill(lost, 0), self.stochastic)
        data = codes[..., ::2] | (codes[..., 1::2] << 4)
        scale_inv = (scale * decode).masked_fill(lost.any(3).any(1), torch.nan)
        return Quantized(_matrix(data, t.shape[0], data.shape[2] * data.shape[3]), scale_inv)

    def dequantize(self, quantized: Quantized, columns: int) -> Tensor:
        data = quantized.data.int()
        codes = torch.stack([data & 15, data >> 4], -1).flatten(-2)
        table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float32, device=data.device)
        values = _blocks(table[codes], self.rows, self.columns) * _spread(quantized.scale_inv)
        if self.hadamard:
            values = values @ _hadamard(data.device).t()
        return _matrix(values, data.shape[0], columns)


def _count(size: int, block: int | None) -> int:
    """How many blocks there are along a dimension."""
    return 1 if block is None else (size + block - 1) // block


def _blocks(t: Tensor, rows: int | None, columns: int | None) -> Tensor:
    """[R, C] -> [blocks down, rows, blocks across, columns], padded with zeros."""
    down, across = _count(t.shape[0], rows), _count(t.shape[1], columns)
    r, c = (t.shape[0] if rows is None else rows), (t.shape[1] if columns is None else columns)
    if (down * r, across * c) != tuple(t.shape):
        t = pad(t, (0, across * c - t.shape[1], 0, down * r - t.shape[0]))
    return t.reshape(down, r, across, c)


def _matrix(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """[blocks down, r, blocks across, c] -> [rows, columns], contiguous, without the padding."""
    down, r, across, c = blocks.shape
    return blocks.reshape(down * r, across * c)[:rows, :columns].contiguous()


def _spread(scale: Tensor) -> Tensor:
    """[blocks down, blocks across] -> a shape that broadcasts with blocks."""
    return scale[:, None, :, None]


def _amax(blocks: Tensor) -> Tensor:
    """The largest magnitude of each block, ignoring NaN: float32 [blocks down, blocks across]."""
    if blocks.numel() == 0:
        return blocks.new_zeros(blocks.shape[0], blocks.shape[2])
    magnitude = blocks.abs()
    return magnitude.masked_fill(magnitude.isnan(), 0).amax((1, 3))


def _exponent_above(x: Tensor) -> Tensor:
    """The exponent of the least power of two >= x (x >= 0), clamped to E8M0's range: int32 in [-127, 127]."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(x == 0, -127, torch.where(x.isinf(), 127, exponent))
    return exponent.clamp(-127, 127)


def _scale_of_tensor(amaxes: Tensor) -> Tensor:
    """NVFP4's scale for the tensor, 0-d: it maps the largest block's scale to E4M3's maximum."""
    if amaxes.numel() == 0:
        return amaxes.new_ones(())
    scale = (torch.full_like(amaxes[0, 0], FP8_MAX[E4M3] * E2M1_MAX) / amaxes.amax()).clamp(max=FLOAT32_MAX)
    return torch.where(scale == 0, 1.0, scale)  # an infinite amax gives 0


def _e2m1(values: Tensor, stochastic: bool) -> Tensor:
    """The codes, uint8, of values without NaN; saturating. To nearest, ties to even, or stochastically."""
    magnitude = values.abs().clamp(max=E2M1_MAX)
    # The format's step is 0.5 below 2, 1 below 4, else 2. In each range, code = magnitude / step + offset.
    offset = (magnitude >= 2).float() * 2 + (magnitude >= 4).float() * 2
    steps = magnitude * torch.exp2(1 - offset / 2)
    if stochastic:
        whole = steps.floor()
        steps = whole + (steps - whole > torch.rand_like(steps)).float()
    else:
        steps = steps.round()
    return (steps + offset).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)


def _hadamard(device: torch.device) -> Tensor:
    """The random Hadamard transform of 16 values as an orthonormal matrix, float32 [16, 16]; multiply by it from the right."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    for _ in range(4):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device=device), matrix)
    return torch.tensor(HADAMARD_SIGNS, dtype=torch.float32, device=device)[:, None] * matrix / 4
