"""Fused attention against torch's in float64: every layout and mask, forward and backward, FP8, and what is rejected."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests import te_on_cpu
from tests.numerics import sqnr

B, SQ, SKV, H, D = 2, 24, 24, 4, 16

DENSE = (
    "bs3hd", "bsh3d", "bshd_bs2hd", "bshd_bsh2d", "bshd_bshd_bshd", "sb3hd", "sbh3d", "sbhd_sb2hd", "sbhd_sbh2d", "sbhd_sbhd_sbhd",
)  # fmt: skip


def parts_of(layout: str, q: tuple[int, ...], kv: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Random q, k, v of these shapes, as views of the layout's buffers."""
    views = []
    for buffer, shape in zip(layout.split("_"), (q, kv, kv), strict=False):
        count = next((int(c) for c in buffer if c.isdigit()), 1)
        axis = -3 if buffer.endswith(f"{count}hd") else -2
        packed = list(shape)
        if count > 1:
            packed.insert(len(packed) + 1 + axis, count)
        data = torch.randn(packed).to(dtype)
        views += data.unbind(axis) if count > 1 else [data]
    return views


def seen(sq: int, skv: int, mask: str, window: tuple[int, int], bottom_right: bool) -> Tensor:
    """The mask by its definition, one pair of positions after the other."""
    shift = skv - sq if bottom_right or "bottom_right" in mask else 0
    keep = torch.zeros(sq, skv, dtype=torch.bool)
    for i, j in itertools.product(range(sq), range(skv)):
        behind = i + shift - j
        after = window[1] if "causal" not in mask else 0
        keep[i, j] = (window[0] < 0 or behind <= window[0]) and (after < 0 or -behind <= after)
    return keep


def fwd(te: Any, q: Any, k: Any, v: Any, layout: str, mask: str = "no_mask", **more: Any) -> Any:
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_fwd

    kind = layout.split("_")[0].replace("3", "")
    b, sq = (q.shape[0], q.shape[1]) if kind == "bshd" else (q.shape[1], q.shape[0])
    skv = k.shape[1] if kind == "bshd" else k.shape[0]
    cu_q, cu_kv = (torch.arange(0, b + 1, dtype=torch.int32) * s for s in (sq, skv))
    fields = {
        "is_training": True, "max_seqlen_q": sq, "max_seqlen_kv": skv, "cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv,
        "fake_dtype": torch.bfloat16, "fused_attention_backend": FusedAttnBackend.F16_arbitrary_seqlen,
        "qkv_layout": layout, "o_format": kind, "attn_mask_type": mask,
    }  # fmt: skip
    return fused_attn_fwd(q=q, k=k, v=v, **(fields | more))


def bwd(te: Any, q: Any, k: Any, v: Any, o: Any, d_o: Any, aux: list[Tensor], layout: str, mask: str = "no_mask", **more: Any) -> Any:
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd

    kind = layout.split("_")[0].replace("3", "")
    b, sq = (q.shape[0], q.shape[1]) if kind == "bshd" else (q.shape[1], q.shape[0])
    skv = k.shape[1] if kind == "bshd" else k.shape[0]
    cu_q, cu_kv = (torch.arange(0, b + 1, dtype=torch.int32) * s for s in (sq, skv))
    fields = {
        "max_seqlen_q": sq, "max_seqlen_kv": skv, "cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv, "fake_dtype": torch.bfloat16,
        "fused_attention_backend": FusedAttnBackend.F16_arbitrary_seqlen, "qkv_layout": layout, "dqkv_layout": layout,
        "o_format": kind, "do_format": kind, "attn_mask_type": mask,
    }  # fmt: skip
    return fused_attn_bwd(q=q, k=k, v=v, o=o, d_o=d_o, aux_ctx_tensors=aux, **(fields | more))


