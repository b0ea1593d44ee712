"""TE's fused attention behind te_dynamo's operators: against torch's attention and te.DotProductAttention, and in whole models."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.lowering.site import site
from te_dynamo.lowering.te import attention as kernels
from te_dynamo.lowering.te.attention_limits import AttentionCase, refused
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling
from te_dynamo.sites import Site
from tests import te_on_cpu
from tests.calls import attention_call
from tests.numerics import sqnr

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
APART = ("bshd_bshd_bshd", "sbhd_sbhd_sbhd")
ENDS = torch.tensor([0, 20, 44], dtype=torch.int32)  # two sequences of 20 and 24 tokens, and four tokens that are in none
PACKED = ("bs3hd", "bsh3d", "sb3hd", "sbh3d")


@pytest.fixture(scope="module", autouse=True)
def te() -> Any:
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    return te_on_cpu.install()


def te_attention(
    q: Tensor, k: Tensor, v: Tensor, *given: Any, layout: str, causal: bool, softmax_scale: Any = None, recipe: str = ""
) -> list:
    """TE's attention as a graph calls it. given: scales, gradients' scales, sink."""
    how = {"causal": causal, "softmax_scale": softmax_scale, "qkv_layout": layout, "form": layout[:2] + "hd"}
    call = attention_call(q, k, v, provider="te", recipe=recipe, records=bool(recipe), calibrating=False, **how)
    return site(call.key, [q, k, v, None, None, ()], *given)


def qkv_in(layout: str, heads: int = 4, kv_heads: int = 4, d: int = 16, b: int = 2, s: int = 24) -> tuple[list[Tensor], list[Tensor]]:
    """(the leaves that get a gradient; q, k and v [B, H, S, D] in `layout`)."""
    a, c = (b, s) if layout.startswith("b") else (s, b)
    if "3" in layout:
        interleaved = layout.endswith("h3d")
        leaves = [torch.randn(a, c, *((heads, 3) if interleaved else (3, heads)), d).bfloat16().requires_grad_()]
        three = leaves[0].unbind(-2 if interleaved else -3)
    else:
        leaves = three = [torch.randn(a, c, h, d).bfloat16().requires_grad_() for h in (heads, kv_heads, kv_heads)]
    return leaves, [t.permute((0, 2, 1, 3) if layout.startswith("b") else (1, 2, 0, 3)) for t in three]


# --- in 16 bits


@pytest.mark.parametrize(("causal", "scale"), [(False, None), (True, None), (True, 0.7)])
@pytest.mark.parametrize("layout", [*APART, *PACKED])
def test_it_is_attention(layout, causal, scale):
    torch.manual_seed(0)
    leaves, qkv = qkv_in(layout, kv_heads=4 if "3" in layout else 2)
    (o,) = te_attention(*qkv, layout=layout, causal=causal, softmax_scale=scale)
    expected = scaled_dot_product_attention(*(t.float() for t in qkv), is_causal=causal, scale=scale, enable_gqa=True)
    do = torch.randn_like(expected)
    assert sqnr(expected, o.float()) > 50  # bf16 rounds at 2**-9: 55 dB
    ours = torch.autograd.grad(o, leaves, do.bfloat16(), retain_graph=True)
    for gradient, wanted in zip(ours, torch.autograd.grad(expected, leaves, do), strict=True):
        assert sqnr(wanted, gradient) > 45


def test_packed_parts_that_lie_elsewhere_are_copied():
    torch.manual_seed(0)
    _, (q, k, v) = qkv_in("bs3hd")
    parts = [t.transpose(1, 2).detach() for t in (q, k, v)]
    # The strides of a packed layout, but separate memory for each tensor.
    apart = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in parts]
    assert kernels.as_claimed(*parts, "bs3hd")[1] == "bs3hd"
    assert kernels.as_claimed(*apart, "bs3hd")[1] == "bshd_bshd_bshd"
    run = torch.ops.te_dynamo.te_attention_fwd
    packed, other = (run(*three, "bs3hd", True, 0.25, True) for three in (parts, apart))
    assert torch.equal(packed[0], other[0])
    do = torch.randn_like(packed[0])
    back = torch.ops.te_dynamo.te_attention_bwd
    (a,), (b,) = (back(do, *three, *out, "bs3hd", True, 0.25) for three, out in ((parts, packed), (apart, other)))
    assert torch.equal(a, b)


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.te_dynamo
    torch.manual_seed(0)
    _, qkv = qkv_in("bshd_bshd_bshd", kv_heads=2)
    q, k, v = (t.transpose(1, 2).detach() for t in qkv)
    out = ops.te_attention_fwd(q, k, v, APART[0], True, 0.25, True)
    do = torch.randn_like(out[0])
    flat, packed = [t.flatten(0, 1) for t in (q, k, v)], ("thd_thd_thd", True, 0.25)
    thd = ops.te_attention_fwd(*flat, *packed, True, -1, ENDS, 24)
    one = torch.ones(())
    _, big = qkv_in("bshd_bshd_bshd", heads=2, kv_heads=2, d=128)
    q8, k8, v8 = (t.transpose(1, 2).detach().to(E4M3) for t in big)
    scales = ([one.clone() for _ in range(3)], torch.tensor(448.0), torch.tensor(64.0))
    o8, *aux, _ = ops.te_fp8_attention_fwd(q8, k8, v8, *scales, APART[0], True, 0.1, torch.bfloat16, True)
    do8 = torch.randn(o8.shape).to(E5M2)
    return {
        "forward": (ops.te_attention_fwd, (q, k, v, APART[0], True, 0.25, True)),
        "inference": (ops.te_attention_fwd, (q, k, v, APART[0], False, 0.25, False)),
        "backward": (ops.te_attention_bwd, (do, q, k, v, *out, APART[0], True, 0.25)),
        "thd forward": (ops.te_attention_fwd, (*flat, *packed, True, -1, ENDS, 24)),
        "thd inference": (ops.te_attention_fwd, (*flat, *packed, False, -1, ENDS, 24)),
        "thd backward": (ops.te_attention_bwd, (do.flatten(0, 1), *flat, *thd, *packed, -1, ENDS, 24)),
        "fp8 forward": (ops.te_fp8_attention_fwd, (q8, k8, v8, *scales, APART[0], True, 0.1, torch.bfloat16, True)),
        "fp8 inference": (ops.te_fp8_attention_fwd, (q8, k8, v8, *scales, APART[0], True, 0.1, torch.bfloat16, False)),
        "fp8 backward": (
            ops.te_fp8_attention_bwd,
            (do8, q8, k8, v8, o8, *aux, *(one.clone() for _ in range(6)), APART[0], True, 0.1, torch.bfloat16),
        ),
    }


SAMPLES = (
    "forward",
    "inference",
    "backward",
    "thd forward",
    "thd inference",
    "thd backward",
    "fp8 forward",
    "fp8 inference",
    "fp8 backward",
)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, monkeypatch):
    allclose = torch.allclose  # cannot compare FP8
    monkeypatch.setattr(
        torch, "allclose", lambda a, b, **k: allclose(*(t.view(torch.uint8) if t.itemsize == 1 else t for t in (a, b)), **k)
    )
    op, args = samples()[name]
    torch.library.opcheck(op.default, args)


def test_flops():
    rows = 2 * 2 * 24 * 24  # 2 x batch x queries x keys
    expected = {"forward": rows * 4 * 32, "backward": rows * 4 * 16 * 5}
    expected |= {f"thd {name}": flops for name, flops in expected.items()}
    expected |= {"fp8 forward": rows * 2 * 256, "fp8 backward": rows * 2 * 640}
    for name, flops in expected.items():
        op, args = samples()[name]
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() == flops, name


# --- in FP8, against TE's own module


def test_in_fp8_it_is_te_s_dot_product_attention(te, monkeypatch):
    """With the scales of TE's module, outputs, gradients and the recorded amaxes are bitwise equal."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.constants import FP8BwdTensorIdx, FP8FwdTensorIdx

    for name in ("NVTE_FLASH_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "0")
    torch.manual_seed(0)
    heads, d, b, s = 2, 128, 2, 32
    with te_on_cpu.cuda_is_cpu():
        theirs = te.DotProductAttention(heads, d, qkv_format="bshd", attn_mask_type="causal", attention_dropout=0.0)
    recipe, key = DelayedScaling(fp8_dpa=True, amax_history_len=8), te_dynamo.recipe.DelayedScaling(like_te=True).key
    forward = (FP8FwdTensorIdx.GEMM1_OUTPUT,) * 3 + (FP8FwdTensorIdx.GEMM3_OUTPUT, FP8FwdTensorIdx.GEMM2_INPUT)
    backward = (FP8BwdTensorIdx.GRAD_INPUT2, FP8BwdTensorIdx.GRAD_INPUT3, FP8BwdTensorIdx.GRAD_OUTPUT1)
    for step in range(12):
        qkv = [(torch.randn(b, s, heads, d) * 4.0 ** (step % 5 - 2)).bfloat16() for _ in range(3)]
        do = torch.randn(b, s, heads, d).bfloat16() * 10.0 ** (step % 4 - 2)
        ours, other = ([t.clone().requires_grad_() for t in qkv] for _ in range(2))
        scales = []
        for which, places in (("scaling_fwd", forward), ("scaling_bwd", backward)):
            state = theirs.fp8_meta.get(which)
            values = [torch.ones(()) if state is None else state.scale[int(i)].clone() for i in places]
            scales.append((values, [v.reciprocal() for v in values]))
        sink = torch.zeros(3, requires_grad=True)
        o, recorded = te_attention(*(t.transpose(1, 2) for t in ours), *scales, sink, layout="bshd_bshd_bshd", causal=True, recipe=key)
        o = o.transpose(1, 2)
        o.backward(do)
        with te_on_cpu.cuda_is_cpu():
            with te.autocast(enabled=True, recipe=recipe):
                z = theirs(*other)
            z.backward(do.flatten(2))
        assert torch.equal(o.flatten(2), z), step
        for mine, yours in zip(ours, other, strict=True):
            assert torch.equal(mine.grad, yours.grad), step
        # Rolled when the autocast ended: the newest is last. Only TE's other modules roll the gradients' state.
        history = theirs.fp8_meta["scaling_fwd"].amax_history[-1]
        assert [recorded[:3].max(), *recorded[3:]] == [history[int(i)] for i in forward[2:]], step
        state = theirs.fp8_meta["scaling_bwd"]
        assert sink.grad.tolist() == [state.amax_history[0][int(i)] for i in backward], step
        state.amax_history.zero_()
        state.scale.copy_(torch.rand(state.scale.shape) * 2.0 ** (step % 7))


# --- which it takes


def case(**changed: Any) -> AttentionCase:
    return AttentionCase(
        **{
            "dtype": torch.bfloat16,
            "head_qk": 128,
            "head_v": 128,
            "s_q": 64,
            "s_kv": 64,
            "causal": True,
            "mask": False,
            "dropout": 0.0,
            "trains": True,
            "in_fp8": False,
            "capability": (9, 0),
            "cudnn": 92400,
        }
        | changed
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"in_fp8": True}, None),
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"mask": True}, "neither causal nor a window"),
        ({"dropout": 0.1}, "random numbers"),
        ({"s_kv": 80}, "unequal lengths"),
        ({"s_kv": 80, "causal": False}, None),
        ({"cudnn": 91000}, "9.10.0"),
        ({"capability": (7, 5)}, "8.0"),
        ({"head_qk": 60}, "60 and 128 are not multiples of 8"),
        ({"head_qk": 256, "head_v": 256}, None),
        ({"head_qk": 256, "head_v": 256, "capability": (8, 0)}, "over 128 on compute capability 9.0 alone"),
        ({"head_qk": 512, "head_v": 512}, "over 256"),
        ({"in_fp8": True, "head_qk": 64, "head_v": 64}, "trains with head size 128 on Hopper, not 64 and 64"),
        ({"in_fp8": True, "head_qk": 64, "head_v": 64, "trains": False}, None),
        ({"in_fp8": True, "head_qk": 64, "head_v": 64, "capability": (10, 0)}, None),
        ({"capability": (12, 0), "cudnn": 91200}, "needs cuDNN 9.18.1"),
        ({"capability": (12, 0)}, None),
        ({"capability": (12, 0), "deterministic": True}, "no deterministic backward"),
        ({"capability": (10, 0), "deterministic": True, "cudnn": 91200, "s_kv": 128, "s_q": 128}, "no deterministic backward"),
        ({"capability": (9, 0), "deterministic": True}, None),
        ({"cudnn": 91500}, "64 keys, no multiple of 128"),
        ({"cudnn": 91500, "s_q": 128, "s_kv": 128}, None),
        ({"cudnn": 91500, "trains": False}, None),
        ({"thd": True}, None),
        ({"thd": True, "capability": (8, 9)}, "different lengths it needs compute capability 9.0"),
        ({"thd": True, "cudnn": 90500}, "different lengths it needs cuDNN 9.6"),
        ({"in_fp8": True, "capability": (8, 9)}, "9.0"),
        ({"in_fp8": True, "cudnn": 90500}, "cuDNN 9.7"),
        ({"in_fp8": True, "head_qk": 192, "head_v": 192, "capability": (10, 0)}, "192"),
    ],
)
def test_what_is_refused(changed, words):
    reason = refused(case(**changed))
    assert reason is None if words is None else reason is not None and words in reason


