"""Every spelling of attention: found, left alone where it must be, and the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import Gemma2Config, Gemma2Model, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from te_dynamo import ops
from te_dynamo.ir.graph import is_call, tensor
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.raise_attention import ATTENTION_RULES
from te_dynamo.passes.rules import apply
from te_dynamo.passes.spec import RAISED, check
from te_dynamo.sites import Sites
from tests.capture import capture
from tests.models import CASES, SMALL

B, H, G, S, T, D = 2, 4, 2, 6, 5, 8  # batch, heads, heads of k and v where they are fewer, queries, keys, head size
SCALE = 1 / math.sqrt(D)
LOWEST = torch.finfo(torch.float32).min
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Spelling = Callable[[Tensor, Tensor, Tensor], Any]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def qkv(dtype: torch.dtype = torch.float32, heads_kv: int = H) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, H, S, D), (B, heads_kv, T, D), (B, heads_kv, T, D))
    q, k, v = (random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return q, k, v


def some() -> Tensor:
    """A bool mask in which every row attends somewhere."""
    mask = torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[..., 0] = True
    return mask


KEEP = some()


def raised(
    fn: Callable[..., Any], *args: Any, tolerance: float = 1e-5, low_precision: float = 0.0, **kwargs: Any
) -> tuple[GraphModule, list[Node], list[str]]:
    """The graph after the rules, its attentions, and the reasons for what was declined. Checks that the graph still gives
    the same values in the same memory format, and the same gradients.

    low_precision: the allowed relative error, in norm, of the values and of the gradients, if rounding differs.
    """
    gm = capture(fn, *args, **kwargs)
    inputs = gm.meta["example_inputs"]
    canonicalize(gm)
    expected, expected_grads = run(gm, inputs)
    sites = Sites(strict=True)
    apply(ATTENTION_RULES, gm, sites)
    gm.graph.lint()
    gm.recompile()
    assert check(gm, RAISED) == []
    actual, grads = run(gm, inputs)
    assert [(a.dtype, a.shape) for a in actual + grads] == [(e.dtype, e.shape) for e in expected + expected_grads]
    for ours, theirs in ((actual, expected), (grads, expected_grads)):
        if low_precision and theirs:
            a, e = (torch.cat([t.flatten().float() for t in tensors]) for tensors in (ours, theirs))
            assert (a - e).norm() <= low_precision * e.norm()
        elif not low_precision:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert [a.is_contiguous() for a in actual] == [e.is_contiguous() for e in expected]
    return gm, attentions(gm), [s.reason or "" for s in sites]


def run(gm: GraphModule, inputs: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    out = [o for o in gm(*inputs) if isinstance(o, Tensor)]
    leaves = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
    differentiable = [o for o in out if o.requires_grad]
    if not leaves or not differentiable:
        return out, []
    weighted = sum((o.float() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in differentiable)
    grads = torch.autograd.grad(weighted, leaves, allow_unused=True)
    return out, [g for g in grads if g is not None]


def attentions(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if is_call(n, ops.attention)]


def products(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if is_call(n, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.softmax)]


def one(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """The one attention that all of `fn` becomes."""
    gm, found, reasons = raised(fn, *args, **kwargs)
    assert (len(found), reasons, products(gm)) == (1, [], [])
    return found[0]


def none(fn: Callable[..., Any], *args: Any, reason: str | None) -> None:
    """Checks that `fn` is left alone, for this reason; None if it is not an attention."""
    _, found, reasons = raised(fn, *args)
    assert found == []
    if reason is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        assert reason in reasons[0]


# --- scaled_dot_product_attention


SDPA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"causal": False, "scale": None, "dropout_p": 0.0, "enable_gqa": False}),
    "causal": ({"is_causal": True}, {"causal": True}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "bool mask": ({"attn_mask": KEEP}, {"causal": False}),
    "float mask": ({"attn_mask": random(B, H, S, T, seed=4)}, {"causal": False}),
    "mask of two dimensions": ({"attn_mask": random(S, T, seed=4)}, {"causal": False}),
    "mask of three dimensions": ({"attn_mask": random(H, S, T, seed=4)}, {"causal": False}),
}


@pytest.mark.parametrize(("arguments", "attributes"), SDPA.values(), ids=SDPA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa(arguments: dict[str, Any], attributes: dict[str, Any], dtype: torch.dtype) -> None:
    mask = arguments.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        arguments = arguments | {"attn_mask": mask.detach().to(dtype).requires_grad_()}
    node = one(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **arguments), *qkv(dtype))
    assert node.kwargs.items() >= attributes.items()
    assert (node.args[3] is None) == (mask is None)


def test_sdpa_with_grouped_heads() -> None:
    node = one(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *qkv(heads_kv=G))
    assert node.kwargs["enable_gqa"]


def test_sdpa_with_one_head_for_all_of_q() -> None:  # Falcon: PyTorch broadcasts it
    node = one(F.scaled_dot_product_attention, *qkv(heads_kv=1))
    assert node.kwargs["enable_gqa"]


BROADCAST: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = {
    "k and v have one batch": ((B, H), (1, H), (1, H), False),
    "k and v have one batch and fewer heads": ((B, H), (1, G), (1, G), True),
    "q has one batch": ((1, H), (B, H), (B, H), False),
    "q has one head": ((B, 1), (B, H), (B, H), False),
    "only k has one head": ((B, H), (B, 1), (B, H), False),
    "v has more heads than k": ((B, H), (B, G), (B, H), True),
    "batch and heads in one": ((B,), (1,), (1,), False),
}


@pytest.mark.parametrize(("q", "k", "v", "grouped"), BROADCAST.values(), ids=BROADCAST)
def test_sdpa_that_broadcasts_otherwise_is_declined(q, k, v, grouped) -> None:
    given = (random(*q, S, D), random(*k, T, D, seed=1), random(*v, T, D, seed=2))
    reason = "different numbers of heads" if grouped and k != v else "broadcast against one another"
    none(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped), *given, reason=reason)


def test_sdpa_with_dropout() -> None:
    gm = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25), *qkv())
    canonicalize(gm)
    apply(ATTENTION_RULES, gm, Sites(strict=True))
    assert attentions(gm)[0].kwargs["dropout_p"] == 0.25


@pytest.mark.parametrize("lead", [(), (B * H,)])
def test_sdpa_of_fewer_dimensions(lead: tuple[int, ...]) -> None:
    node = one(F.scaled_dot_product_attention, random(*lead, S, D), random(*lead, T, D, seed=1), random(*lead, T, D, seed=2))
    assert [tensor(x).dim() for x in node.args[:3]] == [4, 4, 4]  # type: ignore[union-attr]


def test_sdpa_of_more_dimensions_is_declined() -> None:
    none(F.scaled_dot_product_attention, *(random(2, *x.shape) for x in qkv()), reason="5, 5, 5 dimensions")


def test_sdpa_under_autocast_says_what_is_computed() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v.to(torch.bfloat16))

    node = one(fn, *qkv())
    assert {tensor(x).dtype for x in node.args[:3]} == {torch.bfloat16}  # type: ignore[union-attr]


# --- Attention written out by hand


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), dim=-1) @ v


def scale_of_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * D**-0.25) @ (k * D**-0.25).mT).softmax(-1) @ v


def scale_by_constant_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / torch.full([], D**0.5, dtype=q.dtype)).softmax(-1) @ v


def cast_up_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT * SCALE).float(), -1).to(q.dtype) @ v


def softmax_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).type_as(q) @ v


def product_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q.float() @ k.transpose(2, 3).float() * SCALE, dim=-1).to(v.dtype) @ v


def all_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.softmax(q.float() @ k.float().mT * SCALE, dim=-1) @ v.float()).to(q.dtype)


def keys_already_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.reshape(B, H, D, -1) * SCALE).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1), v)


def einsum_of_bshd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE).softmax(-1), v)


def einsum_with_rows_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bihj", q, k) * SCALE
    return torch.einsum("bihj,bhjd->bhid", (scores + KEEP.transpose(1, 2).to(q.dtype).log()).softmax(-1), v)


def keys_times_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ (k @ q.mT * SCALE).mT.softmax(-1).mT).mT


def batch_and_heads_in_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    return torch.bmm(torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1), v)


def batch_and_heads_in_one_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, S, T) * SCALE + KEEP.to(q.dtype).log()
    return torch.bmm(scores.view(B * H, S, T).softmax(-1), v).view(B, H, S, D).transpose(1, 2).reshape(B, S, H * D)


def upcast_and_reordered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.empty(B * H, S, T, dtype=torch.float32)
    q3, k3 = q.reshape(-1, S, D), k.transpose(-1, -2).reshape(-1, D, T)
    scores = torch.baddbmm(scores, q3.float(), k3.float(), beta=0, alpha=SCALE).reshape(B, H, S, T)
    return scores.softmax(-1).type(v.dtype) @ v


def scaled_before_batch_and_heads_are_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q3, k3, v3 = (q * SCALE).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return torch.bmm(torch.bmm(q3, k3.mT).softmax(-1), v3).unflatten(0, (B, H))


def one_query_after_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(by_hand(q, k, v), 0.5, training=False)


SPELLINGS: list[Spelling] = [
    by_hand,
    scale_of_both,
    scale_by_constant_tensor,
    cast_up_and_back,
    softmax_in_float32,
    product_in_float32,
    all_in_float32,
    keys_already_transposed,
    einsum,
    einsum_of_bshd,
    einsum_with_rows_outside,
    keys_times_queries,
    batch_and_heads_in_one,
    batch_and_heads_in_one_and_back,
    upcast_and_reordered,
    scaled_before_batch_and_heads_are_one,
    one_query_after_another,
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_by_hand(spelling: Spelling, dtype: torch.dtype) -> None:
    node = one(spelling, *qkv(dtype), low_precision=ROUNDING[dtype])
    assert node.kwargs["scale"] == pytest.approx(SCALE)
    assert not node.kwargs["causal"] and node.kwargs["dropout_p"] == 0 and not node.kwargs["enable_gqa"]
    wide = spelling is all_in_float32
    assert {tensor(x).dtype for x in node.args[:3]} == {torch.float32 if wide else dtype}  # type: ignore[union-attr]


def test_q_and_k_are_found_before_views_and_casts() -> None:
    """The attention's inputs are the tensors themselves."""
    for spelling in (upcast_and_reordered, batch_and_heads_in_one, scaled_before_batch_and_heads_are_one, product_in_float32):
        node = one(spelling, *qkv(torch.bfloat16), low_precision=ROUNDING[torch.bfloat16])
        assert [x.op for x in node.args[:3]] == ["placeholder"] * 3  # type: ignore[union-attr]