def reference(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp [b, h, s] and gradients in float64, for [b, h, s, d]. Fully masked rows are zero."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in leaves[1:])
    bias = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    out = scaled_dot_product_attention(leaves[0], keys, values, attn_mask=bias).masked_fill(~keep.any(-1)[..., None], 0)
    out.backward(d_o.double())
    scores = leaves[0] @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    return out.detach(), scores.logsumexp(-1).detach(), [leaf.grad for leaf in leaves]


def heads_first(t: Tensor, layout: str) -> Tensor:
    return t.transpose(1, 2) if layout.startswith("b") else t.permute(1, 2, 0, 3)


def one_rounding(value: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(value.double(), reference, rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("mask", ["no_mask", "causal"])
@pytest.mark.parametrize("layout", DENSE)
def test_a_layout(te, tex, layout, mask):
    torch.manual_seed(0)
    shape = (B, SQ, H, D) if layout.startswith("b") else (SQ, B, H, D)
    q, k, v = parts_of(layout, shape, shape)
    out, aux = fwd(te, q, k, v, layout, mask)
    d_o = torch.randn(shape).bfloat16()
    views = [heads_first(t, layout) for t in (q, k, v, d_o)]
    expected, log_sum, gradients = reference(*views, seen(SQ, SKV, mask, (-1, -1), False))
    assert out.is_contiguous() and out.dtype == torch.bfloat16
    one_rounding(heads_first(out, layout), expected)
    assert aux[0].shape == (B, H, SQ, 1) and aux[0].dtype == torch.float32 and aux[1].dtype == torch.int64
    torch.testing.assert_close(aux[0][..., 0].double(), log_sum, rtol=1e-5, atol=1e-5)
    results = bwd(te, q, k, v, out, d_o, aux, layout, mask)
    for gradient, exact in zip(results[:3], gradients, strict=True):
        torch.testing.assert_close(heads_first(gradient, layout).double(), exact, rtol=2**-5, atol=2e-2)  # O is rounded
        assert sqnr(exact, heads_first(gradient, layout)) > 40
    packed = [t for t in results[:3] if not t.is_contiguous()]
    assert len(packed) == (3 if "3" in layout else 2 if "2" in layout else 0)
    assert len({t.untyped_storage().data_ptr() for t in packed}) <= 1


@pytest.mark.parametrize(
    ("mask", "window", "bottom_right"),
    [
        ("causal_bottom_right", (-1, -1), None),
        ("causal", (5, 0), None),
        ("no_mask", (3, 2), False),
        ("no_mask", (3, 2), True),
        ("causal_bottom_right", (4, 0), None),
    ],
)
@pytest.mark.parametrize("sq", [16, 24])
def test_a_band_and_grouped_heads(te, tex, mask, window, bottom_right, sq):
    torch.manual_seed(1)
    layout = "bshd_bshd_bshd"
    q, k, v = parts_of(layout, (B, sq, H, D), (B, 24, 2, D))
    more = {"window_size": window, "bottom_right_diagonal": bottom_right}
    out, aux = fwd(te, q, k, v, layout, mask, **more)
    d_o = torch.randn_like(out)
    expected, _, gradients = reference(*(t.transpose(1, 2) for t in (q, k, v, d_o)), seen(sq, 24, mask, window, bool(bottom_right)))
    one_rounding(out.transpose(1, 2), expected)
    for gradient, exact in zip(bwd(te, q, k, v, out, d_o, aux, layout, mask, **more)[:3], gradients, strict=True):
        assert gradient.shape == exact.transpose(1, 2).shape and sqnr(exact, gradient.transpose(1, 2)) > 40


@pytest.mark.parametrize("mask", ["padding", "padding_causal", "padding_causal_bottom_right"])
@pytest.mark.parametrize("format", ["bshd", "sbhd", "thd", "thd with gaps"])
def test_samples_of_different_lengths(te, tex, format, mask):
    """Each sample's result is as if it were alone; there are zeros between them."""
    torch.manual_seed(2)
    lengths_q, lengths_kv = [9, 16], [12, 20]
    gap = 3 if "gaps" in format else 0
    format = format.split()[0]
    cu_q, cu_kv = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_kv))
    padded_q, padded_kv = (cu + torch.tensor([0, gap, 2 * gap]).int() for cu in (cu_q, cu_kv))
    sizes = {"bshd": lambda s, t: (B, s, H, D), "sbhd": lambda s, t: (s, B, H, D), "thd": lambda s, t: (t, H, D)}[format]
    q, k, v = parts_of("_".join([format] * 3), sizes(20, padded_q[-1].item()), sizes(24, padded_kv[-1].item()))
    more = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv, "max_seqlen_q": 20, "max_seqlen_kv": 24, "o_format": format}
    if gap:
        more |= {"cu_seqlens_q_padded": padded_q, "cu_seqlens_kv_padded": padded_kv}
    layout = "_".join([format] * 3)
    out, aux = fwd(te, q, k, v, layout, mask, **more)
    d_o = torch.randn_like(out)
    results = bwd(te, q, k, v, out, d_o, aux, layout, mask, **more, do_format=format)[:3]
    assert aux[0].shape == ((q.shape[0], H, 1) if format == "thd" else (B, H, 20, 1))

    def rows(t: Tensor, sample: int, lengths: list[int], starts: Tensor) -> Tensor:
        if format == "thd":
            return t[starts[sample] : starts[sample] + lengths[sample]].transpose(0, 1)[None]
        own = t[sample] if format == "bshd" else t[:, sample]
        return own[: lengths[sample]].transpose(0, 1)[None]

    total = 0.0
    for sample in range(B):
        queries, keys = ((sample, lengths, starts) for lengths, starts in ((lengths_q, padded_q), (lengths_kv, padded_kv)))
        keep = seen(lengths_q[sample], lengths_kv[sample], mask, (-1, -1), False)
        expected, _, gradients = reference(rows(q, *queries), rows(k, *keys), rows(v, *keys), rows(d_o, *queries), keep)
        one_rounding(rows(out, *queries), expected)
        for gradient, exact, where in zip(results, gradients, (queries, keys, keys), strict=True):
            assert sqnr(exact, rows(gradient, *where)) > 40
        total += rows(out, *queries).double().abs().sum().item()
    assert out.double().abs().sum().item() == pytest.approx(total)


