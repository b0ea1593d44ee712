"""FP8 attention: its numbers against high precision and against Transformer Engine's emulation, its two operations, its tracing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from te_dynamo.ir import op_named
from te_dynamo.lowering import fp8
from te_dynamo.lowering.call import flattened
from te_dynamo.lowering.compute import scales_of
from te_dynamo.lowering.fp8 import E4M3, E5M2
from te_dynamo.lowering.opaque import forward_results
from te_dynamo.lowering.quantized import Scale
from te_dynamo.lowering.reference import attention as definition
from te_dynamo.lowering.registry import Case
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling
from tests.calls import attention, attention_call

OPS = torch.ops.te_dynamo
IMPLEMENTATION = definition.FP8Attention()
B, H, S, D = 2, 4, 512, 64


def sqnr(reference: torch.Tensor, x: torch.Tensor) -> float:
    reference, x = reference.detach().double(), x.detach().double()
    return 10 * math.log10(reference.square().sum() / (reference - x).square().sum())


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(b=B, h=H, h_kv=None, s=S, s_kv=None, d=D, d_v=None, dtype=torch.float32) -> list[torch.Tensor]:
    h_kv, s_kv, d_v = h_kv or h, s_kv or s, d_v or d
    return [
        gaussian(b, h, s, d, dtype=dtype, seed=0),
        gaussian(b, h_kv, s_kv, d, dtype=dtype, seed=1),
        gaussian(b, h_kv, s_kv, d_v, dtype=dtype, seed=2),
    ]


def gradients(fn, tensors, do):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = fn(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, do.to(out.dtype))


def high_precision(tensors, do, attn_mask=None, **kwargs):
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's flash attention loses a row whose scores are all the lowest float
        return gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask, **kwargs), [x.double() for x in tensors], do)


def forward(q, k, v, mask, scale, start, causal, softmax_scale, quantize_output, form):
    """(o, o8, q8, k8, v8, scale_inv [5], lse, amax [5]) from the operator."""
    how = {"causal": causal, "softmax_scale": softmax_scale, "quantize_output": quantize_output, "form": form}
    call = attention_call(q, k, v, mask, **how)
    (o,), saved, amax = forward_results(OPS.site_fwd(call.key, [q, k, v, mask, None], scale, start, [True] * 3 + [False] * 2))
    q8, k8, v8, s8, o8, lse = saved
    scale_inv = [t.scale_inv for t in (q8, k8, v8, s8, o8) if t.scale_inv is not None]
    return o, o8.data, q8.data, k8.data, v8.data, torch.stack(scale_inv), lse.data, amax


# --- numbers


@pytest.mark.parametrize(("b", "h", "s"), [(B, H, S), (1, 1, 4096)])
@pytest.mark.parametrize(("quantize_output", "expected"), [(False, 25.4), (True, 24.4)])
def test_output_has_the_error_that_four_or_five_e4m3_roundings_give(quantize_output, expected, b, h, s):
    # Rounding a Gaussian to E4M3 adds noise 31.5 dB below it. O gets that of V, of S, and of Q and K (through the
    # scores, whose absolute error is a relative error of S): 31.5 - 10 log10(4) = 25.5; with O rounded too, a fifth: 24.5.
    q, k, v = qkv(b, h, s=s)
    o, _ = attention(q, k, v, quantize_output=quantize_output)
    assert abs(sqnr(F.scaled_dot_product_attention(q.double(), k.double(), v.double()), o) - expected) < 0.5


@pytest.mark.parametrize(("quantize_gradients", "expected"), [(False, (20.7, 20.7, 23.1)), (True, (19.5, 19.5, 21.1))])
@pytest.mark.parametrize("quantize_output", [False, True])
def test_gradients_have_the_error_of_their_roundings(quantize_output, quantize_gradients, expected):
    # E5M2's noise is 25.5 dB down, four times E4M3's. In units of E4M3's noise, 31.5 dB down: dQ and dK get that of q and k
    # (2, through S), v (1), dO (4), dP (4), and k or q again (1): 12, or 20.7 dB. dV: q, k (2), S (1), dO (4): 7, or 23.1 dB.
    # With the gradient's own rounding (4): 16, or 19.5 dB, and 11, or 21.1 dB.
    tensors, do = qkv(), gaussian(B, H, S, D, seed=3)
    _, reference = high_precision(tensors, do)
    _, found = gradients(
        lambda q, k, v: attention(q, k, v, quantize_output=quantize_output, quantize_gradients=quantize_gradients)[0], tensors, do
    )
    for want, got, level in zip(reference, found, expected, strict=True):
        assert abs(sqnr(want, got) - level) < 0.5


class Emulated(torch.autograd.Function):
    """Rounds a tensor to FP8 in forward, its gradient in backward; None skips either. scale: None for one from its own amax."""

    @staticmethod
    def forward(ctx, x, dtype, gradient_dtype, gradient_scale=None):
        ctx.gradient_dtype, ctx.gradient_scale = gradient_dtype, gradient_scale
        return Emulated.rounded(x, dtype, None)

    @staticmethod
    def backward(ctx, grad):
        return Emulated.rounded(grad, ctx.gradient_dtype, ctx.gradient_scale), None, None, None

    @staticmethod
    def rounded(x, dtype, scale):
        if dtype is None:
            return x
        scale = fp8.scale_of(x.abs().max().float(), dtype) if scale is None else scale
        return fp8.quantize(x, scale, dtype).double() / scale.double()


class FusedSoftmax(torch.autograd.Function):
    """A softmax whose backward sums dO * O like a fused kernel: the rounded S times dS."""

    @staticmethod
    def forward(ctx, scores):
        probabilities = scores.softmax(-1)
        ctx.save_for_backward(probabilities)
        return probabilities

    @staticmethod
    def backward(ctx, ds):
        (probabilities,) = ctx.saved_tensors
        return probabilities * (ds - (Emulated.rounded(probabilities, E4M3, None) * ds).sum(-1, keepdim=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("softmax", "closeness"), [(FusedSoftmax.apply, 70), (lambda x: x.softmax(-1), 28)])
def test_is_what_transformer_engine_emulates(causal, softmax, closeness):
    # UnfusedDotProductAttention with FP8 emulation: QKV, S, dO and dP are rounded, P, O, dS and dQKV are not. Its softmax is
    # torch's, whose backward sums the unrounded S: many dP cross the rounding boundary between two E5M2 numbers, 12% to 25%
    # apart (and if dP's scale came from its own amax, all of them would be rounded differently).
    tensors, do = qkv(s=128), gaussian(B, H, 128, D, seed=3)
    scale = torch.tensor([0.0] * 6 + [4096.0, 0.0])

    def emulation(q, k, v):
        q, k, v = (Emulated.apply(x, E4M3, None) for x in (q, k, v))
        scores = Emulated.apply(q @ k.mT / D**0.5, None, E5M2, scale[6])
        if causal:
            scores = scores.masked_fill(torch.ones(128, 128, dtype=torch.bool).triu(1), -torch.inf)
        probabilities = Emulated.apply(softmax(scores), E4M3, None)
        return Emulated.apply(probabilities @ v, None, E5M2)

    want, want_gradients = gradients(emulation, [x.double() for x in tensors], do)
    got, got_gradients = gradients(lambda q, k, v: attention(q, k, v, None, scale, grad_start=5, causal=causal)[0], tensors, do)
    dq, dk, dv = (sqnr(*x) for x in zip(want_gradients, got_gradients, strict=True))
    assert min(sqnr(want, got), dv) > 70
    assert min(dq, dk) > closeness


def test_definition_shares_torch_s_meaning_of_every_argument():
    q, k, v = qkv(h=4, h_kv=2, s=48, s_kv=80, d=32, d_v=16)
    do = gaussian(B, 4, 48, 16, seed=3)
    lower = torch.ones(48, 80, dtype=torch.bool).tril()
    boolean = gaussian(B, 1, 48, 80, seed=4) > -0.5
    for kwargs in (
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": lower},
        {"attn_mask": boolean},
        {"attn_mask": gaussian(1, 4, 48, 80, seed=5)},
    ):
        want, want_gradients = high_precision([q, k, v], do, enable_gqa=True, **kwargs)
        ours = {"causal": kwargs.get("is_causal", False), "softmax_scale": kwargs.get("scale"), "mask": kwargs.get("attn_mask")}
        got, got_gradients = gradients(lambda *x, ours=ours: attention(*x, enable_gqa=True, **ours)[0], [q, k, v], do)
        assert sqnr(want, got) > 23, kwargs
        for pair in zip(want_gradients, got_gradients, strict=True):
            assert sqnr(*pair) > 18, kwargs


@pytest.mark.parametrize("never", [-torch.inf, torch.finfo(torch.float32).min])
def test_rows_in_which_nothing_may_be_seen(never):
    # With -inf torch makes such a row zero; with the lowest float, as HF builds its masks, it becomes uniform.
    q, k, v = qkv(s=32)
    do = gaussian(B, H, 32, D, seed=3)
    mask = torch.zeros(32, 32)
    mask[3], mask[:, 20:] = never, never
    want, want_gradients = high_precision([q, k, v], do, attn_mask=mask)
    got, got_gradients = gradients(lambda *x: attention(*x, mask)[0], [q, k, v], do)
    assert sqnr(want, got) > 24
    for pair in zip(want_gradients, got_gradients, strict=True):
        assert sqnr(*pair) > 18


def test_result_is_in_the_callers_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        tensors, do = qkv(s=64, dtype=dtype), gaussian(B, H, 64, D, seed=3)
        o, (dq, dk, dv) = gradients(lambda q, k, v: attention(q, k, v)[0], tensors, do)
        assert {x.dtype for x in (o, dq, dk, dv)} == {dtype}
        assert sqnr(high_precision(tensors, do)[0], o) > 24.5


def test_autocast_does_not_reach_the_definition():
    q, k, v = qkv(s=64)
    with torch.amp.autocast("cpu", torch.bfloat16):
        inside, _ = attention(q, k, v)
    torch.testing.assert_close(inside, attention(q, k, v)[0], rtol=0, atol=0)


def test_nan_reaches_the_output_and_no_amax():
    q, k, v = qkv(s=32)
    v[0, 0, 3, 0] = torch.nan
    o, amax = attention(q, k, v)
    assert o[0, 0, :, 0].isnan().all()
    assert not o[1].isnan().any()
    assert amax.isfinite().all()


@pytest.mark.parametrize("shape", [{"b": 0}, {"s": 0}, {"s": 1, "s_kv": 7}, {"h": 1, "s": 1}])
def test_odd_sizes(shape):
    tensors = [
        x[:, :, :0] if shape.get("s") == 0 and i == 0 else x for i, x in enumerate(qkv(**{"s": 5, **{k: v for k, v in shape.items() if v}}))
    ]
    if "b" in shape:
        tensors = [x[:0] for x in tensors]
    o, grads = gradients(lambda q, k, v: attention(q, k, v)[0], tensors, torch.ones_like(tensors[0]))
    assert o.shape == tensors[0].shape
    assert all(g.isfinite().all() for g in grads)


# --- scales


def test_slots_give_the_scales_and_unset_ones_take_their_own_amax():
    q, k, v = qkv(s=64)
    scale = torch.zeros(20)
    own = forward(q, k, v, None, None, 0, False, 0.125, True, "bshd")
    for a, b in zip(own, forward(q, k, v, None, scale, 7, False, 0.125, True, "bshd"), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0)
    torch.testing.assert_close(own[7], torch.stack([*(x.abs().max() for x in (q, k, v)), own[7][3], own[7][4]]))
    probabilities = ((q / 8) @ k.mT).softmax(-1)
    torch.testing.assert_close(own[7][3], probabilities.max(), rtol=0.2, atol=0)

    scale[7:12] = torch.tensor([8.0, torch.nan, 16.0, 448.0, 32.0])
    given = forward(q, k, v, None, scale, 7, False, 0.125, True, "bshd")
    scale_inv = given[5]
    torch.testing.assert_close(scale_inv[[0, 2, 3, 4]], 1 / scale[[7, 9, 10, 11]])
    assert scale_inv[1] == own[5][1]
    torch.testing.assert_close(given[2].float(), (q * 8).to(E4M3).float(), rtol=0, atol=0)
    torch.testing.assert_close(own[7][:3], given[7][:3])


def test_gradient_slots_and_their_amaxes_through_the_sink():
    tensors, do = qkv(s=64), gaussian(B, H, 64, D, seed=3)
    leaves = [x.requires_grad_() for x in tensors]
    for given in (None, torch.zeros(9), torch.tensor([0.0] * 5 + [0.0, 1024.0, 4096.0, 512.0])):
        sink = torch.zeros(3, requires_grad=True)
        o, amax = attention(*leaves, scale=given, sink=sink, grad_start=6, quantize_gradients=True)
        assert not amax.requires_grad
        *grads, gradient_amax = torch.autograd.grad(o, [*leaves, sink], do)
        assert gradient_amax[0] == do.abs().max()
        scale = fp8.scale_of(gradient_amax[2], E5M2) if given is None or not given.any() else given[8]
        for x in grads:
            torch.testing.assert_close(x, fp8.quantize(x, scale, E5M2).float() / scale)
    for x in grads:
        assert x.abs().max() <= gradient_amax[2] * (1 + 2**-3)


def test_second_derivative_is_an_error():
    leaves = [x.requires_grad_() for x in qkv(s=16)]
    (dq,) = torch.autograd.grad(attention(*leaves)[0].square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


# --- memory


def test_blocks_change_nothing(monkeypatch):
    tensors, do = qkv(b=3, h=3, s=40, s_kv=24), gaussian(3, 3, 40, D, seed=3)
    mask = gaussian(3, 1, 40, 24, seed=4)
    whole, grads = gradients(lambda q, k, v: attention(q, k, v, mask)[0], tensors, do)
    for block in (24, 24 * 16, 24 * 40, 24 * 40 * 2, 24 * 40 * 3 * 2):
        monkeypatch.setattr(definition, "BLOCK", block)
        again, grads_again = gradients(lambda q, k, v: attention(q, k, v, mask)[0], tensors, do)
        for a, b in zip([whole, *grads], [again, *grads_again], strict=True):
            assert sqnr(a, b) > 45  # a value may cross the rounding boundary between two FP8 numbers


def test_no_tensor_holds_all_scores_of_a_long_sequence():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    q, k, v = qkv(b=1, h=2, s=3000, d=8)
    call = attention_call(q, k, v, causal=True, softmax_scale=0.3)
    scale = Scale(torch.ones(()), torch.ones(()))
    scales = scales_of(call.but(calibrating=False), [scale] * 5)
    needs = [True] * 3 + [False]
    with Largest() as largest:
        _, saved, _ = IMPLEMENTATION.forward(call, [q, k, v, None], scales, needs)
        IMPLEMENTATION.backward(call, [None] * 5 + [[], [q]], saved, [q], scales, needs)
    assert 2 * 3000 * 3000 > definition.BLOCK >= largest.numel


@pytest.mark.parametrize("quantize_output", [False, True])
def test_saves_fp8_for_backward(quantize_output):
    saved = []
    leaves = [x.requires_grad_() for x in qkv(s=64, dtype=torch.bfloat16)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attention(*leaves, quantize_output=quantize_output)
    big = [x.dtype for x in saved if x.numel() == B * H * 64 * D]
    assert big == ([E4M3] * 4 if quantize_output else [torch.bfloat16] + [E4M3] * 3)


# --- a backward in high precision


@pytest.mark.parametrize("causal", [False, True])
def test_a_backward_in_high_precision(causal):
    """Forward is bitwise the same as with both in FP8, for a recipe like TE's; gradients are at least 3 dB closer to the exact ones."""
    tensors, do = qkv(s=128, h_kv=2), gaussian(B, H, 128, D, seed=5)
    _, exact = high_precision(tensors, do, is_causal=causal, enable_gqa=True)
    how = {"causal": causal, "recipe": DelayedScaling(like_te=True).key}
    both, noisy = gradients(lambda *t: attention(*t, **how)[0], tensors, do)
    alone, ours = gradients(lambda *t: attention(*t, **how, op="fp8_forward_attention")[0], tensors, do)
    assert torch.equal(both, alone)
    assert all(sqnr(e, a) > max(25, sqnr(e, b) + 3) for e, a, b in zip(exact, ours, noisy, strict=True))


