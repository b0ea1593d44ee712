"""Every spelling of a norm: found, left alone where it must be, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from transformers import Gemma3TextConfig, Gemma3TextModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.deberta.modeling_deberta import DebertaLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from te_dynamo import ops
from te_dynamo.ir.graph import tensor
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.raise_norm import NORM_RULES
from te_dynamo.passes.rules import apply
from te_dynamo.sites import Sites
from tests.capture import capture

B, S, D = 2, 8, 8  # S == D: a reduction over the wrong dimension still broadcasts
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Spelling = Callable[[Tensor, Tensor, Tensor], Any]


def data(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (B, S, D)) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    make = [torch.randn(*s, generator=generator) + 0.3 for s in (shape, (D,), (D,))]
    return tuple(t.to(dtype).requires_grad_() for t in make)  # type: ignore[return-value]


def raised(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, list[Node], list[str]]:
    """The graph after the rules, its norms, and the reasons for what was declined. Checks the values and the gradients."""
    gm = capture(fn, *args, **kwargs)
    inputs = gm.meta["example_inputs"]
    canonicalize(gm)
    expected, expected_grads = run(gm, inputs)
    reference, reference_grads = run(gm, [i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs])
    lowest = min((v.dtype for v in map(tensor, gm.graph.nodes) if v is not None and v.is_floating_point()), key=lambda d: d.itemsize)
    sites = Sites(strict=True)
    apply(NORM_RULES, gm, sites)
    gm.graph.lint()
    gm.recompile()
    actual, grads = run(gm, inputs)
    for a, e, r in zip(actual, expected, reference, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        assert_as_good(a, e, r, lowest)
    for a, e, r in zip(grads, expected_grads, reference_grads, strict=True):
        assert a.dtype == e.dtype
        assert_as_good(a, e, r, lowest)
    return gm, [n for n in gm.graph.nodes if n.target is ops.norm], [s.reason or "" for s in sites]


def assert_as_good(actual: Tensor, expected: Tensor, reference: Tensor, lowest: torch.dtype) -> None:
    """Equal to 1e-6; if `lowest` is a low precision, no further from the reference than before, except for one rounding."""
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
    elif lowest.itemsize >= 4:
        assert (actual - expected).abs().max() <= 1e-6 * max(expected.abs().max(), 1.0)
    else:
        error, before = ((t.double() - reference.double()).abs() for t in (actual, expected))
        assert (error <= before.max() + torch.finfo(lowest).eps * reference.double().abs()).all()


def run(gm: GraphModule, inputs: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in inputs]
    out = [o for o in gm(*leaves) if isinstance(o, Tensor)]
    wanted = [i for i in leaves if isinstance(i, Tensor) and i.requires_grad]
    if not wanted or not any(o.requires_grad for o in out):
        return out, []
    loss = sum((o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in out if o.requires_grad)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    return out, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]


def remains(gm: GraphModule) -> list[Any]:
    """The calls in the graph besides norms."""
    return [n.target for n in gm.graph.nodes if n.op.startswith("call") and n.target is not ops.norm]


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def layer(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + EPS)


def llama(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * rms(x.to(torch.float32)).to(x.dtype)


def gemma(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (rms(x.float()) * (1.0 + w.float())).type_as(x)


def t5(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)
    return w * (x.to(w.dtype) if w.dtype in (torch.float16, torch.bfloat16) else x)


def deberta(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * layer(x.float()).to(x.dtype) + b


def two_views(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = x.view(-1, D).float().pow(2).mean(-1, keepdim=True)
    return w * (x.view(-1, D) * torch.rsqrt(variance + EPS)).to(x.dtype)


def var_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    var, mean = torch.var_mean(x.float(), dim=-1, correction=0, keepdim=True)
    return ((x.float() - mean) * torch.rsqrt(var + EPS) * w + b).to(x.dtype)


RMS: dict[str, Spelling] = {
    "F.rms_norm": lambda x, w, b: F.rms_norm(x, (D,), w, EPS),
    "F.rms_norm, keywords": lambda x, w, b: F.rms_norm(x, normalized_shape=[D], eps=EPS, weight=w),
    "F.rms_norm, no eps": lambda x, w, b: F.rms_norm(x, (D,), w),
    "torch.rms_norm": lambda x, w, b: torch.rms_norm(x, (D,), w, EPS),
    "F.rms_norm, weight by hand": lambda x, w, b: F.rms_norm(x, (D,), eps=EPS) * w,
    "llama": llama,
    "gemma": gemma,
    "t5": t5,
    "two views": two_views,
    "mul by itself": lambda x, w, b: w * (x.float() * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + EPS)).to(x.dtype),
    "square": lambda x, w, b: (x.float() * torch.rsqrt(torch.square(x.float()).mean(dim=-1, keepdim=True) + EPS)).to(x.dtype) * w,
    "operator **": lambda x, w, b: w * (x.float() * ((x.float() ** 2).mean(-1, True) + EPS) ** -0.5).to(x.dtype),
    "over sqrt": lambda x, w, b: w * (x.float() / torch.sqrt(EPS + x.float().pow(2).mean((-1,), keepdim=True))).to(x.dtype),
    "times 1 / sqrt": lambda x, w, b: w * (x.float() * (1.0 / (x.float().pow(2).mean(-1, keepdim=True) + EPS).sqrt())).to(x.dtype),
    "reciprocal": lambda x, w, b: w * (x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).sqrt().reciprocal()).to(x.dtype),
    "unsqueeze": lambda x, w, b: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1) + EPS).unsqueeze(-1)).to(x.dtype),
    "indexed by None": lambda x, w, b: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1) + EPS)[..., None]).to(x.dtype),
    "sum": lambda x, w, b: w * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) / D + EPS)).to(x.dtype),
    "mean with dtype": lambda x, w, b: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + EPS)).to(x.dtype),
    "weight first": lambda x, w, b: (w.float() * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype),
    "weight times rsqrt": lambda x, w, b: x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w),
    "weight viewed": lambda x, w, b: rms(x.float()).to(x.dtype) * w.view(1, 1, -1),
    "weight expanded": lambda x, w, b: rms(x.float()).to(x.dtype) * w[None].expand(S, D).unsqueeze(0).contiguous(),
    "weight cast": lambda x, w, b: (w.float() * rms(x.float())).to(x.dtype),
    "contiguous": lambda x, w, b: w * rms(x.contiguous().float()).to(x.dtype).contiguous(),
    "no cast": lambda x, w, b: w * rms(x),
    "no eps": lambda x, w, b: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))).to(x.dtype),
    "1 + weight, no cast": lambda x, w, b: rms(x.float()).to(x.dtype) * (w + 1),
    "1 + weight, in low precision": lambda x, w, b: (rms(x.float()) * (1 + w)).to(x.dtype),
}
LAYER: dict[str, Spelling] = {
    "F.layer_norm": lambda x, w, b: F.layer_norm(x, (D,), w, b, EPS),
    "F.layer_norm, keywords": lambda x, w, b: F.layer_norm(x, weight=w, bias=b, normalized_shape=[D]),
    "F.layer_norm, affine by hand": lambda x, w, b: F.layer_norm(x, (D,)) * w + b,
    "F.layer_norm, 1 + weight": lambda x, w, b: F.layer_norm(x, (D,), 1 + w, b),
    "deberta": deberta,
    "cohere": lambda x, w, b: (w.float() * layer(x.float()) + b.float()).to(x.dtype),
    "var": lambda x, w, b: b + w * ((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()),
    "var, correction": lambda x, w, b: w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)) + b,
    "var_mean": var_mean,
    "weight first": lambda x, w, b: w * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) + b,
    "std": lambda x, w, b: w * ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)) + b,
    "mean of squares": lambda x, w, b: (
        w * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - x.mean(-1, keepdim=True).pow(2) + EPS) + b
    ),
}
WITHOUT_WEIGHT: dict[str, Spelling] = {
    "F.rms_norm": lambda x, w, b: F.rms_norm(x, (D,)),
    "F.layer_norm": lambda x, w, b: F.layer_norm(x, (D,)),
    "rms": lambda x, w, b: rms(x.float()).to(x.dtype),
    "layer": lambda x, w, b: layer(x.float()).type_as(x),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name: str, dtype: torch.dtype):
    _, norms, declined = raised(RMS[name], *data(dtype))
    (norm,) = norms
    assert norm.kwargs["kind"] == "rms" and norm.args[1] is not None and norm.args[2] is None and not declined
    assert norm.kwargs["zero_centered"] == ("gemma" in name or ("1 +" in name and (dtype == torch.float32 or "no cast" in name)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(name: str, dtype: torch.dtype):
    _, norms, declined = raised(LAYER[name], *data(dtype))
    (norm,) = norms
    assert norm.kwargs["kind"] == "layer" and None not in norm.args and not declined


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WITHOUT_WEIGHT)
def test_without_weight(name: str, dtype: torch.dtype):
    gm, norms, _ = raised(WITHOUT_WEIGHT[name], *data(dtype))
    (norm,) = norms
    assert norm.args[1:] == (None, None) and norm.kwargs["out_dtype"] == dtype and not remains(gm)


def over(dim: Any, keepdim: bool = True) -> Spelling:
    return lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(dim, keepdim=keepdim) + EPS)


REFUSED: dict[str, tuple[Spelling, str]] = {
    "another dimension": (over(1), "not the last"),
    "the first and the last": (over((0, 2)), "not the last"),
    "unbiased variance": (lambda x, w, b: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + EPS), "unbiased"),
    "unbiased deviation": (lambda x, w, b: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS), "unbiased"),
    "eps outside": (lambda x, w, b: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS), "outside of the square root"),
    "eps a tensor": (lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + b[0].abs()), "not a constant"),
}
NO_NORM: dict[str, Spelling] = {
    "no keepdim": lambda x, w, b: x[0] * torch.rsqrt(x[0].pow(2).mean(-1) + EPS),
    "keepdim in the wrong place": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(1) + EPS),
    "of another value": lambda x, w, b: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "rounded before the statistics": lambda x, w, b: x * torch.rsqrt(x.bfloat16().float().pow(2).mean(-1, keepdim=True) + EPS),
    "cubed": lambda x, w, b: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS),
    "a sum": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "a sum over another length": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (D - 1) + EPS),
    "not a root": lambda x, w, b: x / (x.pow(2).mean(-1, keepdim=True) + EPS),
    "two moments": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.pow(2)),
    "centered only above": lambda x, w, b: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "centered only below": lambda x, w, b: x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS),
    "centered by another mean": lambda x, w, b: (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS),
    "the mean of all": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean() + EPS),
    "a scalar": lambda x, w, b: x[0, 0, 0] * torch.rsqrt(x[0, 0, 0].pow(2).mean(-1, keepdim=True) + EPS),
    "the mean scaled": lambda x, w, b: (
        torch.sub(x, x.mean(-1, keepdim=True), alpha=2) / (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str):
    fn, reason = REFUSED[name]
    _, norms, declined = raised(fn, *data())
    assert not norms and len(declined) == 1 and reason in declined[0]


@pytest.mark.parametrize("name", NO_NORM)
def test_not_a_norm(name: str):
    _, norms, declined = raised(NO_NORM[name], *data())
    assert not norms and not declined


NOT_ITS_WEIGHT: dict[str, Spelling] = {
    "one a row": lambda x, w, b: rms(x) * w[:, None],
    "one a row, unsqueezed": lambda x, w, b: rms(x) * w.unsqueeze(1),
    "one a row, expanded": lambda x, w, b: rms(x) * w.view(D, 1).expand(S, D),
    "one a batch entry": lambda x, w, b: rms(x) * x[:, :1],
    "broadcasts the norm": lambda x, w, b: rms(x) * w.view(1, 1, 1, -1),
    "a number": lambda x, w, b: rms(x) * 2.0,
    "bias on an RMSNorm": lambda x, w, b: rms(x) + b,
    "bias of one a row": lambda x, w, b: layer(x) + b[:, None],
    "bias scaled": lambda x, w, b: torch.add(layer(x), b, alpha=2),
    "a wider weight": lambda x, w, b: rms(x) * w.double(),
    "not linear": lambda x, w, b: rms(x) * F.silu(x),
}


@pytest.mark.parametrize("name", NOT_ITS_WEIGHT)
def test_what_is_no_weight_stays_outside(name: str):
    gm, norms, declined = raised(NOT_ITS_WEIGHT[name], *data())
    (norm,) = norms
    assert norm.args[1:] == (None, None) and {torch.mul, torch.add} & set(remains(gm)) and not declined


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_several_dimensions(affine: bool, dtype: torch.dtype):
    shape = (3, D)
    weight, bias = (torch.randn(shape).to(dtype).requires_grad_() if affine else None for _ in range(2))
    x = data(dtype, (B, *shape))[0]
    for fn in (lambda x: F.layer_norm(x, shape, weight, bias), lambda x: F.rms_norm(x, shape, weight, EPS)):
        gm, (norm,), _ = raised(fn, x)
        assert norm.kwargs["dims"] == 2 and (norm.args[1] is not None) == affine
        assert not remains(gm)


def test_several_dimensions_by_hand():
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS))

    _, (norm,), _ = raised(fn, data()[0], torch.randn(S, D))
    assert norm.kwargs["dims"] == 2 and norm.args[1] is not None
    _, (norm,), _ = raised(fn, data()[0], torch.randn(D))
    assert norm.kwargs["dims"] == 2 and norm.args[1] is None


def test_a_weight_with_dimensions_of_one():
    x, w, b = data()
    _, (norm,), _ = raised(lambda x, w, b: layer(x) * w + b, x, w.detach().view(1, 1, D), b.detach().view(1, D))
    assert None not in norm.args
    assert [tuple(a.meta["example_value"].shape) for a in norm.args[1:]] == [(D,), (D,)]


@pytest.mark.parametrize("spelling", [llama, gemma, t5, deberta, RMS["F.rms_norm"], LAYER["F.layer_norm"]])
def test_a_permuted_input_keeps_its_memory_format(spelling: Spelling):
    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return spelling(x.transpose(0, 1), w, b)

    _, norms, _ = raised(fn, *data())
    assert len(norms) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_intermediates_may_be_used_outside(dtype: torch.dtype):
    def fn(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        h = x.float()
        mean = h.mean(-1, keepdim=True)
        rstd = torch.rsqrt((h - mean).pow(2).mean(-1, keepdim=True) + EPS)
        normalized = (h - mean) * rstd
        return (w * normalized.to(x.dtype) + b, rstd, normalized, mean + h)

    _, (norm,), declined = raised(fn, *data(dtype))
    assert None not in norm.args and not declined


def test_two_weights_share_a_norm():
    gm, norms, _ = raised(lambda x, w, b: (rms(x) * w, rms(x) * b, (h := rms(x)) * w, h * b), *data())
    assert len(norms) == 4 and not remains(gm)


def test_a_norm_of_a_norm():
    gm, norms, _ = raised(lambda x, w, b: llama(gemma(x, w, b), b, b), *data(torch.bfloat16))
    assert len(norms) == 2 and not remains(gm)


def test_a_cast_up_stays():
    gm, (norm,), _ = raised(lambda x, w, b: llama(x, w, b).float(), *data(torch.bfloat16))
    assert norm.kwargs["out_dtype"] == torch.bfloat16 and remains(gm) == ["to"]


def test_a_cast_to_integers_stays():
    _, (norm,), _ = raised(lambda x, w, b: (F.rms_norm(x, (D,), w).to(torch.int32), x), *data())
    assert norm.kwargs["out_dtype"] == torch.float32


def test_a_norm_that_is_rounded_for_some_only():
    gm, (norm,), _ = raised(lambda x, w, b: ((y := rms(x) * w), y.bfloat16()), *data())
    assert norm.kwargs["out_dtype"] == torch.float32 and remains(gm) == ["to"]


def test_a_float32_weight_on_a_rounded_norm():
    x, w, _ = data(torch.bfloat16)
    _, (norm,), _ = raised(lambda x, w: w * rms(x.float()).to(x.dtype), x, w.detach().float())
    assert norm.kwargs["out_dtype"] == torch.float32 and norm.kwargs["round_before_weight"] == torch.bfloat16


@pytest.mark.parametrize("value", ["x", "weight"])
def test_a_write_in_between_forbids_it(value: str):
    def fn(x: Tensor, w: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        if value == "x":
            x.add_(1)
        h = x * rstd
        if value == "weight":
            x.copy_(w.expand_as(x))
        return w * h

    x, w, _ = (t.detach() for t in data())
    _, norms, declined = raised(fn, x, w)
    assert not norms and len(declined) == 1 and "writes in place" in declined[0]


def test_in_place_arithmetic_that_no_one_sees():
    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).add_(EPS))
        h *= w
        return h.to(x.dtype)

    _, (norm,), declined = raised(fn, *data(torch.bfloat16))
    assert norm.args[1] is not None and not declined


def test_statistics_without_gradients_forbid_it():
    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x * rstd * w

    _, norms, declined = raised(fn, *data())
    assert not norms and declined == ["a part of it is computed without gradients"]
    _, norms, declined = raised(torch.no_grad()(lambda x, w, b: llama(x, w, b)), *data())
    assert len(norms) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", [*RMS.values(), *LAYER.values()], ids=[*RMS, *(f"layer {n}" for n in LAYER)])
def test_autocast(spelling: Spelling, dtype: torch.dtype):
    def fn(x: Tensor, w: Tensor, b: Tensor, m: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return spelling(F.linear(x, m), w, b)

    x, w, b = (t.detach().bfloat16().to(torch.float32) for t in data())  # with an identity weight the linear itself does not round
    _, (norm,), declined = raised(fn, x.requires_grad_(), w.to(dtype), b.to(dtype), torch.eye(D))
    assert norm.args[1] is not None and not declined


def test_dynamic_shapes_make_no_guards():
    x, w, b = data(torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    for spelling in (llama, gemma, t5, deberta, two_views, RMS["sum"], LAYER["F.layer_norm"]):
        _, norms, _ = raised(lambda x, w, b, spelling=spelling: spelling(x, w, b), x, w, b)
        assert len(norms) == 1
        (shape_env,) = {n.meta["example_value"].fake_mode.shape_env for n in norms}
        assert not any("Eq" in str(guard.expr) for guard in shape_env.guards)


MODULES = [
    LlamaRMSNorm,
    Gemma3RMSNorm,
    Gemma3nRMSNorm,
    T5LayerNorm,
    Qwen3RMSNorm,
    DebertaLayerNorm,
    CohereLayerNorm,
    nn.LayerNorm,
    nn.RMSNorm,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules(module: type[nn.Module], dtype: torch.dtype):
    norm_module = module(D).to(dtype)
    for parameter in norm_module.parameters():
        nn.init.normal_(parameter)
    gm, (norm,), declined = raised(norm_module, data(dtype)[0])
    assert norm.args[1].op == "placeholder" and not remains(gm) and not declined
    assert norm.kwargs["zero_centered"] == (module is Gemma3RMSNorm)
    assert (norm.kwargs["round_before_weight"] is not None) == (
        dtype != torch.float32 and module in (LlamaRMSNorm, T5LayerNorm, Qwen3RMSNorm, DebertaLayerNorm)
    )


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 32,
}
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "llama": (lambda: LlamaModel(LlamaConfig(**SMALL, use_cache=False)), 2 * 2 + 1),
    "qwen3": (lambda: Qwen3Model(Qwen3Config(**SMALL, head_dim=8, use_cache=False)), 2 * 4 + 1),
    "gemma3": (lambda: Gemma3TextModel(Gemma3TextConfig(**SMALL, head_dim=8, use_cache=False, pad_token_id=0)), 2 * 6 + 1),
    "t5": (lambda: T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)), 2 * 2 + 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, dtype: torch.dtype):
    make, count = MODELS[name]
    gm = capture(make().eval().to(dtype), torch.arange(12).view(2, 6))
    canonicalize(gm)
    sites = Sites(strict=True)
    apply(NORM_RULES, gm, sites)
    gm.graph.lint()
    norms = [n for n in gm.graph.nodes if n.target is ops.norm]
    assert len(norms) == count and not list(sites)
    assert all(n.args[1].op == "placeholder" for n in norms)
    assert torch.rsqrt not in remains(gm)


@pytest.mark.parametrize("dims", [1, 2])
def test_on_a_gpu_torch_s_layer_norm_stands_for_the_definition(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor has a better backward for it. The same numbers, here in float32."""
    from te_dynamo.ir import norm as file

    x, weight, bias = torch.randn(3, 5, 8), torch.randn((5, 8)[2 - dims :]), torch.randn((5, 8)[2 - dims :])
    given = {"kind": "layer", "eps": 1e-5, "out_dtype": torch.float32, "dims": dims}
    expected = ops.norm(x, weight, bias, **given)
    zero_centered = ops.norm(x, weight, bias, **given, zero_centered=True)
    monkeypatch.setattr(file, "_is_torchs", lambda *_: True)
    torch.testing.assert_close(ops.norm(x, weight, bias, **given), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.norm(x, weight, bias, **given, zero_centered=True), zero_centered)


def test_where_torch_s_layer_norm_is_the_same() -> None:
    from te_dynamo.ir.norm import _is_torchs

    with FakeTensorMode():
        x, w = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16), torch.empty(8, device="cuda", dtype=torch.bfloat16)
        assert _is_torchs(x, w, None, "layer", torch.bfloat16)
        others = [(x, w.float(), None, "layer", torch.bfloat16), (x, w, None, "layer", torch.float32), (x, w, None, "rms", torch.bfloat16)]
        others += [(x.t(), None, None, "layer", torch.bfloat16), (x.cpu(), None, None, "layer", torch.bfloat16)]
        assert not any(_is_torchs(*other) for other in others)