@pytest.mark.parametrize("softmax", ["off-by-one", "learnable"])
def test_a_sink(te, tex, softmax):
    """A key without a value: one more column of scores."""
    torch.manual_seed(3)
    layout = "bshd_bshd_bshd"
    q, k, v = parts_of(layout, (B, SQ, H, D), (B, SKV, H, D))
    offset = torch.randn(1, H, 1, 1) if softmax == "learnable" else torch.zeros(1, H, 1, 1)
    leaves = [t.detach().double().requires_grad_() for t in (*(t.transpose(1, 2) for t in (q, k, v)), offset)]
    scores = leaves[0] @ leaves[1].transpose(-1, -2) / D**0.5
    expected = torch.cat([scores, leaves[3].expand(B, H, SQ, 1)], -1).softmax(-1)[..., :-1] @ leaves[2]
    out, aux = fwd(te, q, k, v, layout, softmax_type=softmax, softmax_offset=offset)
    d_o = torch.randn_like(out)
    expected.backward(d_o.transpose(1, 2).double())
    one_rounding(out.transpose(1, 2), expected.detach())
    *gradients, _, offset_grad = bwd(te, q, k, v, out, d_o, aux, layout, softmax_type=softmax)
    for gradient, leaf in zip(gradients, leaves, strict=False):
        assert sqnr(leaf.grad, gradient.transpose(1, 2)) > 40
    assert sqnr(leaves[3].grad, offset_grad) > 30


def test_a_bias_and_the_largest_scores(te, tex):
    torch.manual_seed(4)
    layout = "bshd_bshd_bshd"
    q, k, v = parts_of(layout, (B, SQ, H, D), (B, SKV, H, D))
    bias = torch.randn(1, H, SQ, SKV).bfloat16()
    leaves = [t.detach().double().requires_grad_() for t in (*(t.transpose(1, 2) for t in (q, k, v)), bias)]
    scores = leaves[0] @ leaves[1].transpose(-1, -2) / D**0.5 + leaves[3]
    expected = scores.softmax(-1) @ leaves[2]
    out, aux, largest = fwd(te, q, k, v, layout, attn_bias=bias, attn_bias_type="post_scale_bias", return_max_logit=True)
    d_o = torch.randn_like(out)
    expected.backward(d_o.transpose(1, 2).double())
    one_rounding(out.transpose(1, 2), expected.detach())
    one_rounding(largest, scores.amax((0, 2, 3)).detach())
    bias_grad = bwd(te, q, k, v, out, d_o, aux, layout, attn_bias_type="post_scale_bias")[3]
    assert bias_grad.shape == bias.shape and sqnr(leaves[3].grad, bias_grad) > 40


