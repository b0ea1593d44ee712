"""What linears leave allocated for backward, at the allocator."""

from __future__ import annotations

import copy

import torch

from benchmarks.measure import live_after
from benchmarks.models import Chain
from te_dynamo.backend import te_fp8


def test_linears_save_their_inputs_in_fp8_once():
    model = Chain(4, size=256)
    x = torch.randn(2048, 256, dtype=torch.bfloat16, requires_grad=True)

    def saved(backend) -> int:
        torch._dynamo.reset()
        run = torch.compile(copy.deepcopy(model), backend=backend)
        for _ in range(2):
            run(x).float().sum().backward()
        return live_after(lambda: run(x)) - 2 * x.numel()  # the result itself apart

    inductor, fp8 = saved("inductor"), saved(te_fp8)
    assert inductor >= 3 * 2 * x.numel()
    # One byte an element; the first linear's input, which Inductor needs not save, has an FP8 copy too.
    assert fp8 <= 4 * x.numel() * 1.05
