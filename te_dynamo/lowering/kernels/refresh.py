"""Keeps FP8 copies of weights on a GPU up to date: requantizes them when the weights have changed, for whatever reason, without involving
the host.

Each call runs two kernels. `look` compares `SAMPLES` elements of each weight with their last values, bit by bit; if any differ, it measures
that GEMM's weights. `write` requantizes those GEMMs in place, and exits at once if there are none. Nothing waits for the device and nothing
is allocated, so a CUDA graph can contain both, and checks at each replay.

The samples are spread over rows and columns, so every change of a whole tensor is seen; a change of 2% of a weight escapes all of them
once in 30,000 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from te_dynamo.lowering.quantized import Kept, Quantized

DEVICES = ("cuda",)
SAMPLES = 512  # elements of each weight that are looked at
SLICES = 8  # of a GEMM's weights, each measured by one program
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the kernels number them
LONGEST = 1 << 23  # largest stride, so that a tile is addressed in 32 bits
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it spread evenly, modulo 1


@dataclass(eq=False)
class KeptGemm:
    """The weights [N_i, K] of a GEMM, in place in memory, and the copy made of them.

    samples: int32 [weights, SAMPLES], elements of the weights when the copy was made; None until a `Refresh` records them. They belong
    to the copy: whatever keeps it current reads and writes them.
    """

    how: Kept
    weights: Sequence[Tensor]
    made: Quantized
    samples: Tensor | None = None


def readable(view: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can read a view [N, K] of a weight in the weight's own memory: not a cast copy, and not a tensor subclass."""
    if weight.device.type not in DEVICES or type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in DTYPES:
        return False
    if view.dim() != 2 or not view.numel() or view.dtype != weight.dtype:
        return False
    in_place = view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return in_place and max(view.stride()) < LONGEST


class Refresh:
    """Keeps the copies of some GEMMs, all on one device, up to date. Holds the copies; the weights must not move."""

    def __init__(self, gemms: Sequence[KeptGemm]) -> None:
        """Copies without samples must match the weights as they are now; copies with samples, the weights that were sampled."""
        self.device = gemms[0].weights[0].device
        self.programs = _programs(self.device)
        if new := [gemm for gemm in gemms if gemm.samples is None]:
            for gemm in new:
                gemm.samples = torch.empty((len(gemm.weights), SAMPLES), dtype=torch.int32, device=self.device)
            self._describe(new)
            self._look(record=True)
        self._describe(gemms)
        self()  # so that both kernels are loaded before a CUDA graph is captured

    def _describe(self, gemms: Sequence[KeptGemm]) -> None:
        """The tables that the kernels read."""
        self.gemms, self.count = gemms, len(gemms)
        parts = [row for gemm in gemms for row in _parts(gemm)]
        starts = accumulate((len(gemm.weights) for gemm in gemms), initial=0)
        self.gemm_table = self._upload([_gemm(gemm, start) for gemm, start in zip(gemms, starts, strict=False)], torch.int64)
        self.part_table = self._upload(parts, torch.int64)
        self.ranges = self._upload([(g.how.top, g.how.epsilon) for g in gemms], torch.float32)
        self.offsets = _offsets(self.part_table, self._upload([[_step(p[2] * p[3])] for p in parts], torch.int64))
        self.amaxes = torch.empty((self.count, SLICES), dtype=torch.float32, device=self.device)
        self.changed = torch.empty(self.count, dtype=torch.int32, device=self.device)

    def __call__(self) -> None:
        self._look(record=False)
        self._write()

    def _look(self, *, record: bool) -> None:
        from te_dynamo.lowering.kernels.refresh_triton import look_kernel

        with _on(self.device):
            tables = (self.gemm_table, self.part_table, self.offsets, self.amaxes, self.changed)
            look_kernel[(self.count * SLICES,)](*tables, RECORD=record, num_warps=4)

    def _write(self) -> None:
        from te_dynamo.lowering.kernels.refresh_triton import write_kernel

        tables = (self.gemm_table, self.ranges, self.part_table, self.offsets, self.amaxes, self.changed)
        with _on(self.device):
            write_kernel[(self.programs,)](*tables, self.count, COUNT=1 << (self.count - 1).bit_length(), num_warps=8)

    def _upload(self, rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
        made = torch.tensor(rows, dtype=dtype)
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made


def by_device(gemms: Iterable[KeptGemm]) -> list[Refresh]:
    """One `Refresh` for all GEMMs of each device."""
    found = dict[torch.device, list[KeptGemm]]()
    for gemm in gemms:
        found.setdefault(gemm.weights[0].device, []).append(gemm)
    return [Refresh(of_device) for of_device in found.values()]


def _gemm(gemm: KeptGemm, first: int) -> list[int]:
    """A row of the GEMM table: first part, number of parts, by row; copy, its strides; transposed copy, its strides; scale_inv, scale,
    amax; power of two"""
    how, made = gemm.how, gemm.made
    assert made.data is not None
    across = (0, 0, 0) if made.transposed is None else (made.transposed.data_ptr(), *made.transposed.stride())
    scalars = [0 if t is None else t.data_ptr() for t in (made.scale_inv, made.scale, made.amax)]
    copies = (made.data.data_ptr(), *made.data.stride(), *across)
    return [first, len(gemm.weights), how.by_row, *copies, *scalars, how.power_2_scale]


def _parts(gemm: KeptGemm) -> list[list[int]]:
    """Rows of the part table: address, dtype, rows, columns, strides; group, pitch, offset
    (row r is row r // group * pitch + offset + r % group of the copy); address of the samples"""
    assert gemm.samples is not None
    interleave, found, start = gemm.how.interleave if len(gemm.weights) > 1 else 0, [], 0
    for i, (w, samples) in enumerate(zip(gemm.weights, gemm.samples, strict=True)):
        placed = (interleave, len(gemm.weights) * interleave, i * interleave) if interleave else (w.shape[0], 0, start)
        found.append([w.data_ptr(), DTYPES[w.dtype], *w.shape, *w.stride(), *placed, samples.data_ptr()])
        start += w.shape[0]
    return found


def _step(elements: int) -> int:
    """The step between samples, modulo the number of elements: coprime to it, so that no element repeats before all were taken."""
    step = max(1, round(elements * GOLDEN))
    while math.gcd(step, elements) != 1:
        step += 1
    return step


def _offsets(parts: Tensor, steps: Tensor) -> Tensor:
    """The offsets of each weight's samples from its address, in elements: int64 [P, SAMPLES]."""
    rows, columns, row_stride, column_stride = parts[:, 2:6].unsqueeze(-1).unbind(1)
    at = torch.arange(SAMPLES, device=parts.device) * steps % (rows * columns)
    return at // columns * row_stride + at % columns * column_stride


@cache
def _programs(device: torch.device) -> int:
    """The number of programs that run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