def fp8(te: Any, dtype: int, scale: float = 1.0) -> Any:
    quantizer = te.Float8Quantizer(torch.tensor([scale]), torch.zeros(1), te.DType(dtype))
    quantizer.set_usage(rowwise=True, columnwise=False)
    return quantizer


@pytest.mark.parametrize("delayed", [True, False], ids=["delayed", "current"])
@pytest.mark.parametrize("layout", ["bs3hd", "sbhd_sbhd_sbhd"])
def test_in_fp8(te, tex, layout, delayed):
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    torch.manual_seed(5)
    shape = (B, 64, H, D) if layout.startswith("b") else (64, B, H, D)
    exact = parts_of(layout, shape, shape)
    data = [t.clone() for t in exact]
    views = parts_of(layout, shape, shape, torch.uint8)
    quantized = [fp8(te, 7, 100.0)(t) for t in data]
    for view, q in zip(views, quantized, strict=True):
        view.copy_(q._data)
        q._data = view
    s, o, dp, dqkv = fp8(te, 7, 448.0), fp8(te, 7, 100.0), fp8(te, 8, 1000.0), fp8(te, 8, 1000.0)
    backend = {"fused_attention_backend": FusedAttnBackend.FP8, "s_quantizer": s}
    current = te.Float8CurrentScalingQuantizer(te.DType(8), "cuda")
    out, aux = fwd(te, *quantized, layout, "causal", **backend, o_quantizer=o if delayed else current)
    d_o = torch.randn(shape).bfloat16()
    d_fp8 = fp8(te, 8, 1000.0)(d_o)
    results = bwd(
        te, *quantized, out, d_fp8, aux, layout, "causal", **backend, dp_quantizer=dp, dqkv_quantizer=dqkv if delayed else current
    )
    for q in (out, *results[:3]):
        assert hasattr(q, "_data") == delayed
    values = [q.dequantize() if delayed else q for q in (out, *results[:3])]
    keep = seen(64, 64, "causal", (-1, -1), False)
    expected, _, gradients = reference(*(heads_first(t, layout) for t in (*exact, d_o)), keep)
    noise = [sqnr(wanted, heads_first(value, layout)) for value, wanted in zip(values, (expected, *gradients), strict=True)]
    assert 24 < noise[0] < 34 and all(16 < n < 30 for n in noise[1:]), noise
    assert s.amax == 1 and dp.amax > 0  # the first query only attends to itself
    if delayed:
        assert o.amax.item() == pytest.approx(expected.abs().max().item(), rel=0.1)
        assert dqkv.amax.item() == pytest.approx(max(g.abs().max().item() for g in gradients), rel=0.25)
        assert len({q._data.untyped_storage().data_ptr() for q in results[:3]}) == (1 if layout == "bs3hd" else 3)


def test_a_lie_about_memory_is_refused(te, tex):
    q, k, v = parts_of("bs3hd", (B, SQ, H, D), (B, SQ, H, D))
    for layout in ("bsh3d", "bshd_bshd_bshd", "bshd_bs2hd"):
        with pytest.raises(RuntimeError, match="elements behind the first"):
            fwd(te, q, k, v, layout)
    with pytest.raises(RuntimeError, match="elements behind the first"):
        fwd(te, k, q, v, "bs3hd")
    with pytest.raises(RuntimeError, match="in bshd of 2 sequences up to 32 long"):
        fwd(te, q, k, v, "bs3hd", max_seqlen_q=32)
    with pytest.raises(RuntimeError, match="takes FP8, float16 and bfloat16"):
        fwd(te, *parts_of("bs3hd", (B, SQ, H, D), (B, SQ, H, D), torch.float32), "bs3hd")
    with pytest.raises(RuntimeError, match="cu_seqlens are int32"):
        fwd(te, q, k, v, "bs3hd", cu_seqlens_q=torch.tensor([0, SQ, 2 * SQ]))


def test_what_has_no_stand_in(te, tex):
    q, k, v = parts_of("bs3hd", (B, SQ, H, D), (B, SQ, H, D))
    with pytest.raises(NotImplementedError, match="dropout"):
        fwd(te, q, k, v, "bs3hd", dropout=0.1)
    with pytest.raises(NotImplementedError, match="ALIBI"):
        fwd(te, q, k, v, "bs3hd", "causal", attn_bias_type="alibi")


