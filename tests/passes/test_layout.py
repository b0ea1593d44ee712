"""The choice of an attention's layout: the table row by row, then what is read from Dynamo's graphs of real modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.ir.graph import emit, is_call
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.layout import TABLE, AttentionShape, Layout, attention_shape, choose_layout, qkv_linears
from te_dynamo.passes.raise_linear import LINEAR_RULES
from te_dynamo.passes.rules import apply
from te_dynamo.sites import Sites
from tests.capture import capture, copy_of

B, S, E, H, D = 2, 6, 32, 4, 8

# --- the table


def site(**changes: Any) -> AttentionShape:
    plain = {"batch_first": True, "self_attention": True, "shared_kv": True, "heads_q": 8, "heads_kv": 8, "s_q": 512, "s_kv": 512}
    return AttentionShape(**{**plain, **changes})


LONG = {"s_q": 513, "s_kv": 513}
CROSS = {"self_attention": False, "s_q": 7}


@pytest.mark.parametrize(
    ("changes", "name", "name_sequence_first"),
    [
        ({}, "bs3hd", "sb3hd"),
        (LONG, "bsh3d", "sbh3d"),
        ({"s_kv": 513}, "bsh3d", "sbh3d"),
        ({"equal_head_sizes": False}, "bshd_bshd_bshd", "sbhd_sbhd_sbhd"),
        ({"heads_kv": 2}, "bshd_bs2hd", "sbhd_sb2hd"),
        ({"heads_kv": 2, **LONG}, "bshd_bsh2d", "sbhd_sbh2d"),
        ({"heads_kv": 1}, "bshd_bs2hd", "sbhd_sb2hd"),
        (CROSS, "bshd_bs2hd", "sbhd_sb2hd"),
        ({**CROSS, "s_kv": 600}, "bshd_bsh2d", "sbhd_sbh2d"),
        ({**CROSS, "shared_kv": False}, "bshd_bshd_bshd", "sbhd_sbhd_sbhd"),
        ({"s_q": 1}, "bshd_bshd_bshd", "sbhd_sbhd_sbhd"),
        ({"s_q": 1, "s_kv": 1}, "bs3hd", "sb3hd"),
        ({"packed_by_user": "3hd", **LONG}, "bs3hd", "sb3hd"),
        ({"packed_by_user": "h3d"}, "bsh3d", "sbh3d"),
        ({**CROSS, "packed_by_user": "2hd", "s_kv": 600}, "bshd_bs2hd", "sbhd_sb2hd"),
        ({**CROSS, "packed_by_user": "h2d"}, "bshd_bsh2d", "sbhd_sbh2d"),
        ({"packed_by_user": ""}, "bshd_bshd_bshd", "sbhd_sbhd_sbhd"),
    ],
)
def test_table(changes, name, name_sequence_first):
    assert choose_layout(site(**changes), 512).name == name
    assert choose_layout(site(**changes, batch_first=False), 512).name == name_sequence_first


def test_every_row_of_the_table_is_tested():
    marks = test_table.pytestmark[0].args[1]
    used = {next(row for row in TABLE if row.applies(site(**changes))).case for changes, *_ in marks}
    assert used == {row.case for row in TABLE}


def test_names_are_transformer_engine_s():
    # transformer_engine/common/include/transformer_engine/fused_attn.h, NVTE_QKV_Layout
    names = ["sb3hd", "sbh3d", "sbhd_sb2hd", "sbhd_sbh2d", "sbhd_sbhd_sbhd"]
    names += ["bs3hd", "bsh3d", "bshd_bs2hd", "bshd_bsh2d", "bshd_bshd_bshd"]
    names += ["t3hd", "th3d", "thd_t2hd", "thd_th2d", "thd_thd_thd"]
    ours = [Layout(form, packing).name for form in ("sbhd", "bshd", "thd") for packing in ("3hd", "h3d", "2hd", "h2d", "")]
    assert ours == names


# --- read off a graph


def attentions(fn: Any, *args: Any, **kwargs: Any) -> tuple[GraphModule, list[Node]]:
    """The graph with its linears and attentions raised, and the attentions."""
    gm = capture(fn, *args, **kwargs)
    canonicalize(gm)
    apply(LINEAR_RULES, gm, Sites(strict=True))
    found = []
    for node in list(gm.graph.nodes):
        if is_call(node, torch._C._nn.scaled_dot_product_attention):
            q, k, v, mask, p, causal = node.args
            with gm.graph.inserting_before(node):
                attributes = {"causal": causal, "scale": node.kwargs["scale"], "dropout_p": p, "enable_gqa": node.kwargs["enable_gqa"]}
                new = emit(gm.graph, ops.attention, (q, k, v, mask), attributes, like=node)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            found.append(new)
    return gm, found


def layouts(fn: Any, *args: Any, short_sequence: int = 512, **kwargs: Any) -> list[str]:
    return [choose_layout(attention_shape(node), short_sequence).name for node in attentions(fn, *args, **kwargs)[1]]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return x * cos + torch.cat((-b, a), -1) * sin


def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE over adjacent pairs, as in GPT-J and (with complex numbers) the original Llama."""
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class Separate(nn.Module):
    """q, k and v from separate linears, with everything that today's models do between those and an attention."""

    def __init__(self, kv_heads: int = H, *, rope: Any = None, norm: bool = False, repeat: bool = False, sequence_first: bool = False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, E), nn.Linear(E, kv_heads * D, bias=False), nn.Linear(E, kv_heads * D)
        self.norm = nn.RMSNorm(D) if norm else nn.Identity()
        self.kv_heads, self.rope, self.repeat, self.sequence_first = kv_heads, rope, repeat, sequence_first

    def heads(self, y: torch.Tensor) -> torch.Tensor:
        y = y.view(*y.shape[:2], -1, D)
        return y.permute(1, 2, 0, 3) if self.sequence_first else y.transpose(1, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        y = x if y is None else y
        q, k, v = self.norm(self.heads(self.q(x)) * 0.5), self.norm(self.heads(self.k(y))), self.heads(self.v(y))
        if self.rope is not None:
            angles = torch.arange(q.shape[2])[:, None] / 100 ** (torch.arange(D) / D)
            q, k = (self.rope(t, angles.cos(), angles.sin()) for t in (q, k))
        if self.repeat:
            k, v = (t[:, :, None].expand(-1, -1, H // self.kv_heads, -1, -1).reshape(t.shape[0], H, -1, D) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != H and not self.repeat)


X = torch.randn(B, S, E)


@pytest.mark.parametrize("options", [{}, {"rope": rotated}, {"rope": interleaved}, {"norm": True}, {"rope": rotated, "norm": True}])
@pytest.mark.parametrize("sequence_first", [False, True])
def test_separate_linears(options, sequence_first):
    module = Separate(**options, sequence_first=sequence_first)
    b = "sb" if sequence_first else "bs"
    s = X.shape[0 if sequence_first else 1]
    _, (node,) = attentions(module, X)
    assert attention_shape(node) == site(batch_first=not sequence_first, heads_q=H, heads_kv=H, s_q=s, s_kv=s)
    assert [choose_layout(attention_shape(node), n).name for n in (512, 1)] == [f"{b}3hd", f"{b}h3d"]
    assert [linear.meta["te_path"] for linear in qkv_linears(node) or ()] == ["q", "k", "v"]


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads, repeat):
    module = Separate(kv_heads, rope=rotated, repeat=repeat)
    assert layouts(module, X) == ["bshd_bs2hd"]
    assert layouts(module, X, short_sequence=5) == ["bshd_bsh2d"]


def test_cross_attention():
    assert layouts(Separate(), X, torch.randn(B, 9, E)) == ["bshd_bs2hd"]
    assert layouts(Separate(), X, torch.randn(B, 9, E), short_sequence=8) == ["bshd_bsh2d"]
    assert layouts(Separate(sequence_first=True), torch.randn(5, B, E), torch.randn(9, B, E)) == ["sbhd_sb2hd"]


class Packed(nn.Module):
    """q, k and v from one linear, split in one of the ways that models use."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self.qkv, self.split = nn.Linear(E, 3 * E), split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, shape = self.qkv(x), x.shape[:2]
        if self.split == "chunk":
            q, k, v = (t.view(*shape, H, D).transpose(1, 2) for t in y.chunk(3, -1))
        elif self.split == "slices":
            q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (y[..., :E], y[..., E : 2 * E], y[..., 2 * E :]))
        elif self.split == "unbind":  # timm
            q, k, v = y.reshape(*shape, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.split == "select":
            y = y.view(*shape, 3, H, D).permute(2, 0, 3, 1, 4)
            q, k, v = y[0], y[1], y[2]
        elif self.split == "by head":  # GPT-NeoX, Megatron
            q, k, v = y.view(*shape, H, 3 * D).transpose(1, 2).chunk(3, -1)
        elif self.split == "by head, sequence first":
            q, k, v = y.view(*shape, H, 3 * D).permute(1, 2, 0, 3).split(D, -1)
        elif self.split == "by element":
            q, k, v = y.view(*shape, H, D, 3).transpose(1, 2).unbind(-1)
        else:  # v, k, q
            v, k, q = (t.view(*shape, H, D).transpose(1, 2) for t in y.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("chunk", "bs3hd"),
        ("slices", "bs3hd"),
        ("unbind", "bs3hd"),
        ("select", "bs3hd"),
        ("by head", "bsh3d"),
        ("by head, sequence first", "sbh3d"),
        ("by element", "bshd_bshd_bshd"),
        ("v, k, q", "bshd_bshd_bshd"),
    ],
)
def test_what_the_user_packed_keeps_its_order_at_any_length(split, name):
    assert layouts(Packed(split), X, short_sequence=512) == layouts(Packed(split), X, short_sequence=1) == [name]
    _, (node,) = attentions(Packed(split), X)
    assert len(set(qkv_linears(node) or ())) == 1


def test_packed_keys_and_values():
    q_of, kv_of = nn.Linear(E, E), nn.Linear(E, 2 * E)

    def cross(x, y, by_head):
        q = q_of(x).view(B, -1, H, D).transpose(1, 2)
        kv = kv_of(y)
        k, v = (
            kv.view(B, -1, H, 2 * D).transpose(1, 2).chunk(2, -1) if by_head else kv.view(B, -1, 2, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return F.scaled_dot_product_attention(q, k, v)

    assert layouts(cross, X, torch.randn(B, 9, E), False, short_sequence=1) == ["bshd_bs2hd"]
    assert layouts(cross, X, torch.randn(B, 9, E), True, short_sequence=99) == ["bshd_bsh2d"]


def test_decode_with_a_cache():
    module, past = Separate(), torch.randn(B, H, S, D)

    def step(x, past_k, past_v):
        q, k, v = (module.heads(linear(x)) for linear in (module.q, module.k, module.v))
        return F.scaled_dot_product_attention(q, torch.cat((past_k, k), 2), torch.cat((past_v, v), 2))

    assert layouts(step, X[:, :1], past, past) == ["bshd_bshd_bshd"]
    assert layouts(step, X[:, :3], past, past) == ["bshd_bshd_bshd"]  # as many rows, but still a cache: not self-attention
    assert layouts(Separate(), X[:, :1]) == ["bs3hd"]


def test_sequence_first_linears_seen_through_merged_batch_and_heads():
    linears = nn.ModuleList(nn.Linear(E, E) for _ in range(3))

    def block(x):  # as nn.MultiheadAttention and fairseq do it
        q, k, v = (linear(x).view(S, B * H, D).transpose(0, 1).view(B, H, S, D) for linear in linears)
        return F.scaled_dot_product_attention(q, k, v)

    assert layouts(block, torch.randn(S, B, E)) == ["sb3hd"]
    assert layouts(block, torch.randn(S, B, E), dynamic=True) == ["sb3hd"]


@pytest.mark.parametrize(("shape", "form"), [((1, S), "bshd"), ((S, 1), "sbhd"), ((1, 1), "bshd")])
def test_one_sequence_or_one_token(shape, form):
    name = {"bshd": "bs3hd", "sbhd": "sb3hd"}[form]
    assert layouts(Separate(sequence_first=form == "sbhd"), torch.randn(*shape, E)) == [name]


def test_linears_of_flattened_tokens():
    linears = nn.ModuleList(nn.Linear(E, E) for _ in range(3))

    def block(x, y):
        q, k, v = (linear(z.reshape(-1, E)).view(B, -1, H, D).transpose(1, 2) for linear, z in zip(linears, (x, y, y), strict=True))
        return F.scaled_dot_product_attention(q, k, v)

    assert layouts(lambda x: block(x, x), X) == ["bs3hd"]
    assert layouts(block, X, torch.randn(B, 9, E)) == ["bshd_bs2hd"]


def test_what_does_not_come_from_linears():
    linear = nn.Linear(E, E)

    def heads(x):
        return x.view(B, S, H, D).transpose(1, 2)

    def raw(x):
        return F.scaled_dot_product_attention(heads(x), heads(x), heads(x))

    def residual(x):  # a linear's output plus a tensor of its size is not a linear's output
        return raw(x + linear(x))

    def two(x):
        return raw(linear(x) * linear(x + 1))

    for fn in (raw, residual, two):
        _, (node,) = attentions(fn, X)
        assert qkv_linears(node) is None
        assert choose_layout(attention_shape(node), 512).name == "bshd_bshd_bshd"


def test_a_symbolic_length_is_guarded_on_where_the_choice_depends_on_it():
    def compiles(module, lengths):
        chosen = []

        def backend(gm, inputs):
            gm = copy_of(gm)
            canonicalize(gm)
            apply(LINEAR_RULES, gm, Sites(strict=True))
            (node,) = [n for n in gm.graph.nodes if is_call(n, torch._C._nn.scaled_dot_product_attention)]
            chosen.append(choose_layout(attention_shape(node), 16).name)
            return gm.forward

        torch._dynamo.reset()
        compiled = torch.compile(module, backend=backend, dynamic=True, fullgraph=True)
        for s in lengths:
            compiled(torch.randn(B, s, E))
        return chosen

    assert compiles(Separate(rope=rotated), (8, 12, 16, 17, 40, 9)) == ["bs3hd", "bsh3d"]
    assert compiles(Separate(2, repeat=True), (8, 16, 17, 40)) == ["bshd_bs2hd", "bshd_bsh2d"]
    assert compiles(Packed("chunk"), (8, 16, 17, 40)) == ["bs3hd"]


# --- models


def tiny(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    common = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    decoder = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, **common}
    ids = {"input_ids": torch.arange(2 * S).view(2, S) % 90}
    config, inputs = {
        "Llama": lambda: (transformers.LlamaConfig(**decoder), {**ids, "use_cache": False}),
        "Qwen3": lambda: (transformers.Qwen3Config(**decoder), {**ids, "use_cache": False}),
        "GPT2": lambda: (transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96), {**ids, "use_cache": False}),
        "Bert": lambda: (transformers.BertConfig(vocab_size=96, **common), ids),
        "ViT": lambda: (transformers.ViTConfig(image_size=16, patch_size=8, **common), {"pixel_values": torch.randn(2, 3, 16, 16)}),
    }[name]()
    config._attn_implementation = "sdpa"
    return getattr(transformers, name + "Model")(config).eval(), inputs


@pytest.mark.parametrize(
    ("name", "expected"), [("Llama", "bshd_bs2hd"), ("Qwen3", "bshd_bs2hd"), ("GPT2", "bs3hd"), ("Bert", "bs3hd"), ("ViT", "bs3hd")]
)
def test_models(name, expected):
    pytest.importorskip("transformers")
    model, inputs = tiny(name)
    assert layouts(model, **inputs) == [expected]
