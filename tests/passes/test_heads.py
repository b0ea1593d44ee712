"""RoPE and QK-norm between the GEMM and the attention: recognized in any spelling, and written in the wanted layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from te_dynamo import ops
from te_dynamo.ir.graph import is_call
from te_dynamo.ir.meta import NOTES
from te_dynamo.lowering.native.qkv import QKV
from tests.lowering.test_qkv_kernel import call_of
from tests.numerics import sqnr
from tests.pipeline import Recorded, stages_of

B, S, HEADS, KV, D = 2, 6, 4, 2, 16


def halves(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def neighbors(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def angles(features: int, *, pairs: bool = False, interleaved: bool = False) -> Tensor:
    """[S, features], or [S, features / 2] with `pairs`."""
    frequencies = torch.outer(torch.arange(S, dtype=torch.float32), 1.0 / 100 ** (torch.arange(0, features, 2) / features))
    if pairs:
        return frequencies
    return frequencies.repeat_interleave(2, -1) if interleaved else torch.cat((frequencies, frequencies), -1)


# Each rotates x [B, H, S, D] as some model's code does.


def llama(x: Tensor) -> Tensor:
    a = angles(D)[None, None]
    return x * a.cos() + halves(x) * a.sin()


def in_float32(x: Tensor) -> Tensor:
    a = angles(D)[None, None]
    return (a.sin() * halves(x.float()) + a.cos() * x.float()).to(x.dtype)


def chunked(x: Tensor) -> Tensor:
    a = angles(D, pairs=True)[None, None]
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * a.cos() - second * a.sin(), second * a.cos() + first * a.sin()), dim=-1)


def split_in_two(x: Tensor) -> Tensor:
    a = angles(D)[None, None]
    first, second = x.reshape(*x.shape[:-1], 2, D // 2).unbind(-2)
    return x * a.cos() + torch.cat((-second, first), -1) * a.sin()


def gptj(x: Tensor) -> Tensor:
    a = angles(D, interleaved=True)[None, None]
    return x * a.cos() + neighbors(x) * a.sin()


def stacked(x: Tensor) -> Tensor:
    a = angles(D, pairs=True)[None, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()), -1).flatten(-2)


def complex_product(x: Tensor) -> Tensor:
    cis = torch.polar(torch.ones(S, D // 2), angles(D, pairs=True))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * cis[None, None]).flatten(3).type_as(x)


def partial(x: Tensor) -> Tensor:
    a = angles(D // 2)[None, None]
    turning, passing = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((turning * a.cos() + halves(turning) * a.sin(), passing), dim=-1)


def positioned_by_token(x: Tensor) -> Tensor:
    """As in Meta's code: before heads are moved to the front."""
    a = angles(D)[None, :, None]
    y = x.transpose(1, 2)
    return (y * a.cos() + halves(y) * a.sin()).transpose(1, 2)


