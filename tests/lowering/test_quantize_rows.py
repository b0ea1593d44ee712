"""Quantization by rows as one operator: its definition, Inductor's code for it, and what a kernel on a GPU then stores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import te_dynamo.lowering.quantize_rows as quantize_rows
from te_dynamo.lowering.granularity import Blocks

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
operator = torch.ops.te_dynamo.quantize_rows


def same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Bit for bit."""
    a, b = ([t.view(torch.uint8 if t.element_size() == 1 else torch.int32) for t in made] for made in (ours, expected))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(rows, columns) * (4 * torch.randn(rows, 1)).exp()
    for row, value in enumerate((torch.nan, torch.inf, 0.0)):
        x[row : row + 1, : columns // 2] = value
    x[3:4] = 0
    return x.to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9), st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.sampled_from([E4M3, E5M2]),
)  # fmt: skip
def test_the_definition(rows: int, columns: list[int], dtype: torch.dtype, fp8: torch.dtype) -> None:
    """Like `Blocks`, which is tested separately; a row's amax ignores NaN."""
    x = matrix(rows, sum(columns), dtype)
    data, inverse, amax = operator(list(x.split(columns, 1)), fp8)
    expected = Blocks(fp8, 1, None, power_of_2=True).quantize(x)
    peaks = x.float().abs().nan_to_num(0, torch.inf).amax(1, keepdim=True) if x.shape[1] else torch.zeros(rows, 1)
    assert same((data, inverse, amax), (expected.data, expected.scale_inv, peaks))


@pytest.mark.inductor
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inductor_s_code(dtype: torch.dtype, dynamic: bool) -> None:
    """Of two parts, each computed from several tensors, one of which needs more steps than Inductor puts into one expression."""
    quantize_rows.register_lowering()
    torch._dynamo.reset()

    def both(gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
        s = gate.sigmoid()
        return [grad * up * s * (1 + gate * (1 - s)), grad * gate * s]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return operator(both(*given), E4M3)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for rows in (8, 24):
        torch.manual_seed(0)
        given = [matrix(rows, 32, torch.float32)[4:].to(dtype) for _ in range(3)]
        (data, inverse, amax), expected = compiled(*given), run(*given)
        assert data.is_contiguous() and data.shape == (rows - 4, 64)
        exact = torch.cat(both(*(t.double() for t in given)), 1)
        torch.testing.assert_close(amax, expected[2], rtol=2**-7, atol=0)  # Inductor rounds intermediate values later than eager
        torch.testing.assert_close(data.double() * inverse, exact, rtol=2**-4, atol=float(amax.max()) * 2**-7)
        assert (
            torch.equal(inverse, torch.exp2(torch.log2(inverse).round())) and (448 >= amax / inverse).all() and (amax / inverse > 223).all()
        )


def test_the_parts_of_a_concatenation() -> None:
    """Are given to the operator, unless something else reads the concatenation, or it joins rows."""
    a, b = torch.randn(4, 8), torch.randn(4, 16)

    def joined(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return operator([torch.cat([a, b], -1).view(4, 24)], E4M3)

    def read(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return *operator([torch.cat([a, b], 1)], E4M3), torch.cat([a, b], 1)

    def rows(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return operator([torch.cat([a, a], 0)], E4M3)

    def reshaped(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return operator([torch.cat([a, b], 1).view(8, 12)], E4M3)

    for run, parts in ((joined, 2), (read, 2), (rows, 1), (reshaped, 1)):
        graph = make_fx(run)(a, b)
        before = graph(a, b)
        quantize_rows.Apart("")(graph.graph)
        graph.recompile()
        (node,) = graph.graph.find_nodes(op="call_function", target=operator.default)
        assert len(node.args[0]) == parts and same(before, graph(a, b))


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ([torch.randn(3, 8), torch.randn(3, 5)], E4M3)
    torch.library.opcheck(operator.default, given)