def backend(te: Any, tex: Any, **fields: Any) -> tuple[str, str]:
    from transformer_engine.pytorch.attention.dot_product_attention.utils import FusedAttentionParams

    defaults = {"head_dim_qk": 128, "head_dim_v": 128, "max_seqlen_q": 512, "max_seqlen_kv": 512, "num_attn_heads": 8, "num_gqa_groups": 8}
    layout, mask, bias = fields.pop("layout", "BSHD_BSHD_BSHD"), fields.pop("mask", "CAUSAL_MASK"), fields.pop("bias", "NO_BIAS")
    found, reason = tex.get_fused_attn_backend(
        FusedAttentionParams(
            **(defaults | fields),
            qkv_layout=tex.NVTE_QKV_Layout[f"NVTE_{layout}"],
            attn_mask_type=tex.NVTE_Mask_Type[f"NVTE_{mask}"],
            bias_type=tex.NVTE_Bias_Type[f"NVTE_{bias}"],
        )
    )
    assert bool(reason) == (found.name == "NVTE_No_Backend")
    return found.name.removeprefix("NVTE_"), reason


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({}, True),
        ({"head_dim_qk": 64, "head_dim_v": 64}, True),
        ({"head_dim_qk": 60, "head_dim_v": 60}, False),
        ({"head_dim_qk": 256, "head_dim_v": 256}, True),
        ({"head_dim_qk": 264, "head_dim_v": 264}, False),
        ({"head_dim_qk": 264, "head_dim_v": 264, "is_training": False}, True),
        ({"head_dim_qk": 192, "head_dim_v": 128}, True),
        ({"head_dim_qk": 256, "head_dim_v": 128}, False),
        ({"mask": "CAUSAL_BOTTOM_RIGHT_MASK", "max_seqlen_q": 1024}, False),
        ({"layout": "T3HD"}, False),
        ({"layout": "T3HD", "mask": "PADDING_CAUSAL_MASK"}, True),
        ({"mask": "PADDING_MASK", "dropout": 0.1}, False),
        ({"mask": "PADDING_MASK", "bias": "POST_SCALE_BIAS"}, False),
        ({"bias": "POST_SCALE_BIAS"}, True),
        ({"bias": "PRE_SCALE_BIAS"}, False),
        ({"window_size_left": 64, "window_size_right": 0}, True),
        ({"window_size_left": 64, "window_size_right": 0, "max_seqlen_q": 1024}, False),
    ],
)
def test_which_attention_a_hopper_has_in_16_bits(te, tex, fields, has):
    assert backend(te, tex, **fields)[0] == ("F16_arbitrary_seqlen" if has else "No_Backend")
    assert backend(te, tex, **fields, qkv_dtype=te.DType.kFloat32)[0] == "No_Backend"


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({}, True),
        ({"head_dim_qk": 64, "head_dim_v": 64}, False),
        ({"head_dim_qk": 64, "head_dim_v": 64, "is_training": False}, True),
        ({"mask": "PADDING_CAUSAL_MASK"}, True),
        ({"mask": "CAUSAL_BOTTOM_RIGHT_MASK"}, False),
        ({"layout": "T3HD", "mask": "PADDING_CAUSAL_MASK"}, False),
        ({"bias": "POST_SCALE_BIAS"}, False),
        ({"layout": "SBH3D", "mask": "NO_MASK"}, True),
    ],
)
def test_which_attention_a_hopper_has_in_fp8(te, tex, fields, has):
    assert backend(te, tex, **fields, qkv_dtype=te.DType.kFloat8E4M3)[0] == ("FP8" if has else "No_Backend")


def test_a_blackwell_trains_smaller_heads_in_fp8(te, tex):
    small = {"head_dim_qk": 64, "head_dim_v": 64, "qkv_dtype": te.DType.kFloat8E4M3}
    assert backend(te, tex, **small)[0] == "No_Backend"
    with te_on_cpu.cuda_is_cpu((10, 0)):
        assert backend(te, tex, **small)[0] == "FP8"