SPELLINGS = {
    llama: ("halves", D),
    in_float32: ("halves", D),
    chunked: ("halves", D),
    split_in_two: ("halves", D),
    gptj: ("interleaved", D),
    stacked: ("interleaved", D),
    complex_product: ("interleaved", D),
    partial: ("halves", D // 2),
    positioned_by_token: ("halves", D),
}


class Block(nn.Module):
    """An attention whose q and k are prepared by functions of [B, H, S, D]."""

    def __init__(self, prepare_q: Callable[..., Tensor], prepare_k: Callable[..., Tensor] | None = None, kv: int = KV) -> None:
        super().__init__()
        self.prepare, self.kv = (prepare_q, prepare_k or prepare_q), kv
        self.q, self.k, self.v = (nn.Linear(64, n * D, bias=False) for n in (HEADS, kv, kv))
        self.o = nn.Linear(HEADS * D, 64, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        nn.init.uniform_(self.q_norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (f(t).to(v.dtype) for f, t in zip(self.prepare, (q, k), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != HEADS)
        return self.o(y.transpose(1, 2).flatten(2))


def staged(block: Block, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Recorded, Tensor]:
    torch.manual_seed(0)
    for p in block.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.1)
    x = torch.randn(B, S, 64).to(dtype).requires_grad_()
    return stages_of(block.to(dtype), x, options=options), x


def attentions(recorded: Recorded) -> list[Node]:
    return [n for n in recorded.graphs["fuse"].graph.nodes if is_call(n, ops.attention)]


def prepared(recorded: Recorded) -> list[Node]:
    return [n for n in recorded.graphs["fuse"].graph.nodes if is_call(n, ops.qkv)]


def check_numbers(recorded: Recorded, least: float) -> None:
    """Checks that the fused graph's result and gradients equal those of Dynamo's graph."""
    results = []
    for name in ("dynamo", "fuse"):
        inputs = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in recorded.inputs]
        (y,) = recorded.graphs[name](*inputs)
        torch.manual_seed(1)
        learned = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        results.append([y, *torch.autograd.grad(y, learned, torch.randn_like(y), allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs.abs().max() < 1e-5 or sqnr(theirs, ours) > least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_each_spelling_is_read(spelling: Callable[..., Tensor], dtype: torch.dtype) -> None:
    recorded, _ = staged(Block(spelling), dtype)
    (node,) = prepared(recorded)
    assert (node.kwargs["rotary"], node.kwargs["width"]) == SPELLINGS[spelling]
    assert (node.kwargs["form"], node.kwargs["packing"]) == ("bshd", "2hd")
    assert "RoPE" in attentions(recorded)[0].meta[NOTES]["heads"]
    check_numbers(recorded, 100 if dtype == torch.float32 else 38)


@pytest.mark.parametrize("last", [False, True], ids=["norm first", "norm last"])
def test_a_norm_of_each_head_goes_with_it(last: bool) -> None:
    block = Block(llama)
    norms = block.q_norm, block.k_norm
    block.prepare = tuple((lambda x, n=n: n(llama(x))) if last else (lambda x, n=n: llama(n(x))) for n in norms)
    recorded, _ = staged(block)
    (node,) = prepared(recorded)
    assert node.kwargs["normalized"] == "rms" and node.kwargs["norm_last"] is last and node.kwargs["rotary"] == "halves"
    check_numbers(recorded, 100)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_a_norm_alone(kind: type[nn.Module]) -> None:
    block = Block(llama, kv=HEADS)
    block.q_norm, block.k_norm = kind(D), kind(D)
    block.prepare = (lambda x: block.q_norm(x), lambda x: block.k_norm(x))
    recorded, _ = staged(block)
    (node,) = prepared(recorded)
    assert "rotary" not in node.kwargs and not node.kwargs["norm_last"] and node.kwargs["packing"] == "3hd"
    check_numbers(recorded, 100)


@pytest.mark.parametrize(
    ("kv", "short", "layout"), [(HEADS, 512, "3hd"), (HEADS, 4, "h3d"), (KV, 512, "2hd"), (KV, 4, "h2d"), (1, 512, "2hd")]
)
def test_the_length_and_the_heads_choose_the_layout(kv: int, short: int, layout: str) -> None:
    recorded, _ = staged(Block(llama, kv=kv), short_sequence=short)
    (node,) = prepared(recorded)
    assert node.kwargs["packing"] == layout
    check_numbers(recorded, 100)


def backwards(x: Tensor) -> Tensor:
    a = angles(D)[None, None]
    return x * a.cos() - halves(x) * a.sin()


def by_head(x: Tensor) -> Tensor:
    a = angles(D)[None, None]
    return x * a.cos() + halves(x.flip(1)) * a.sin()


def wrong_partner(x: Tensor) -> Tensor:
    a = angles(D)[None, None]
    return x * a.cos() + torch.cat((-x[..., :8], x[..., 8:]), -1) * a.sin()


def one_table(x: Tensor) -> Tensor:
    c = angles(D)[None, None].cos()
    return x * c + halves(x) * c


def scaled_rest(x: Tensor) -> Tensor:
    a = angles(D // 2)[None, None]
    turning, passing = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((turning * a.cos() + halves(turning) * a.sin(), -passing), dim=-1)


@pytest.mark.parametrize("other", [backwards, by_head, wrong_partner, one_table, scaled_rest], ids=lambda f: f.__name__)
def test_what_is_not_rope_is_left(other: Callable[..., Tensor]) -> None:
    recorded, _ = staged(Block(other))
    assert not prepared(recorded) and attentions(recorded)
    check_numbers(recorded, 100)


@pytest.mark.parametrize("pair", [(llama, gptj), (llama, lambda x: x), (lambda x: x, llama), (llama, partial)])
def test_q_and_k_must_be_prepared_alike(pair: Any) -> None:
    recorded, _ = staged(Block(*pair))
    assert not prepared(recorded) and attentions(recorded)
    check_numbers(recorded, 100)


def test_what_another_reads_too_is_left() -> None:
    """For example, a cache that keeps k, which would be computed twice."""
    kept = []

    def keeping(x: Tensor) -> Tensor:
        kept.append(llama(x))
        return kept[-1]

    class Caching(Block):
        def forward(self, x: Tensor) -> Any:
            kept.clear()
            return super().forward(x), kept[1]

    recorded, _ = staged(Caching(keeping))
    assert not prepared(recorded) and attentions(recorded)


@pytest.mark.parametrize(("skip", "taken"), [(["q", "k", "v"], False), (["q", "k"], False), (["k", "v"], True)])
def test_without_an_fp8_linear_it_is_inductor_s(skip: list[str], taken: bool) -> None:
    """There is no GEMM whose layout would be kept. A norm of heads also stays as it was."""
    recorded, _ = staged(Block(llama), skip=skip)
    assert bool(prepared(recorded)) == taken and attentions(recorded)
    block = Block(llama)
    block.prepare = (lambda x: llama(block.q_norm(x)), lambda x: llama(block.k_norm(x)))
    recorded, _ = staged(block, skip=skip)
    assert bool(prepared(recorded)) == taken
    assert taken or not [n for n in recorded.graphs["fuse"].graph.nodes if is_call(n, ops.norm)]


@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    half=st.integers(2, 9),
    passing=st.integers(0, 5),
    interleaved=st.booleans(),
    pairs=st.booleans(),
    form=st.sampled_from(["bshd", "sbhd"]),
    norm=st.sampled_from(["", "rms", "layer"]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_gradients_written_out_are_the_definition_s(heads, half, passing, interleaved, pairs, form, norm, last, seed) -> None:
    """The GPU's implementation has its own backward: autograd through the definition is the ground truth."""
    torch.manual_seed(seed)
    (h, kv), size = heads, 2 * half + passing
    packing = "3hd" if h == kv else "h2d"
    leaves = [torch.randn(2, n, 5, size, dtype=torch.float64, requires_grad=True) for n in (h, kv, kv)]
    tables = [torch.randn(1, 1, 5, half if pairs else 2 * half) for _ in range(2)]
    given_vectors = {"": 0, "rms": 2, "layer": 4}[norm]
    vectors = [torch.randn(size, dtype=torch.float64, requires_grad=True) if i < given_vectors else None for i in range(4)]
    given_to = [*leaves, *tables, *vectors]
    attributes = dict(form=form, packing=packing, out_dtype=torch.float64, rotary="interleaved" if interleaved else "halves")
    attributes |= dict(width=2 * half, normalized=norm, eps=1e-5, norm_last=last)
    made = ops.qkv(*given_to, **attributes)
    grads = [torch.randn_like(t) for t in made]
    learned = [t for t in (*leaves, *vectors) if t is not None and t.requires_grad]
    expected = torch.autograd.grad(made, learned, grads)
    found = QKV().backward(call_of(given_to, **attributes), [None if t is None else t.detach() for t in given_to], [], grads, None, None)
    for ours, theirs in zip([g for g in found.gradients if g is not None], expected, strict=True):
        assert sqnr(theirs, ours) > 100