def test_a_batch_without_heads() -> None:
    node = one(by_hand, random(B, S, D), random(B, T, D, seed=1), random(B, T, D, seed=2))
    assert tuple(tensor(node).shape) == (B, 1, S, D)  # type: ignore[union-attr]


def test_matrices() -> None:
    node = one(by_hand, random(S, D), random(T, D, seed=1), random(T, D, seed=2))
    assert tuple(tensor(node).shape) == (1, 1, S, D)  # type: ignore[union-attr]


def test_values_of_another_size() -> None:
    q, k, _ = qkv()
    one(by_hand, q, k, random(B, H, T, 2 * D, seed=3))


def test_dynamic_lengths() -> None:
    """There is no guard on a size."""
    for spelling in (by_hand, softmax_in_float32, einsum_of_bshd):
        q, k, v = qkv()
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
        _, found, reasons = raised(spelling, q, k, v)
        assert (len(found), reasons) == (1, [])
        assert isinstance(tensor(found[0]).shape[2], torch.SymInt)  # type: ignore[union-attr]


# --- Masks


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + torch.where(KEEP, 0.0, LOWEST)).softmax(-1) @ v


def additive_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    scores += KEEP.log()
    return scores.softmax(-1) @ v


def subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE - 1e9 * (~KEEP).float()).softmax(-1) @ v