def test_nothing_is_promised_that_te_refuses():
    """Wherever our table says yes, so does tex.get_fused_attn_backend."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.constants import TE_DType

    dtypes, sizes = (torch.bfloat16, torch.float16), (8, 16, 40, 64, 96, 128, 192, 256, 512)
    asked = itertools.product(dtypes, sizes, (True, False), (True, False), (True, False), ((8, 0), (9, 0), (10, 0)))
    taken = 0
    for dtype, size, causal, trains, in_fp8, capability in asked:
        this = case(dtype=dtype, head_qk=size, head_v=size, causal=causal, trains=trains, in_fp8=in_fp8, capability=capability)
        if refused(this) is not None:
            continue
        taken += 1
        layout = tex.NVTE_QKV_Layout.NVTE_BSHD_BSHD_BSHD
        parameters = SimpleNamespace(
            is_training=trains,
            qkv_dtype=TE_DType[E4M3 if in_fp8 else dtype],
            qkv_layout=layout,
            bias_type=tex.NVTE_Bias_Type.NVTE_NO_BIAS,
            attn_mask_type=tex.NVTE_Mask_Type.NVTE_CAUSAL_MASK if causal else tex.NVTE_Mask_Type.NVTE_NO_MASK,
            dropout=0.0,
            head_dim_qk=size,
            head_dim_v=size,
            max_seqlen_q=64,
            max_seqlen_kv=64,
            window_size_left=-1,
            window_size_right=0 if causal else -1,
            return_max_logit=False,
            deterministic=False,
        )
        with te_on_cpu.cuda_is_cpu(capability):
            backend, why = tex.get_fused_attn_backend(parameters)
        assert backend != tex.NVTE_Fused_Attn_Backend.NVTE_No_Backend, (this, why)
    assert taken > 40


# --- in whole models


class SelfAttention(nn.Module):
    def __init__(
        self,
        width: int = 64,
        heads: int = 4,
        packed: bool = False,
        scaled: bool = False,
        rope: bool = False,
        window: int = 0,
        lengths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.register_buffer("lengths", torch.tensor(lengths) if lengths else None)
        self.heads, self.packed, self.scaled, self.rope, self.window = heads, packed, scaled, rope, window
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        apart = (linear(x) for linear in (self.q, self.k, self.v))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.qkv(x).chunk(3, -1) if self.packed else apart))
        if self.scaled:
            q, k = q * 1.5, k * 0.5
        if self.rope:
            q, k = turned(q), turned(k)
        if self.lengths is not None:
            valid = torch.arange(x.shape[1]) < self.lengths[:, None, None, None]
            mask = valid & (torch.arange(x.shape[1]) <= torch.arange(x.shape[1])[:, None])
            return self.o(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        if not self.window:
            return self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
        near = (j <= i) & (i - j < self.window)
        return self.o(scaled_dot_product_attention(q, k, v, attn_mask=near).transpose(1, 2).flatten(2))


def turned(x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2]), 1 / 10 ** torch.linspace(0, 1, x.shape[3] // 2)).repeat(1, 2).to(x.dtype)
    a, b = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-b, a), -1) * angles.sin()


def trained(model: nn.Module, x: Tensor, **options: Any) -> tuple[list[Tensor], Site]:
    """(the output and all gradients after three steps, the attention's site)."""
    torch._dynamo.reset()
    model, seen = copy.deepcopy(model), []
    run = torch.compile(model, backend=te_fp8, fullgraph=True, options=options)
    with observing(lambda gm, sites, _: seen.extend(s for s in sites.taken() if s.kind == "attention")):
        for _ in range(3):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None and not name.startswith("k.bias")]
    return [y.detach(), leaf.grad, *gradients], seen[0]


