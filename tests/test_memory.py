"""What linears keep allocated for backward, at the allocator, and what is copied between them and attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import live_after
from benchmarks.models import Chain
from te_dynamo.backend import te_fp8
from te_dynamo.lowering.opaque import forward_results


def test_linears_save_their_inputs_in_fp8_once():
    model = Chain(4, size=256)
    x = torch.randn(2048, 256, dtype=torch.bfloat16, requires_grad=True)

    def saved(backend) -> int:
        torch._dynamo.reset()
        run = torch.compile(copy.deepcopy(model), backend=backend)
        for _ in range(2):
            run(x).float().sum().backward()
        return live_after(lambda: run(x)) - 2 * x.numel()  # without the result itself

    inductor, fp8 = saved("inductor"), saved(te_fp8)
    assert inductor >= 3 * 2 * x.numel()
    # One byte per element; the first linear's input, which Inductor does not need to save, has an FP8 copy too.
    assert fp8 <= 4 * x.numel() * 1.05


class SelfAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Memory(TorchDispatchMode):
    """Records the memory of the operands of forward's GEMMs and of the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linears: list[tuple[int, int]] = []  # of the input and of the output
        self.attention: list[int] = []  # of q, k, v and the output

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else Dynamo would not run its compiled code while the mode is on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.te_dynamo.site_fwd.default:
            self.linears.append((memory(args[1][0]), memory(forward_results(result)[0][0])))
        elif "scaled_dot_product" in func.__name__ and "backward" not in func.__name__:
            self.attention = [memory(t) for t in (*args[:3], result[0])]
        return result


def memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("short_sequence", [512, 8], ids=["packed", "interleaved"])
def test_nothing_is_copied_between_the_gemms_and_the_attention(short_sequence):
    torch._dynamo.reset()
    run = torch.compile(SelfAttention(), backend=te_fp8, options={"short_sequence": short_sequence})
    x = torch.randn(2, 16, 64)
    run(x)
    with Memory() as seen:
        run(x)
    (_, qkv), (projected, _) = seen.linears
    q, k, v, out = seen.attention
    assert q == k == v == qkv
    assert projected == out