def added_before_the_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + torch.linspace(-1, 1, T)) * SCALE).softmax(-1) @ v


def on_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.linspace(-1, 1, T).expand(S, T) + q @ k.mT * SCALE).softmax(-1) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, T).expand(B * H, 1, T)
    q3, k3, v3 = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.baddbmm(bias, q3, k3.mT, beta=0.5, alpha=SCALE).softmax(-1), v3)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~KEEP, -math.inf).softmax(-1) @ v


def filled_where_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(KEEP.int() == 0, float("-inf")).softmax(-1) @ v


def filled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill_(~KEEP, -math.inf).softmax(-1) @ v


def where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(KEEP, q @ k.mT * SCALE, -math.inf).softmax(-1) @ v


def where_the_other_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(~KEEP, torch.full((), -math.inf), q @ k.mT * SCALE).softmax(-1) @ v


def filled_with_the_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~KEEP, LOWEST).softmax(-1) @ v


def filled_with_a_billion(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(KEEP == False, -1e9).softmax(-1) @ v  # noqa: E712


def filled_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~KEEP, -math.inf)
    return scores.masked_fill(torch.arange(T) > 3, -math.inf).softmax(-1) @ v


def filled_then_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT * SCALE).masked_fill(~KEEP, -math.inf) + torch.linspace(-1, 1, T)).softmax(-1) @ v


