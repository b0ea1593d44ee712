"""Arguments of TE's kernels that change no number on the stand-in: how to accumulate, and whether to be deterministic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from te_dynamo.backend import te_fp8
from tests import te_on_cpu

HOPPER, BLACKWELL = (9, 0), (10, 0)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def te(no_codegen: None) -> Any:
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    return te_on_cpu.install()


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [("DelayedScaling", HOPPER), ("Float8CurrentScaling", HOPPER), ("Float8BlockScaling", HOPPER), ("MXFP8BlockScaling", BLACKWELL)],
)
def test_gemms_accumulate_as_those_of_te_s_linear(te, recipe, capability):
    """Forward, dgrad and wgrad, each as TE's own module requests it."""
    from transformer_engine.common import recipe as recipes

    chosen = getattr(recipes, recipe)()
    x, dy = torch.randn(64, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    told = []
    with te_on_cpu.pretended(capability):
        ours = nn.Linear(128, 128, bias=False).bfloat16()
        with te_on_cpu.cuda_is_cpu():
            theirs = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16, device="cpu")
        call = torch.compile(ours, backend=te_fp8, options={"provider": "te", "recipe": chosen})
        call(x.clone().requires_grad_()).backward(dy)  # the first step of delayed scaling is not TE's
        with te_on_cpu.heard() as flags:
            call(x.clone().requires_grad_()).backward(dy)
        told.append(flags)
        with te_on_cpu.heard() as flags, te_on_cpu.cuda_is_cpu():
            with te.autocast(enabled=True, recipe=chosen):
                z = theirs(x.clone().requires_grad_())
            z.backward(dy)
        told.append(flags)
    assert len(told[0]) == 3 and told[0] == told[1]


@pytest.fixture(params=[False, True], ids=["any order", "deterministic"])
def deterministic(request: Any) -> Iterator[bool]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def test_attention_is_deterministic_where_torch_is_to_be(deterministic):
    q = k = v = torch.randn(2, 16, 2, 128).bfloat16()
    layout, one = "bshd_bshd_bshd", torch.ones(())
    with te_on_cpu.heard() as flags:
        o, *aux = torch.ops.te_dynamo.te_attention_fwd(q, k, v, layout, True, 0.1, True)
        torch.ops.te_dynamo.te_attention_bwd(o, q, k, v, o, *aux, layout, True, 0.1)
        q8 = q.to(E4M3)
        o8, *aux, _ = torch.ops.te_dynamo.te_fp8_attention_fwd(q8, q8, q8, [one] * 3, one, one, layout, True, 0.1, torch.bfloat16, True)
        ones = [one.clone() for _ in range(6)]
        torch.ops.te_dynamo.te_fp8_attention_bwd(o8.to(E5M2), q8, q8, q8, o8, *aux, *ones, layout, True, 0.1, torch.bfloat16)
    assert flags == [("deterministic", deterministic)] * 2
