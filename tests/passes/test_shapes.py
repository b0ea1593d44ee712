"""The fake values that are computed without running a definition equal those from running it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from te_dynamo import ops
from te_dynamo.ir import all_ops
from te_dynamo.ir.graph import FAKES as SHAPES


def arguments(dtype: torch.dtype):
    x = torch.empty(3, 5, 32, dtype=dtype)
    across = torch.empty(5, 32, 3, dtype=dtype).permute(2, 0, 1)  # with the strides of a transposed activation
    weights, norm = [torch.empty(16, 32, dtype=dtype), torch.empty(16, 32, dtype=dtype)], torch.empty(32, dtype=dtype)
    bias = torch.empty(16, dtype=dtype)
    attributes = {"kind": "rms", "eps": 1e-6}
    return [
        (ops.linear, (x, weights[0], bias), {"out_dtype": torch.bfloat16}),
        (ops.linear, (torch.empty(32, dtype=dtype), weights[0]), {"out_dtype": dtype}),
        (ops.linear, (across, weights[0]), {"out_dtype": dtype}),
        (ops.linears, (x, weights, [bias, None]), {"out_dtype": dtype}),
        (ops.linears, (x, weights, [None, None]), {"out_dtype": dtype, "merged": True, "interleave": 8}),
        (ops.norm, (x, norm), attributes | {"out_dtype": torch.float16}),
        (ops.norm, (across, norm), attributes | {"out_dtype": torch.float32}),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(arguments(torch.float32))))
def test_a_shape_is_what_the_definition_gives(case, dtype):
    with FakeTensorMode():
        op, args, kwargs = arguments(dtype)[case]
        expected, found = op(*args, **kwargs), SHAPES[op](*args, **kwargs)
    pairs = zip(expected, found, strict=True) if isinstance(expected, list) else [(expected, found)]
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_each_semantic_operation_of_several_steps_has_one():
    assert set(SHAPES) == {op.definition for op in all_ops()} >= {ops.linear, ops.linears, ops.norm}