@pytest.mark.parametrize(
    ("model", "short", "kernel"),
    [
        pytest.param({}, 512, "TE's fused attention, bs3hd", marks=pytest.mark.inductor),
        ({}, 8, "TE's fused attention, bsh3d"),
        ({"packed": True}, 8, "TE's fused attention, bs3hd"),
        ({"scaled": True}, 512, "not TE's: q, k and v are in separate buffers"),
        ({"rope": True}, 512, "TE's fused attention, bs3hd"),
        ({"rope": True}, 8, "TE's fused attention, bsh3d"),
        ({"window": 3}, 512, "TE's fused attention, bs3hd, a window of 3"),
        ({"window": 3, "scaled": True}, 512, "TE's fused attention, bshd_bshd_bshd, a window of 3"),
    ],
)
def test_a_model_whose_gemm_packs_q_k_and_v(model, short, kernel, no_codegen):
    torch.manual_seed(0)
    module, x = SelfAttention(**model).bfloat16(), torch.randn(2, 16, 64).bfloat16()
    ours, site = trained(module, x, provider="te", short_sequence=short)
    assert site.detail["kernel"].startswith(kernel)
    expected, _ = trained(module, x, provider="reference", short_sequence=short)
    assert sqnr(expected[0], ours[0]) > 39  # with RoPE there is one more rounding
    least = min(sqnr(a, b) for a, b in zip(expected, ours, strict=True))
    assert least > (22 if "rope" in model else 25), least  # FP8 amplifies differences in bf16 rounding


