"""Every spelling of a linear: found, left alone where it must be, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from te_dynamo import ops
from te_dynamo.ir.graph import submodules
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.raise_linear import LINEAR_RULES
from te_dynamo.passes.rules import apply
from te_dynamo.passes.weights import path_of, weight_of
from te_dynamo.sites import Sites
from tests.capture import capture

B, S, D, N, H, E = 2, 3, 8, 16, 2, 4  # H * E == D


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def raised(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, list[Node], list[str]]:
    """The graph after the linear rules, its linears, and the reasons for what was declined. Checks that the graph still
    gives the same values in the same memory format, and the same gradients."""
    gm = capture(fn, *args, **kwargs)
    inputs = gm.meta["example_inputs"]
    canonicalize(gm)
    expected, expected_grads = run(gm, inputs)
    sites = Sites(strict=True)
    apply(LINEAR_RULES, gm, sites)
    gm.graph.lint()
    gm.recompile()
    actual, grads = run(gm, inputs)
    for a, e in zip(actual + grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(a, e)
    assert [a.is_contiguous() for a in actual] == [e.is_contiguous() for e in expected]
    return gm, linears_of(gm), [s.reason or "" for s in sites]


def run(gm: GraphModule, inputs: list[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    out = [o for o in gm(*inputs) if isinstance(o, torch.Tensor)]
    leaves = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
    differentiable = [o for o in out if o.requires_grad]
    if not leaves or not differentiable:
        return out, []
    weighted = sum((o.float() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in differentiable)
    grads = torch.autograd.grad(weighted, leaves, allow_unused=True)
    return out, [g for g in grads if g is not None]


def linears_of(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.target is ops.linear]


x = torch.randn(B, S, D)
w_kn, w_nk, bias = parameter(D, N), parameter(N, D), parameter(N)
w_dhk, w_hkd, w_hdk = parameter(D, H, E), parameter(H, E, D), parameter(H, D, E)

SPELLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F.linear": lambda x: F.linear(x, w_nk, bias),
    "F.linear with keywords": lambda x: F.linear(input=x, bias=bias, weight=w_nk),
    "F.linear without bias": lambda x: F.linear(x, w_nk),
    "1-D": lambda x: F.linear(x[0, 0], w_nk, bias),
    "addmm": lambda x: torch.addmm(bias, x.view(-1, D), w_kn).view(B, S, N),
    "addmm with keywords": lambda x: torch.addmm(input=bias, mat1=x[0], mat2=w_kn, beta=1, alpha=1.0),
    "addmm method": lambda x: bias.addmm(x[0], w_kn),
    "addmm of a matrix": lambda x: torch.addmm(x[1] @ w_kn, x[0], w_kn),
    "@ w.t()": lambda x: x @ w_nk.t(),
    "@ w.T": lambda x: x @ w_nk.T,
    "@ w.mT": lambda x: x @ w_nk.mT,
    "@ w": lambda x: x @ w_kn,
    "@ w + b": lambda x: x @ w_kn + bias,
    "b + @ w": lambda x: bias + x @ w_kn,
    "1-D @ w + b": lambda x: x[0, 0] @ w_kn + bias,
    "torch.matmul": lambda x: torch.matmul(x, other=w_kn),
    "method matmul": lambda x: x.matmul(w_nk.transpose(0, 1)).add(bias),
    "mm": lambda x: torch.mm(x[0], w_kn),
    "linalg.matmul": lambda x: torch.linalg.matmul(x, w_kn),
    "mv": lambda x: torch.mv(w_nk, x[0, 0]),
    "inner": lambda x: torch.inner(x, w_nk),
    "w @": lambda x: w_nk @ x.mT,
    "w @ 2-D": lambda x: w_nk @ x[0].T,
    "@ w of three dimensions": lambda x: x[0] @ w_hdk,
    "tensordot": lambda x: torch.tensordot(x, w_kn, 1),
    "tensordot to heads": lambda x: torch.tensordot(x, w_dhk, dims=([2], [0])),
    "tensordot from heads": lambda x: torch.tensordot(x.view(B, S, H, E), w_hkd),
    "einsum": lambda x: torch.einsum("bsd,dn->bsn", x, w_kn),
    "einsum of w.T": lambda x: torch.einsum("bsd,nd->bsn", x, w_nk),
    "einsum, weight first": lambda x: torch.einsum("nd,bsd->bsn", w_nk, x),
    "einsum, ellipsis": lambda x: torch.einsum("...d,dn->...n", x, w_kn),
    "einsum, implicit": lambda x: torch.einsum("bac, cn", x, w_kn),
    "einsum, implicit ellipsis": lambda x: torch.einsum("...a,ab", x, w_kn),
    "einsum, a list": lambda x: torch.einsum("bsd, dn -> bsn", [x, w_kn]),
    "einsum, sublists": lambda x: torch.einsum(x, [0, 1, 2], w_kn, [2, 3], [0, 1, 3]),
    "einsum, sublists with ellipsis": lambda x: torch.einsum(x, [..., 2], w_kn, [2, 3]),
    "einsum to heads": lambda x: torch.einsum("bsd,dhk->bshk", x, w_dhk),
    "einsum to heads, ellipsis in the weight": lambda x: torch.einsum("bsd,d...->bs...", x, w_dhk),
    "einsum to heads, bhsk": lambda x: torch.einsum("bsd,dhk->bhsk", x, w_dhk),
    "einsum to heads, hdk": lambda x: torch.einsum("bsd,hdk->bhsk", x, w_hdk),
    "einsum from heads": lambda x: torch.einsum("bshk,hkd->bsd", x.view(B, S, H, E), w_hkd),
    "einsum from heads, bhsk": lambda x: torch.einsum("bhsk,hkd->bsd", x.view(B, S, H, E).transpose(1, 2), w_hkd),
    "einsum from heads, other order": lambda x: torch.einsum("bskh,hkd->bsd", x.view(B, S, E, H), w_hkd),
    "einsum, result transposed": lambda x: torch.einsum("bsd,dn->nbs", x, w_kn),
    "einsum, one row": lambda x: torch.einsum("d,dn->n", x[0, 0], w_kn),
    "contiguous": lambda x: x @ w_nk.t().contiguous(),
    "slice": lambda x: x @ w_nk[:4].T,
    "chunk": lambda x: F.linear(x, w_nk.chunk(2)[1], bias.chunk(2)[1]),
    "split": lambda x: F.linear(x, torch.split(w_nk, 4)[0]),
    "detach": lambda x: F.linear(x, w_nk.detach()),
    "view": lambda x: F.linear(x, w_dhk.view(D, D)),
    "non-contiguous input": lambda x: F.linear(x.transpose(0, 1), w_nk, bias),
    "cast": lambda x: F.linear(x.bfloat16(), w_nk.to(torch.bfloat16), bias.bfloat16()),
    "cast by type": lambda x: F.linear(x.type(torch.bfloat16), w_nk.type(torch.bfloat16)),
    "cast between transpose and use": lambda x: x.bfloat16() @ w_nk.T.bfloat16(),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    _, nodes, declined = raised(SPELLINGS[name], x.clone().requires_grad_())
    assert len(nodes) == (2 if name == "addmm of a matrix" else 1)
    assert not declined
    for node in nodes:
        assert node.args[1].meta["example_value"].dim() == 2
        assert node.meta["te_path"] in ("w_kn", "w_nk", "w_dhk", "w_hkd", "w_hdk")


def test_what_was_flattened_for_addmm_is_read_as_it_was():
    """So that the producer is found, and readers of the result see views of the GEMM's output."""
    _, (node,), _ = raised(lambda x: torch.addmm(bias, (x * 2).view(-1, D), w_kn).view(B, S, N), x)
    assert node.args[0].meta["example_value"].shape == (B, S, D)
    (flat,) = node.users
    memory = [n.meta["example_value"].untyped_storage()._cdata for n in (node, flat, *flat.users)]
    assert len(memory) == 3 and len(set(memory)) == 1
    # Not if the last size differs.
    _, (node,), _ = raised(lambda x: torch.addmm(bias, (x * 2).view(-1, 2, D // 2).reshape(-1, D), w_kn), x)
    assert node.args[0].meta["example_value"].shape == (B * S, D)


@pytest.mark.parametrize("name", ["F.linear", "addmm", "@ w + b", "b + @ w", "1-D @ w + b", "method matmul"])
def test_bias_is_absorbed(name):
    gm, (node,), _ = raised(SPELLINGS[name], x)
    assert node.args[2] is not None
    assert not any(n.target is torch.add for n in gm.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["F.linear", "addmm", "@ w", "einsum"])
def test_under_autocast(name, dtype):
    def fn(x):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            return SPELLINGS[name](x)

    _, (node,), declined = raised(fn, x)
    assert not declined
    assert node.kwargs["out_dtype"] == dtype
    assert node.meta["example_value"].dtype == dtype


def test_add_in_a_wider_dtype_stays():
    """Under autocast the product is rounded to bfloat16 before a float32 bias is added: one linear would not round."""

    def fn(x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ w_kn + bias

    gm, (node,), _ = raised(fn, x)
    assert node.args[2] is None
    assert any(n.target is torch.add for n in gm.graph.nodes)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (lambda y: (y + bias, y))(x @ w_kn),  # the product is used as it is
        lambda x: x @ w_kn + x[..., :1],  # not a parameter
        lambda x: torch.add(x @ w_kn, bias, alpha=2),
        lambda x: x @ w_nk.T[:, :1] + parameter_of_one,  # broadcast over nothing: N is 1, taken
    ],
)
def test_other_additions(fn):
    gm, (node,), _ = raised(fn, x)
    assert (node.args[2] is None) == any(n.target is torch.add for n in gm.graph.nodes)


parameter_of_one = parameter(1)
rotation = torch.randn(D, D)


class Odd(nn.Module):
    def __init__(self, use: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.use = use
        self.w = parameter(D, D)
        self.v = parameter(D, D)
        self.experts = parameter(B, D, N)
        self.cube = parameter(D, D, N)
        self.vector = parameter(D)
        self.wide = parameter(D, D, dtype=torch.float64)
        self.phases = nn.Parameter(torch.randn(D, D, dtype=torch.complex64))
        self.integers = nn.Parameter(torch.ones(D, D, dtype=torch.int64), requires_grad=False)
        self.register_buffer("buffer", torch.randn(D, D))

    def forward(self, x):
        return self.use(self, x)


DECLINED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "matmul of a sum": (lambda m, x: x @ (m.w + m.v), "computed in the graph"),
    "masked": (lambda m, x: x @ (m.w * m.buffer), "computed in the graph"),
    "product of parameters": (lambda m, x: m.w @ m.v, "product of parameters"),
    "buffer": (lambda m, x: F.linear(x, m.buffer), "buffer"),
    "matmul by a buffer": (lambda m, x: x @ m.buffer, "buffer"),
    "argument": (lambda m, x: F.linear(x, x[0, :1]), "argument"),
    "float64": (lambda m, x: F.linear(x.double(), m.wide), "float64"),
    "complex": (lambda m, x: x.to(torch.complex64) @ m.phases, "complex64"),
    "integers": (lambda m, x: x.long() @ m.integers, "int64"),
    "empty": (lambda m, x: F.linear(x[:0], m.w), "empty"),
    "addmm with beta": (lambda m, x: torch.addmm(m.vector, x[0], m.w, beta=2), "beta"),
    "addmm with alpha": (lambda m, x: torch.addmm(m.vector, x[0], m.w, alpha=0.5), "alpha"),
    "experts": (lambda m, x: torch.bmm(x, m.experts), "grouped"),
    "experts, matmul": (lambda m, x: x @ m.experts, "grouped"),
    "experts, einsum": (lambda m, x: torch.einsum("esd,edf->esf", x, m.experts), "grouped"),
    "summed alone": (lambda m, x: torch.einsum("bsd,de->bs", x, m.w), "one operand alone"),
    "diagonal": (lambda m, x: torch.einsum("bsd,dde->bse", x, m.cube), "diagonal"),
    "broadcast": (lambda m, x: torch.einsum("bsd,de->bse", x[..., :1], m.w), "broadcast"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_a_reason(name):
    fn, reason = DECLINED[name]
    gm = capture(Odd(fn), x)
    canonicalize(gm)
    before = [n.target for n in gm.graph.nodes]
    sites = Sites(strict=True)
    apply(LINEAR_RULES, gm, sites)
    reasons = [s.reason or "" for s in sites]
    assert len(reasons) == 1
    assert any(part in reasons[0] for part in reason.split("|")), reasons
    assert [n.target for n in gm.graph.nodes] == before


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: x @ x.mT,
        lambda m, x: x @ (x * 2).transpose(1, 2),
        lambda m, x: torch.einsum("bsd,btd->bst", x, x + 1),
        lambda m, x: x[0] @ x[1].T,
        lambda m, x: x @ m.vector,
        lambda m, x: torch.einsum("bsd,d->bsd", x, m.vector),
        lambda m, x: torch.einsum("bsd,n->bsdn", x, m.vector),
        lambda m, x: F.bilinear(x, x, m.experts.reshape(N, D, B)[:, :, :1].expand(N, D, D)),
        lambda m, x: torch.einsum("bsd,bse,de->bs", x, x, m.w),
        lambda m, x: torch.einsum("bsd->bds", x),
        lambda m, x: torch.einsum("bsd,dd->bsd", x, m.w),
        lambda m, x: torch.addmm(x[0, :, :1], x[0], x[1].T),
    ],
)
def test_not_a_linear(fn):
    _, nodes, declined = raised(Odd(fn), x)
    assert not nodes
    assert not declined


def test_arguments_that_are_trained():
    """`torch.compile` of a function: the right operand is a weight if it is a leaf that requires grad, and the left is not."""
    leaf, w = torch.randn(S, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    assert len(raised(lambda x, w: F.linear(x, w), leaf, w)[1]) == 1
    assert len(raised(lambda x, w: x @ w.t(), leaf, w)[1]) == 1
    assert not raised(lambda x: x @ x.t(), leaf)[1]
    assert not raised(lambda x, y: x @ (y * 2), leaf, torch.randn(D, S))[1]


def test_a_subclass_is_declined():
    gm = capture(lambda x: F.linear(x, w_nk), x)
    canonicalize(gm)
    (placeholder,) = [n for n in gm.graph.nodes if n.op == "placeholder" and weight_of(n)]
    subclass = torch.Tensor._make_subclass(type("Sharded", (torch.Tensor,), {}), torch.randn(N, D), True)
    for value, reason in ((subclass, "Sharded"), (nn.Parameter(torch.eye(N, D).to_sparse()), "sparse")):
        placeholder.meta["example_value"] = value
        sites = Sites(strict=True)
        apply(LINEAR_RULES, gm, sites)
        assert [reason in (s.reason or "") for s in sites] == [True]


def test_a_frozen_weight_is_declined():
    gm = capture(lambda x: F.linear(x, w_nk), x)
    canonicalize(gm)
    (placeholder,) = [n for n in gm.graph.nodes if n.op == "placeholder" and weight_of(n)]
    gm.register_buffer("frozen", torch.randn(N, D))
    with gm.graph.inserting_after(placeholder):
        constant = gm.graph.get_attr("frozen")
    constant.meta["example_value"] = placeholder.meta["example_value"]
    placeholder.replace_all_uses_with(constant)
    sites = Sites(strict=True)
    apply(LINEAR_RULES, gm, sites)
    assert ["frozen in the graph" in (s.reason or "") for s in sites] == [True]


@pytest.mark.filterwarnings("error:Raw SymInt")
def test_dynamic_lengths():
    def fn(x):
        h = torch.einsum("bsd,dhk->bhsk", x, w_dhk)
        return torch.einsum("bhsk,hkd->bsd", h, w_hkd) @ w_kn + bias, w_nk @ x.mT

    gm = capture(fn, x, dynamic=True)
    canonicalize(gm)
    apply(LINEAR_RULES, gm, Sites(strict=True))
    gm.recompile()
    assert len(linears_of(gm)) == 4
    longer = torch.randn(B + 1, S + 2, D)
    inputs = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), gm.meta["example_inputs"], strict=True):
        is_size = isinstance(value, int)
        inputs.append({B: B + 1, S: S + 2}[value] if is_size else longer if node.name.startswith("l_x") else value)
    torch.testing.assert_close(gm(*inputs), fn(longer))


def test_a_write_between_product_and_bias_forbids_absorbing():
    def fn(x):
        x = x * 1
        y = x @ w_kn.detach()
        x.relu_()
        return y + bias, x

    _, (node,), declined = raised(fn, x)
    assert node.args[2] is None
    assert "writes in place" in declined[0]


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.in_proj_weight = parameter(D, D)
        self.extra = nn.ParameterList([parameter(D, D)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x @ self.in_proj_weight @ self.extra[0]


def test_paths():
    _, nodes, _ = raised(Deep(), x)
    assert [n.meta["te_path"] for n in nodes] == ["layers.0", "layers.1", "in_proj_weight", "extra.0"]
    model = nn.ModuleDict({"inner": Deep()})
    _, nodes, _ = raised(lambda x: model["inner"](x), x)
    assert [n.meta["te_path"] for n in nodes] == ["inner.layers.0", "inner.layers.1", "inner.in_proj_weight", "inner.extra.0"]


def test_in_a_subgraph_the_flag_makes_a_weight():
    layer = nn.Linear(D, N)
    gm = capture(lambda x: checkpoint(layer, x, use_reentrant=False), x)
    ((_, _, inner),) = submodules(gm)
    canonicalize(inner)
    for node in inner.graph.nodes:
        node.meta.pop("_dynamo_source", None)
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    for node in placeholders:
        node.meta["te_parameter"] = tuple(node.meta["example_value"].shape) in ((N, D), (N,))
    apply(LINEAR_RULES, inner, Sites(strict=True))
    (node,) = linears_of(inner)
    assert weight_of(node.args[1]) is not None
    assert path_of(node.args[1]) in ("", "layer")


def test_a_tied_weight_has_the_path_of_the_linear_that_is_called():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(N, D), nn.Linear(D, N, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i):
            h = self.embed(i)
            return self.head(h), self.head(h * 2), h @ self.embed.weight.T

    _, nodes, _ = raised(Tied(), torch.zeros(B, S, dtype=torch.int64))
    assert [n.meta["te_path"] for n in nodes] == ["head", "head", "embed"]
