"""One kernel casts a tensor in memory, plain and transposed; a tensor that one of Inductor's kernels computes is cast by that kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_dynamo.lowering.kernels.cast_both  # noqa: F401
from te_dynamo.backend import te_fp8
from te_dynamo.lowering.fp8 import E4M3, E5M2, amax, quantize
from tests.numerics import sqnr
from tests.partitioned import calls, casts, interpreted

ours = torch.ops.te_dynamo
HIDDEN = 64


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_definition(dtype):
    torch.manual_seed(0)
    x, scale = torch.randn(24, 40), torch.tensor(3.7)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, 1e6, torch.inf
    for saturate in (False, True):
        data, across, amaxes, sums = ours.cast_both(x, scale, dtype, saturate, 16, True, True)
        expected = quantize(x, scale, dtype)
        if not saturate:
            expected[2, 2] = torch.nan
        assert data.shape == (32, 40) and torch.equal(data[:24].view(torch.uint8), expected.view(torch.uint8))
        assert not data[24:].float().any() and torch.equal(across.view(torch.uint8), data.t().contiguous().view(torch.uint8))
        assert amaxes.max() == amax(x) == torch.inf and torch.allclose(sums.sum(0), x.sum(0), equal_nan=True)


def test_opcheck(monkeypatch):
    allclose = torch.allclose  # which cannot compare FP8
    monkeypatch.setattr(torch, "allclose", lambda *ts, **k: allclose(*(t.view(torch.uint8) if t.dtype == E5M2 else t for t in ts), **k))
    torch.library.opcheck(ours.cast_both.default, (torch.randn(24, 40), torch.tensor(2.0), E5M2, False, 16, True, True))


KERNEL = """
    import torch
    from te_dynamo.lowering.fp8 import FP8_MAX, Casting
    from te_dynamo.lowering.kernels.cast_both import _empty, launch
    from te_dynamo.lowering.kernels.tiles import fill_both

    torch.manual_seed(0)
    FP8_MAX[torch.float32] = 448.0  # memory of float32: the interpreter rounds to FP8 otherwise than hardware
    scale = torch.tensor(150.0)
    for n, (rows, columns) in enumerate([(64, 64), (70, 48), (16, 130), (1, 5), (0, 3), (3, 0)]):
        for data, sums in ((True, True), (False, False)):
            x = torch.randn(rows, 2 * columns).to((torch.float32, torch.bfloat16)[n % 2])[:, :columns]
            found, expected = (_empty(x, torch.float32, 16, data, sums) for _ in range(2))
            launch(x, scale, found, False)
            fill_both(expected, x.float(), Casting().saturated(x, scale, torch.float8_e4m3fn))
            assert torch.equal(found.data, expected.data) and torch.equal(found.transposed, expected.transposed)
            assert not x.numel() or found.amaxes.max() == expected.amaxes.max()
            assert torch.allclose(found.sums.sum(0), expected.sums.sum(0), 1e-4, 1e-4) or not x.numel()
"""


def test_the_kernel(interpreter):
    interpreter(KERNEL)


class Attention(nn.Module):
    """Its first linear reads an input of the graph, its last one the output of an attention; their sum is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, 16)).transpose(1, 2) for w in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def trained(model: nn.Module, scaled: bool = False) -> tuple[int, int, int, int]:
    """How many casts are Inductor's and the kernel's, in forward, then in backward; checks the numbers too."""
    torch.manual_seed(0)
    x, wanted = torch.randn(2, 16, HIDDEN, requires_grad=True), [0, 0]
    with interpreted() as graphs:
        run = torch.compile(model, backend=te_fp8, fullgraph=True)
        for _ in range(2):
            y = run(x)
            found = torch.autograd.grad((y * y if scaled else y).sum(), [x, *model.parameters()])
        exact = torch.autograd.grad((model(x).square() if scaled else model(x)).sum(), [x, *model.parameters()])
        assert all(sqnr(e, f) > 12 for e, f in zip(exact, found, strict=True) if e.norm() > 1e-3)
        for gm, dtype in zip(graphs, (E4M3, E5M2), strict=True):
            wanted += [len(casts(gm, dtype)), len(calls(gm, ours.cast_both.default))]
    return tuple(wanted[2:])


def test_what_lies_in_memory():
    torch.manual_seed(0)
    assert trained(Attention()) == (0, 2, 1, 1)  # of q, k and v; of o: their inputs; their gradients


def test_what_inductor_makes_is_cast_by_it():
    class Made(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sin()).cos()

    torch.manual_seed(0)
    assert trained(Made()) == (1, 1, 2, 0)