@pytest.mark.parametrize("model", [pytest.param({}, marks=pytest.mark.inductor), {"rope": True}])
def test_a_model_that_skips_padding(model, no_codegen):
    torch.manual_seed(0)
    module, x = SelfAttention(lengths=(11, 16, 1), **model).bfloat16(), torch.randn(3, 16, 64).bfloat16()
    ours, site = trained(module, x, provider="te", padding="skip")
    assert site.layout == "thd_thd_thd" and site.detail["kernel"] == "TE's fused attention of the tokens that are no padding"
    expected, other = trained(module, x, provider="reference", padding="skip")
    assert other.layout != "thd_thd_thd" and other.detail["padding"] == site.detail["padding"] == "skipped: its rows give 0"
    assert sqnr(expected[0], ours[0]) > 39
    least = min(sqnr(a, b) for a, b in zip(expected, ours, strict=True))
    assert least > (22 if "rope" in model else 25), least


@pytest.mark.parametrize("attention", ["fp8", "fp8_both"])
def test_a_model_in_fp8(attention, no_codegen):
    torch.manual_seed(0)
    module, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 16, 256).bfloat16()
    ours, site = trained(module, x, provider="te", attention=attention)
    assert site.detail.get("backward") == (None if attention == "fp8_both" else "high precision")
    assert site.detail["kernel"] == "TE's fused attention, bshd_bshd_bshd" and site.recipe == "delayed"
    expected, _ = trained(module, x, provider="te", attention="high_precision")
    assert 18 < sqnr(expected[0], ours[0]) < 30  # it is FP8
    definition, _ = trained(module, x, provider="reference", attention=attention)
    assert all(sqnr(a, b) > 17 for a, b in zip(definition, ours, strict=True))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_in_fp8_under_current_scaling(scale, no_codegen):
    """Forward in FP8 with current scales, without state: as accurate as the definition, which computes the amaxes of S and O first; and no
    element of O saturates, whatever the size of V."""
    torch.manual_seed(0)
    module, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 64, 256).bfloat16()
    with torch.no_grad():
        module.v.weight.mul_(scale)
    ours, site = trained(module, x, provider="te", attention="fp8", recipe="current")
    assert site.detail["kernel"] == "TE's fused attention, bshd_bshd_bshd" and (site.recipe, site.provider) == ("current", "te")
    exact, _ = trained(module, x, provider="te", attention="high_precision", recipe="current")
    definition, _ = trained(module, x, provider="reference", attention="fp8", recipe="current")
    errors = [(sqnr(a, b), sqnr(a, c)) for a, b, c in zip(exact, ours, definition, strict=True)]
    rounds_o = -10 * math.log10(10 ** (-errors[0][1] / 10) + 10**-3.15)  # TE's kernel returns O in FP8, 31.5 dB, the definition does not
    assert rounds_o - 0.5 < errors[0][0] and 18 < errors[0][0] < 30, errors
    assert sum(theirs - mine for mine, theirs in errors) < 2 * len(errors), errors  # a linear's casts amplify differences