def large_alike(q: torch.Tensor, k: torch.Tensor) -> None:
    """A channel is large in q and in k."""
    q[..., 3] *= 6
    k[..., 3] *= 6


def large_in_all_keys(q: torch.Tensor, k: torch.Tensor) -> None:
    """A channel of k is large, on one side of zero."""
    k[..., 3] += 30


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("recipe", "channel", "gain"),
    [(DelayedScaling, large_in_all_keys, -0.1), (Float8CurrentScaling, large_alike, 3), (Float8CurrentScaling, large_in_all_keys, 5)],
)
def test_large_channels_as_trained_models_have_them(recipe, channel, gain, causal):
    """A rotation spreads large channels over the head, and the mean of all keys, which no score needs, is removed. Gradients are those of
    the original q and k."""
    (q, k, v), do = qkv(s=128, h_kv=2), gaussian(B, H, 128, D, seed=5)
    channel(q, k)
    expected, exact = high_precision([q, k, v], do, is_causal=causal, enable_gqa=True)

    def attended(recipe):
        return gradients(lambda *t: attention(*t, causal=causal, op="fp8_forward_attention", recipe=recipe.key)[0], [q, k, v], do)

    (plain, _), (ours, made) = attended(recipe(like_te=True)), attended(recipe())
    assert sqnr(expected, ours) > sqnr(expected, plain) + gain
    assert all(sqnr(e, m) > 60 for e, m in zip(exact, made, strict=True))


