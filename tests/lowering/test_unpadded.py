"""Packing tokens (thd) for an attention that skips padding, against the definition; the flash kernel itself by a stand-in, since there is
no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_dynamo.ir import op_named
from te_dynamo.ir.attention import unpadded_attention
from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.native.unpadded import Tokens, UnpaddedAttention, is_causal
from te_dynamo.lowering.reference.attention import softmax_scale
from te_dynamo.lowering.registry import Case

GARBAGE = 7.0e3  # what a kernel leaves after the last sequence: anything
SCALES: Any = None  # an attention in high precision has none


def sequences(qkv: Sequence[Tensor], ends: Tensor, causal: bool, scale: float) -> list[Tensor]:
    """[T, H, D] of each sequence by itself, one after another."""
    made = []
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        q, k, v = (t[start:end].transpose(0, 1) for t in qkv)
        made.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True).transpose(0, 1))
    return made


class StandIn(UnpaddedAttention):
    def attend(self, call: Call, qkv: Sequence[Tensor], ends: Tensor, longest: Any, training: bool) -> list[Tensor]:
        assert ends.dtype == torch.int32 and torch.diff(ends).amax() <= longest
        whole = torch.cat(sequences(qkv, ends, is_causal(call), softmax_scale(call, qkv[0])))
        return [F.pad(whole, (0, 0, 0, 0, 0, qkv[0].shape[0] - whole.shape[0]), value=GARBAGE), ends[:1]]

    def gradients(
        self, call: Call, grad: Tensor, qkv: Sequence[Tensor], made: Sequence[Tensor], ends: Tensor, longest: Any
    ) -> list[Tensor]:
        assert len(made) == 2
        leaves = [t.detach().requires_grad_() for t in qkv]
        with torch.enable_grad():
            whole = torch.cat(sequences(leaves, ends, is_causal(call), softmax_scale(call, qkv[0])))
        found = torch.autograd.grad(whole, leaves, grad[: whole.shape[0]])
        return [torch.cat([g[: whole.shape[0]], torch.full_like(g[whole.shape[0] :], GARBAGE)]) for g in found]


def agree(valid: Tensor, causal: bool, form: str, heads: tuple[int, int], for_each_head: bool = False) -> None:
    """The implementation and the definition give the same results and gradients."""
    b, s = valid.shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, h, s, 8, dtype=torch.float64, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    mask = valid[:, None, None, :] & (torch.ones(s, s, dtype=torch.bool).tril() if causal else True)
    mask = mask.expand(b, heads[0], s, s) if for_each_head else mask
    inputs = (q, k, v, mask, None, ())
    attributes = {"form": form, "padded": "causal" if causal else "all", "causal": False, "scale": 0.3}
    call = Call("unpadded_attention", "native", "cpu", spec_of(inputs), attributes=attributes)
    wanted = unpadded_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    grad = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, (q, k, v), grad)
    with torch.no_grad():
        done = StandIn().forward(call, inputs, SCALES, [True, True, True])
        made = StandIn().backward(call, [None] * 6, done.saved, [grad], SCALES, [True, True, True])
    torch.testing.assert_close(done.outputs[0], wanted)
    for a, e in zip(made.gradients[:3], expected, strict=True):
        torch.testing.assert_close(a, e)
    assert (done.outputs[0].transpose(1, 2)[~valid] == 0).all()
    outer = {"bshd": 0, "sbhd": 2}[form]
    assert b == 1 or s == 1 or done.outputs[0].stride(outer) == max(done.outputs[0].stride())


PADDINGS = {
    "none": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "right": [[1, 1, 0, 0], [1, 0, 0, 0]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1]],
    "an empty sequence": [[0, 0, 0, 0], [1, 1, 0, 1]],
}


@pytest.mark.parametrize("form", ["bshd", "sbhd"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", PADDINGS)
def test_as_the_definition(padding, causal, form):
    agree(torch.tensor(PADDINGS[padding], dtype=torch.bool), causal, form, (4, 2))


def test_a_mask_that_was_expanded_to_all_heads():
    agree(torch.tensor(PADDINGS["holes"], dtype=torch.bool), True, "bshd", (4, 2), for_each_head=True)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 4), st.integers(1, 9), st.booleans(), st.sampled_from([(1, 1), (2, 1), (4, 2)]))
def test_any_padding(data, batch, length, causal, heads):
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
    agree(torch.tensor(rows), causal, "bshd", heads)


def test_the_places_of_tokens():
    tokens = Tokens.of(torch.tensor([[False, True, True], [True, False, True]]))
    assert tokens.ends.tolist() == [0, 2, 4] and tokens.source[:4].tolist() == [1, 2, 3, 5]
    assert tokens.place[tokens.valid].tolist() == [0, 1, 2, 3]


def test_against_attention_of_each_sequence_alone():
    """The definition itself, against eager attention without a mask."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    valid = torch.tensor([[0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    found = unpadded_attention(q, k, v, valid[:, None, None, :] & torch.ones(6, 6, dtype=torch.bool).tril())
    alone = F.scaled_dot_product_attention(*(t[:, :, valid[0]] for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(found[:, :, valid[0]], alone)
    assert (found[:, :, ~valid[0]] == 0).all()


def test_a_float_mask_in_the_definition():
    q = torch.randn(1, 1, 3, 8)
    shown = torch.tensor([True, True, False])
    hidden = torch.zeros(3).masked_fill(~shown, -torch.inf)
    torch.testing.assert_close(unpadded_attention(q, q, q, hidden.expand(3, 3)), unpadded_attention(q, q, q, shown.expand(3, 3)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "flash attention takes bfloat16 and float16, not torch.float32"),
        ({"head": 12}, "multiples of 8 up to 256, not 12"),
        ({"head": 264}, "multiples of 8 up to 256, not 264"),
        ({"head_v": 32}, "equal head sizes"),
        ({"rows": 1}, "for one row"),
        ({"dropout_p": 0.1}, "random numbers"),
        ({"softcap": 30.0}, "soft-capped"),
    ],
)
def test_what_it_refuses(changes, reason):
    usual = {"dtype": torch.bfloat16, "rows": 16, "head": 64, "head_v": changes.get("head", 64), "dropout_p": 0.0, "softcap": 0.0}
    given = usual | changes
    q, v = (torch.empty(2, 4, given["rows"], given[name], dtype=given["dtype"]) for name in ("head", "head_v"))
    inputs = {"q": q, "k": q, "v": v, "mask": torch.ones(2, 1, 16, 16, dtype=torch.bool), "sinks": None}
    case = Case(op_named("unpadded_attention"), inputs, given, None, torch.device("cuda"), True)
    found = UnpaddedAttention().unsupported(case)
    assert found is None if reason is None else reason in found