def test_in_fp8_q_k_and_v_share_their_scale(no_codegen):
    torch._dynamo.reset()
    model, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 16, 256).bfloat16()
    run = torch.compile(model, backend=te_fp8, options={"provider": "te", "attention": "fp8"})
    for _ in range(2):
        run(x).sum().backward()
    state = te_dynamo.scale_state(model).state_dict()
    assert len({state[f"attention.{name}.scale"].item() for name in "qkv"}) == 1
    assert state["attention.s.scale"] == 448  # the first row of a causal softmax is 1 at its first element


@pytest.mark.parametrize("like_te", [False, True])
def test_forward_and_backward_in_fp8_beside_linears_with_current_scaling(like_te, no_codegen):
    """TE's kernels need the scales of dP and the gradients in advance: the attention gets delayed scales, and alone has state."""
    torch.manual_seed(0)
    module, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 64, 256).bfloat16()
    options = {"provider": "te", "recipe": Float8CurrentScaling(like_te=like_te), "attention": "fp8_both"}
    ours, site = trained(module, x, **options)
    assert (site.recipe, site.provider, site.detail["precision"]) == ("delayed", "te", "fp8")
    assert site.detail["recipe"].startswith("backward's kernels need the scales of dP") and "scale" not in site.detail
    exact, _ = trained(module, x, **options | {"attention": "high_precision"})
    delayed, _ = trained(module, x, **options | {"recipe": DelayedScaling(like_te=like_te)})
    for now, before, other in zip(exact, ours, delayed, strict=True):
        assert sqnr(now, before) > sqnr(now, other) - 2 and 17 < sqnr(now, before) < 35

    torch._dynamo.reset()
    torch.compile(module, backend=te_fp8, options=options)(x).sum().backward()
    scales = [name for name in te_dynamo.scale_state(module).state_dict() if name.endswith(".scale")]
    assert len(scales) == 8 and all(name.startswith("attention.") for name in scales)