def added_then_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + torch.linspace(-1, 1, T)).masked_fill(~KEEP, -math.inf).softmax(-1) @ v


def filled_with_the_lowest_then_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # GPT-J
    scores = torch.where(KEEP, q @ k.mT / torch.tensor(D**0.5), torch.tensor(LOWEST))
    return (scores + torch.where(torch.arange(T) < 4, 0.0, LOWEST)).softmax(-1) @ v


def filled_in_both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~KEEP, -math.inf)
    return scores.masked_fill(torch.arange(T) > 3, -1e9).softmax(-1) @ v


def added_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + KEEP.log() + torch.linspace(-1, 1, S * T).view(S, T)).softmax(-1) @ v


def a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # XLNet
    return ((q @ k.mT + KEEP.log() + 0) * SCALE + 1.5).softmax(-1) @ v


BOOL_MASKS: list[Spelling] = [filled, filled_where_zero, filled_in_place, where, where_the_other_way, filled_twice]
FLOAT_MASKS: list[Spelling] = [
    additive,
    additive_in_place,
    subtracted,
    added_before_the_scale,
    on_the_left,
    baddbmm,
    filled_with_the_lowest,
    filled_with_a_billion,
    filled_then_added,
    added_then_filled,
    filled_with_the_lowest_then_added,
    filled_in_both_ways,
    added_twice,
    a_number,
]


@pytest.mark.parametrize("spelling", [*BOOL_MASKS, *FLOAT_MASKS])
def test_masks(spelling: Spelling) -> None:
    node = one(spelling, *qkv())
    assert (tensor(node.args[3]).dtype == torch.bool) == (spelling in BOOL_MASKS)  # type: ignore[union-attr]
    assert node.kwargs["scale"] == pytest.approx(SCALE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_in_low_precision(dtype: torch.dtype) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT * SCALE).masked_fill(~mask, torch.finfo(q.dtype).min)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    one(fn, *qkv(dtype), KEEP, low_precision=ROUNDING[dtype])
    mask = some()
    mask[0, 0, 0] = False  # a fully masked row is uniform, and stays so
    one(fn, *(x.detach() for x in qkv(dtype)), mask, low_precision=ROUNDING[dtype])


def test_a_row_that_sees_nothing() -> None:
    """Uniform if "never attends" is a finite number, as before. 0 if it is -inf, as in torch's fused attention."""
    mask = some()
    mask[0, 0, 0] = False

    def fn(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
        return (q @ k.mT * SCALE).masked_fill(~mask, fill).softmax(-1) @ v

    for fill in (LOWEST, -1e9, -1e4):
        one(fn, *(x.detach() for x in qkv()), fill)
    gm = capture(fn, *qkv(), -math.inf)
    canonicalize(gm)
    assert gm(*gm.meta["example_inputs"])[0][0, :, 0].isnan().all()
    apply(ATTENTION_RULES, gm, Sites(strict=True))
    gm.recompile()
    assert (gm(*gm.meta["example_inputs"])[0][0, :, 0] == 0).all()


def test_a_learned_bias_gets_its_gradient() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias + KEEP.log()).softmax(-1) @ v

    node = one(fn, *qkv(), random(1, H, S, T, seed=5))
    assert node.kwargs["scale"] == 1


def test_a_mask_of_batch_and_heads_in_one() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.bmm((torch.bmm(q, k.mT) + mask).softmax(-1), v)

    three = [x.detach().flatten(0, 1).requires_grad_() for x in qkv()]
    for mask in (random(B * H, S, T, seed=5), random(1, S, T, seed=5), random(S, T, seed=5), random(B * H, 1, T, seed=5)):
        one(fn, *three, mask)


# --- Grouped heads