def test_what_no_score_needs_may_be_anything():
    """A masked key that is NaN or infinite is not in the mean."""
    q, k, v = qkv(s=16)
    mask = torch.arange(16) < 12
    clean = attention(q, k, v, mask.expand(1, 1, 16, 16), op="fp8_forward_attention", recipe=Float8CurrentScaling().key)[0]
    k[:, :, 12:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])[:, None]
    found = attention(q, k, v, mask.expand(1, 1, 16, 16), op="fp8_forward_attention", recipe=Float8CurrentScaling().key)[0]
    assert sqnr(clean, found) > 24  # the mean differs, and so does rounding


def test_float16_does_not_overflow():
    """Its keys stay as they are: without their mean some would be beyond its range."""
    q, k, v = qkv(s=16, dtype=torch.float16)
    k[...] = torch.where(torch.arange(16)[:, None] < 14, 64000.0, -64000.0)
    (o, *_) = attention(q / 1e5, k, v, op="fp8_forward_attention", recipe=Float8CurrentScaling().key)
    assert o.isfinite().all()


# --- the operations


def op_samples():
    """(forward's arguments, backward's)"""
    q, k, v = qkv(h=4, h_kv=2, s=6, s_kv=5, d=8, d_v=16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    mask = gaussian(2, 1, 6, 5, seed=4)
    for tensors, m, scale, causal, quantized, form in (
        ([q, k, v], None, None, True, False, "bshd"),
        (strided, mask, torch.rand(16) * 100, False, True, "bshd"),
        (strided, mask > 0, torch.zeros(16), False, True, "sbhd"),
    ):
        yield sample(tensors, m, scale, causal, quantized, form)


def sample(tensors, mask, scale, causal, quantized, form):
    how = {"causal": causal, "softmax_scale": 0.3, "quantize_output": quantized, "quantize_gradients": quantized, "form": form}
    call, needs = attention_call(*tensors, mask, **how), [True] * 3 + [False] * 2
    arguments = (call.key, [*tensors, mask, None], scale, 3, needs)
    (o,), saved, _ = forward_results(OPS.site_fwd(*arguments))
    read = [None, None, None, mask, None, *([] if quantized else [o])]
    return arguments, (call.key, read, flattened(saved), [torch.randn_like(o)], scale, 9, needs)


@pytest.mark.parametrize(("forward_arguments", "backward_arguments"), list(op_samples()))
def test_opcheck(forward_arguments, backward_arguments, monkeypatch):
    # opcheck compares an operation's arguments before and after it; torch.allclose cannot compare FP8
    allclose = torch.allclose
    bits = {E4M3: torch.uint8, E5M2: torch.uint8}
    monkeypatch.setattr(
        torch, "allclose", lambda a, b, **k: allclose(a.view(bits.get(a.dtype, a.dtype)), b.view(bits.get(b.dtype, b.dtype)), **k)
    )
    torch.library.opcheck(OPS.site_fwd.default, forward_arguments)
    torch.library.opcheck(OPS.site_bwd.default, backward_arguments)


@pytest.mark.parametrize(("form", "order"), [("bshd", "bshd"), ("sbhd", "sbhd")])
def test_memory_format(form, order):
    q, k, v = qkv(s=6, d=8)
    out = forward(q, k, v, None, None, 0, False, 0.3, True, form)
    _, backward_arguments = sample((q, k, v), None, None, False, True, form)
    _, *again = OPS.site_bwd(*backward_arguments)
    for x in (*out[:5], *again):
        assert x.permute(["bhsd".index(c) for c in order]).is_contiguous()


def test_flops_are_registered():
    q, k, v = qkv(s=32, s_kv=48, d_v=16)
    with FlopCounterMode(display=False) as ours:
        o, _ = attention(*(x.requires_grad_() for x in (q, k, v)))
        o.backward(torch.ones_like(o))
    size = 2 * B * H * 32 * 48
    assert ours.get_total_flops() == size * (D + 16) + size * (3 * D + 2 * 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.1}, "dropout"),
        ({"q": torch.zeros(2, 3, 4)}, "dimensions"),
        ({"softcap": 50.0}, "soft-capped (tanh, 50)"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"k": torch.zeros(2, 4, 8, 16, dtype=torch.float64)}, "dtype"),
        ({"mask": torch.zeros(8, 8, requires_grad=True)}, "bias"),
        ({"k": torch.zeros(2, 2, 8, 16), "v": torch.zeros(2, 2, 8, 16)}, "broadcast"),
        ({"k": torch.zeros(2, 3, 8, 16), "v": torch.zeros(2, 3, 8, 16), "enable_gqa": True}, "broadcast"),
        ({"k": torch.zeros(1, 4, 8, 16), "v": torch.zeros(1, 4, 8, 16)}, "broadcast"),
    ],
)
def test_says_why_not(change, reason):
    x = torch.zeros(2, 4, 8, 16)
    given = {"q": x, "k": x, "v": x, "mask": None, "sinks": None, "dropout_p": 0.0, "enable_gqa": False, "softcap": 0.0, **change}
    attributes = {name: given.pop(name) for name in ("dropout_p", "enable_gqa", "softcap")}
    case = Case(op_named("attention"), given, attributes, DelayedScaling(), torch.device("cpu"), trains=True)
    assert reason in IMPLEMENTATION.unsupported(case)