def test_a_recipe_that_wants_fp8_attention_under_current_scaling(no_codegen):
    module, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 16, 256).bfloat16()
    _, site = trained(module, x, provider="te", recipe=Float8CurrentScaling(fp8_dpa=True))
    assert (site.recipe, site.detail["precision"]) == ("delayed", "fp8")


@pytest.mark.parametrize("like_te", [False, True])
def test_in_inference_current_scaling_stays_current(like_te, no_codegen):
    """Nothing needs scales in advance there, and those of training would saturate larger inputs. With `like_te` they are TE's."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 64, 256).bfloat16()
    with torch.no_grad():
        module.q.weight.mul_(0.01)  # or larger inputs would make the softmax a maximum
    seen: list[Site] = []
    options = {"provider": "te", "recipe": Float8CurrentScaling(like_te=like_te), "attention": "fp8_both"}
    run = torch.compile(module, backend=te_fp8, fullgraph=True, options=options)
    with observing(lambda gm, sites, _: seen.extend(s for s in sites.taken() if s.kind == "attention")):
        for _ in range(2):
            run(x).float().square().sum().backward()
        with torch.no_grad():
            y = run(16 * x)
    assert [s.recipe for s in seen] == ["delayed", "delayed" if like_te else "current"]
    assert (sqnr(module(16 * x), y) > 20) != like_te


def test_scales_in_advance_need_an_fp8_linear_that_keeps_them(no_codegen):
    module, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 16, 256).bfloat16()
    for recipe in ("current", "delayed"):
        _, site = trained(module, x, provider="te", attention="fp8_both", recipe=recipe, skip=["?"])  # its linears
        assert "kept with the weights of an FP8 linear" in site.detail["kernel"] and site.provider != "te"
        assert (site.detail["precision"], site.recipe) == ("fp8", recipe)  # by its definition


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_fp8_that_te_does_not_have_is_the_definition(recipe, no_codegen):
    module, x = SelfAttention(width=256, heads=4).bfloat16(), torch.randn(2, 16, 256).bfloat16()
    _, site = trained(module, x, provider="te", attention="fp8_both", recipe=recipe)
    assert "head size 128 on Hopper, not 64" in site.detail["kernel"] and (site.detail["precision"], site.recipe) == ("fp8", recipe)
    assert "recipe" not in site.detail


def test_inference():
    torch._dynamo.reset()
    model, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 16, 256).bfloat16()
    run = torch.compile(model, backend=te_fp8, options={"provider": "te", "attention": "fp8"})
    for _ in range(2):
        run(x).sum().backward()
    model.eval()
    with torch.no_grad():
        assert sqnr(model(x), run(x)) > 18


def test_auto_takes_te_for_fp8_attention_alone(monkeypatch, no_codegen):
    monkeypatch.setattr("te_dynamo.passes.plan.te_is_beside", lambda device: True)
    module, x = SelfAttention(width=256, heads=2).bfloat16(), torch.randn(2, 16, 256).bfloat16()
    _, site = trained(module, x, attention="fp8")
    assert site.provider == "te" and site.detail["kernel"].startswith("TE's fused attention")
    _, site = trained(module, x)
    assert site.provider == "native" and "kernel" not in site.detail


@pytest.mark.parametrize("form", ["bshd", "sbhd"])
@pytest.mark.parametrize("causal", [False, True])
def test_in_fp8_keys_that_have_much_in_common(causal, form):
    """Their mean is subtracted, and forward's statistics of the scores, which backward reads, are those after that."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, 128) for _ in range(3))
    k[..., 5] += 30
    exact, ours = [], []
    for found, dtype, run in (
        (exact, torch.float64, lambda *t: scaled_dot_product_attention(*t, is_causal=causal)),
        (ours, torch.bfloat16, lambda *t: current_scaling(*t, causal=causal, form=form)),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = run(*leaves)
        found += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    assert all(sqnr(a, b) > least for a, b, least in zip(exact, ours, (23, 18, 18, 20), strict=True)), [
        sqnr(a, b) for a, b in zip(exact, ours, strict=True)
    ]


def test_in_fp8_a_small_v_beside_large_scores(no_codegen):
    """Under current scaling q, k and v have scales of their own: with one for the three, v would be lost."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 128).bfloat16() for _ in range(3))
    k, v = 20 * k, 1e-5 * v
    found = current_scaling(q / 20, k, v, causal=True, form="bshd")
    assert sqnr(scaled_dot_product_attention(q.double() / 20, k.double(), v.double(), is_causal=True), found) > 23


def current_scaling(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, form: str) -> Tensor:
    how = {"recipe": Float8CurrentScaling().key, "calibrating": False, "records": False}
    call = attention_call(q, k, v, provider="te", op="fp8_forward_attention", causal=causal, form=form, **how)
    (out, *_) = site(call.key, [q, k, v, None, None, []], None, None, None)
    return out