def repeat_kv(x: Tensor, n: int) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def repeat_before_transpose(x: Tensor, n: int) -> Tensor:  # as Llama's own code has it
    x = x.transpose(1, 2)
    b, s, h, d = x.shape
    return x.unsqueeze(3).expand(b, s, h, n, d).reshape(b, s, h * n, d).transpose(1, 2)


REPEATS = [
    repeat_kv,
    repeat_before_transpose,
    lambda x, n: x.repeat_interleave(n, dim=1),
    lambda x, n: torch.repeat_interleave(x, n, 1),
]


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("attend", [by_hand, F.scaled_dot_product_attention, softmax_in_float32, einsum])
def test_repeated_heads(repeat: Callable[[Tensor, int], Tensor], attend: Spelling) -> None:
    node = one(lambda q, k, v: attend(q, repeat(k, H // G), repeat(v, H // G)), *qkv(heads_kv=G))
    assert node.kwargs["enable_gqa"]
    assert [x.op for x in node.args[1:3]] == ["placeholder"] * 2 or repeat is repeat_before_transpose  # type: ignore[union-attr]
    assert [tensor(x).shape[1] for x in node.args[1:3]] == [G, G]  # type: ignore[union-attr]


@pytest.mark.parametrize("attend", [by_hand, F.scaled_dot_product_attention])
def test_heads_that_are_tiled_are_not_grouped(attend: Spelling) -> None:
    def tile(x: Tensor) -> Tensor:
        b, h, s, d = x.shape
        return x[:, None].expand(b, H // G, h, s, d).reshape(b, H, s, d)

    node = one(lambda q, k, v: attend(q, tile(k), tile(v)), *qkv(heads_kv=G))
    assert not node.kwargs["enable_gqa"]


@pytest.mark.parametrize("attend", [by_hand, F.scaled_dot_product_attention])
def test_only_the_keys_are_repeated(attend: Spelling) -> None:
    q, k, _ = qkv(heads_kv=G)
    node = one(lambda q, k, v: attend(q, repeat_kv(k, H // G), v), q, k, random(B, H, T, D, seed=2))
    assert not node.kwargs["enable_gqa"]


def test_one_head_for_all() -> None:
    node = one(by_hand, *qkv(heads_kv=1))
    assert node.kwargs["enable_gqa"]

    def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k).softmax(-1), v)

    node = one(multi_query, random(B, H, S, D), random(B, T, D, seed=1), random(B, T, D, seed=2))
    assert node.kwargs["enable_gqa"]


# --- Dropout


@pytest.mark.parametrize("cast_first", [True, False])
def test_active_dropout_stays(cast_first: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).softmax(-1, dtype=torch.float32)
        return (F.dropout(p.to(q.dtype), 0.25) if cast_first else F.dropout(p, 0.25).to(q.dtype)) @ v

    gm = capture(fn, *qkv(torch.bfloat16))
    canonicalize(gm)
    apply(ATTENTION_RULES, gm, Sites(strict=True))
    gm.recompile()
    (node,) = attentions(gm)
    assert node.kwargs["dropout_p"] == 0.25
    mean = torch.stack([gm(*gm.meta["example_inputs"])[0].float() for _ in range(400)]).mean(0)
    q, k, v = (x.float() for x in qkv(torch.bfloat16))
    torch.testing.assert_close(mean, (q @ k.mT).softmax(-1) @ v, atol=0.2, rtol=0)


# --- What must be left alone


def test_scores_or_probabilities_used_elsewhere() -> None:
    def probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.mT).softmax(-1)
        return p @ v, p

    def scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = q @ k.mT
        return s.softmax(-1) @ v, s.amax()

    none(probabilities, *qkv(), reason="the attention probabilities are returned")
    none(scores, *qkv(), reason="the attention scores are used elsewhere too, by amax")


def test_the_wrong_dimension() -> None:
    q, k, v = (random(B, H, S, S, seed=i) for i in range(3))
    none(lambda q, k, v: (q @ k.mT).softmax(-2) @ v, q, k, v, reason="the softmax is over dimension -2")
    none(lambda q, k, v: (q @ k.mT).softmax(1) @ v, q, k, v, reason="the softmax is over dimension 1")
    none(lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v, q, k, v, reason="the softmax is over dimension -1")


def test_transposes_of_the_wrong_dimensions_are_seen() -> None:
    """If all sizes are equal, only the names of dimensions show what is multiplied with what."""
    q, k, v = (random(4, 4, 4, 4, seed=i) for i in range(3))
    one(lambda q, k, v: (q @ k.transpose(1, 3)).softmax(-1) @ v, q, k, v)  # keys and heads swapped: another attention
    one(lambda q, k, v: (q @ k).softmax(-1) @ v, q, k, v)
    one(lambda q, k, v: (q.mT @ k).softmax(-1) @ v.mT, q, k, v)


def test_scores_that_attention_does_not_have() -> None:
    gate = torch.rand(S, T)
    none(lambda q, k, v: (q @ k.mT * gate).softmax(-1) @ v, *qkv(), reason="multiplied by a tensor")
    none(lambda q, k, v: (torch.tanh(torch.tanh(q @ k.mT))).softmax(-1) @ v, *qkv(), reason="soft-capped (tanh) more than once")
    none(lambda q, k, v: (torch.tanh((q @ k.mT).masked_fill(~KEEP, -1e9))).softmax(-1) @ v, *qkv(), reason="after they were masked")
    none(lambda q, k, v: (torch.tanh(q @ k.mT) * -5.0).softmax(-1) @ v, *qkv(), reason="by a negative number")
    none(lambda q, k, v: (q @ k.mT).masked_fill(~KEEP, -3.0).softmax(-1) @ v, *qkv(), reason="scores are set to -3.0")
    none(lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v, *qkv(), reason="between its products (relu, softmax)")
    none(lambda q, k, v: ((q @ k.mT).softmax(-1) * gate) @ v, *qkv(), reason="between its products (softmax, mul)")
    none(lambda q, k, v: (q @ k.mT).softmax(-1).square() @ v, *qkv(), reason="between its products (softmax, pow)")
    none(lambda q, k, v: (q @ k.mT).sigmoid() @ v, *qkv(), reason=None)


def test_a_softmax_in_lower_precision() -> None:
    none(lambda q, k, v: (q @ k.mT).to(torch.bfloat16).softmax(-1).float() @ v, *qkv(), reason="computed in bfloat16")
    none(lambda q, k, v: (q @ k.mT).softmax(-1).half().float() @ v, *qkv(), reason="computed in float16")


def test_an_odd_dtype() -> None:
    none(by_hand, *(x.double() for x in qkv()), reason="float64 has no fused attention")


def test_broadcast_operands() -> None:
    _, k, v = qkv()
    none(by_hand, random(1, H, S, D), k, v, reason="broadcast")
    none(by_hand, *qkv(heads_kv=1)[:2], v, reason="broadcast")


def test_a_mask_that_makes_the_scores_larger() -> None:
    q, k, v = (random(1, H, S, D, seed=i) for i in range(3))
    none(lambda q, k, v: (q @ k.mT + torch.zeros(B, 1, S, S)).softmax(-1) @ v.expand(B, H, S, D), q, k, v, reason="larger")


def test_a_write_between_the_nodes() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v.clone()
        scores = q @ k.mT
        view = v[0]
        view.add_(1)
        return scores.softmax(-1) @ v

    none(fn, *qkv(), reason="writes in place")


def test_what_is_no_attention() -> None:
    weight = nn.Parameter(torch.randn(D, T))
    none(lambda x, v: F.linear(x, weight.t()).softmax(-1) @ v, random(S, D), random(T, D, seed=1), reason=None)
    none(lambda x, v: (x @ weight).softmax(-1) @ v, random(S, D), random(T, D, seed=1), reason=None)
    none(lambda x, y: x @ y, random(S, D), random(D, T), reason=None)


def test_many_additions_are_read_in_little_time() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        for _ in range(60):
            scores = scores * 0.5 + scores.square() * 0.01
        return scores.softmax(-1) @ v

    none(fn, *qkv(), reason=None)


def test_a_sink_is_declined() -> None:  # gpt-oss
    def fn(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        scores = torch.cat([q @ k.mT * SCALE, sink.expand(B, H, S, 1)], dim=-1)
        return scores.softmax(-1)[..., :-1] @ v

    none(fn, *qkv(), random(H, 1, 1, seed=5), reason="between its products (mul, cat, softmax, getitem)")


# --- Models


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL)
def test_models(name: str, attention: str) -> None:
    case = SMALL[name]
    model = case.model(attention)
    gm, found, reasons = raised(model, **case.inputs(), tolerance=2e-4)
    assert (len(found), reasons, products(gm)) == (case.attentions, [], [])
    grouped = name in ("llama", "mistral", "qwen3", "gemma3")
    assert all(node.kwargs["enable_gqa"] == grouped for node in found)
    if grouped:
        assert all(tensor(node.args[1]).shape[1] == 2 for node in found)  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_models_in_bfloat16(name: str) -> None:
    case = CASES[name]
    _, found, reasons = raised(case.model("eager", torch.bfloat16).eval(), **case.inputs(torch.bfloat16), low_precision=0.1)
    assert (len(found), reasons) == (case.attentions, [])


def test_gpt2_upcast_and_reordered() -> None:
    sizes: dict[str, Any] = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128, "use_cache": False}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2Model(GPT2Config(**sizes, **off, reorder_and_upcast_attn=True, attn_implementation="eager"))
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    for dtype, low_precision in ((torch.float32, 0.0), (torch.bfloat16, 0.1)):
        _, found, reasons = raised(model.to(dtype), ids, tolerance=2e-4, low_precision=low_precision)
        assert (len(found), reasons) == (2, [])
        assert all(tensor(node.args[0]).dtype == dtype for node in found)  # type: ignore[union-attr]


DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "use_cache": False,
    "attn_implementation": "eager",
}


def test_soft_capped_models() -> None:
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    _, found, reasons = raised(Gemma2Model(Gemma2Config(**DECODER, head_dim=16)), ids, tolerance=2e-4)
    assert ([node.kwargs["softcap"] for node in found], reasons) == ([50.0] * 2, [])


@pytest.mark.parametrize(
    "scores",
    [
        lambda q, k: torch.tanh(q @ k.mT / 5.0) * 5.0,
        lambda q, k: 5 * torch.tanh((q / 4) @ k.mT / 5.0),
        lambda q, k: torch.tanh(q @ k.mT) + torch.where(KEEP, 0.0, -torch.inf),
        lambda q, k: (torch.tanh(q @ k.mT / 7) * 7).masked_fill(~KEEP, torch.finfo(torch.float32).min),
    ],
)
def test_soft_capped(scores: Any) -> None:
    node = one(lambda q, k, v: scores(q, k).softmax(-1) @ v, *qkv())
    assert node.kwargs["softcap"] in (1.0, 5.0, 7.0)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, shift: bool = True, keep: slice = slice(None, -1)) -> Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(~KEEP, -torch.inf)
    both = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    both = both - both.max(-1, keepdim=True).values if shift else both
    return both.softmax(-1)[..., keep] @ v


@pytest.mark.parametrize("shift", [True, False])
def test_sinks(shift: bool) -> None:
    q, k, v = qkv()
    node = one(lambda q, k, v, sinks: with_sinks(q, k, v, sinks, shift), q, k, v, torch.randn(q.shape[1]))
    assert tuple(tensor(node.args[4]).shape) == (q.shape[1],)  # type: ignore[union-attr]


def test_what_is_no_sink() -> None:
    q, k, v = qkv()
    none(lambda q, k, v, s: with_sinks(q, k, v, s, keep=slice(1, None)), q, k, v, torch.randn(q.shape[1]), reason="between its products")
    shifted = lambda q, k, v, s: torch.cat([q @ k.mT, (q @ k.mT)[..., :1]], -1).softmax(-1)[..., :-1] @ v  # noqa: E731
    none(shifted, q, k, v, torch.randn(q.shape[1]), reason="")


def test_models_that_return_their_attentions_are_declined() -> None:
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    model = LlamaModel(LlamaConfig(**DECODER))
    model(ids, output_attentions=True)  # transformers installs its hooks, under a lock
    _, found, reasons = raised(model, ids, output_attentions=True, tolerance=2e-4)
    assert found == [] and all("probabilities are returned" in r for r in reasons) and len(reasons) == 2


def test_a_model_under_autocast() -> None:
    case = CASES["llama"]
    model = case.model("eager")

    def fn(input_ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids).logits

    _, found, reasons = raised(fn, **case.inputs(), low_precision=0.1)
    assert (len(found), reasons) == (case.attentions, [])
    assert all(tensor(x).dtype == torch.bfloat16 for node in found for x in node.args[:3])  # type: ignore[union-attr]