# --- traced, as a node of Dynamo's graph


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_traced_by_aot_autograd_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    function = torch._dynamo.allow_in_graph(lambda *a, **k: attention(*a, **k))
    linear = torch.nn.Linear(64, 3 * 64)

    def model(x, scale, sink):
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in linear(x).chunk(3, -1))
        o, amax = function(q, k, v, None, scale, sink, start=2, grad_start=7, causal=True, quantize_output=True)
        return o.transpose(1, 2).flatten(2) * 2, amax.detach()

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    scale = torch.cat([torch.zeros(2), torch.full((8,), 32.0)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s in (12, 20, 33):
            x = gaussian(2, s, 64, seed=s)
            results = []
            for run in (model, compiled):
                leaf, sink = x.clone().requires_grad_(), torch.zeros(3, requires_grad=True)
                o, amax = run(leaf, scale, sink)
                results.append([o.detach(), amax, *torch.autograd.grad(o.square().sum(), [leaf, sink, *linear.parameters()])])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(eager, traced)


def test_without_gradients_only_the_forward_operation_is_in_the_graph():
    graphs = []

    def backend(gm, inputs):
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=lambda g, _: graphs.append(g) or g.forward)(gm, inputs)

    torch._dynamo.reset()
    q, k, v = qkv(s=16)
    with torch.no_grad():
        function = torch._dynamo.allow_in_graph(lambda *x: attention(*x))
        torch.compile(lambda *x: function(*x)[0], backend=backend, fullgraph=True)(q, k, v)
    (graph,) = graphs
    assert [n.target for n in graph.graph.nodes if str(n.target).startswith("te_dynamo")] == [OPS.site_fwd.default]