def test_sequences_change_format(te, tex):
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    thd = torch.randn(8, H, D)
    bshd = tex.convert_thd_to_bshd(thd, cu, 2, 6)
    assert torch.equal(bshd[0, :3], thd[:3]) and torch.equal(bshd[1, :5], thd[3:]) and bshd[0, 3:].eq(0).all()
    assert torch.equal(tex.convert_bshd_to_thd(bshd, cu, 8), thd)
    together = torch.randn(6, 2, H, 3 * D).bfloat16()
    q, k, v = tex.fa_prepare_fwd(together[..., :D])
    assert torch.equal(k, together[..., D : 2 * D].transpose(0, 1))
    back = tex.fa_prepare_bwd(*(t.transpose(0, 1).contiguous() for t in (q, k, v)))
    assert torch.equal(back, together.transpose(0, 1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("format", ["sbhd", "bshd", "thd"])
def test_rotary_embeddings(te, tex, format, interleaved):
    """Against complex multiplication."""
    lengths, angles = [5, 8], torch.rand(16, 1, 1, 8) * 6
    cu = torch.tensor([0, 5, 13], dtype=torch.int32)
    x = torch.randn({"sbhd": (8, 2, H, D), "bshd": (2, 8, H, D), "thd": (13, H, D)}[format])
    expected = x.double().clone()
    for sample, (begin, length) in enumerate(zip(cu.tolist(), lengths if format == "thd" else [8, 8], strict=False)):
        own = {"sbhd": expected[:, sample], "bshd": expected[sample], "thd": expected[begin : begin + length]}[format]
        pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
        for real, imaginary in pairs:
            angle = angles[:length, 0, 0, real].double()
            turned = torch.complex(own[..., real], own[..., imaginary]) * torch.polar(torch.ones_like(angle), angle)[:, None]
            own[..., real], own[..., imaginary] = turned.real, turned.imag
    arguments = (tex.NVTE_QKV_Format[f"NVTE_{format.upper()}"], interleaved, cu if format == "thd" else None, 1, 0)
    out = tex.fused_rope_forward(x, paired(angles, interleaved), None, *arguments)
    torch.testing.assert_close(out.double(), expected)
    torch.testing.assert_close(tex.fused_rope_backward(out, paired(angles, interleaved), None, *arguments), x)


def paired(angles: Tensor, interleaved: bool) -> Tensor:
    """Uses the angle of each pair's first feature for both."""
    if interleaved:
        return angles[..., ::2].repeat_interleave(2, -1)
    return torch.cat([angles[..., :4]] * 2, -1)


def test_the_softmaxes_of_the_unfused_attention(te, tex):
    torch.manual_seed(6)
    scores, mask = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8) < 0.4
    mask[1, 0, 2] = True
    causal = ~torch.ones(8, 8, dtype=torch.bool).tril()
    cases = [
        ("scaled_softmax", torch.zeros(8, 8, dtype=torch.bool), (scores,)),
        ("scaled_masked_softmax", mask, (scores, mask)),
        ("scaled_upper_triang_masked_softmax", causal, (scores.reshape(6, 8, 8),)),
        ("scaled_aligned_causal_masked_softmax", causal, (scores,)),
    ]
    for name, hidden, arguments in cases:
        leaf = scores.double().requires_grad_()
        expected = (leaf * 0.5).masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0)
        results = getattr(tex, f"{name}_forward")(*arguments, 0.5)
        torch.testing.assert_close(results.double().reshape(scores.shape), expected.detach())
        grads = torch.randn_like(scores)
        (expected.nan_to_num() * grads.double()).sum().backward()
        gradient = getattr(tex, f"{name}_backward")(grads.reshape(results.shape), results, 0.5).reshape(scores.shape)
        torch.testing.assert_close(gradient.double(), leaf.grad.nan_to_num(), atol=1e-6, rtol=1e-5)


def test_the_layouts_are_te_s(tex):
    from tests.te_on_cpu.layout import Layout

    for layout in tex.NVTE_QKV_Layout:
        if layout <= 18:
            assert Layout.of(layout).q_format in ("bshd", "sbhd", "thd")
        else:
            with pytest.raises(NotImplementedError, match=layout.name):
                Layout.of(SimpleNamespace(name=layout.name))
