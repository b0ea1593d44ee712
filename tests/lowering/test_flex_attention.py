"""`flex_attention` with a mask's formula gives the same as `scaled_dot_product_attention` with the mask, including gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.ir import op_named
from te_dynamo.ir.graph import is_call
from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.native.attention import FlexAttention, flex
from te_dynamo.lowering.registry import Case
from te_dynamo.passes.canonicalize import SDPA, canonicalize
from te_dynamo.passes.masks import Proof, prove
from tests.capture import capture

B, H, S, D = 2, 2, 150, 16  # more than one block of keys


def attention_of(make: Callable[..., Tensor], *given: Tensor, rows: int = S, columns: int = S) -> tuple[GraphModule, Node]:
    """Dynamo's graph of an attention with the mask that `make(rows, columns, *given)` builds, and its node."""

    def fn(q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, attn_mask=make(q.shape[2], k.shape[2], *given))

    gm = capture(fn, torch.randn(B, H, rows, D), torch.randn(B, H, columns, D), *given)
    canonicalize(gm)
    (node,) = [n for n in gm.graph.nodes if is_call(n, SDPA)]
    return gm, node


def both(make: Callable[..., Tensor], *given: Tensor, rows: int = S, columns: int = S) -> Proof:
    """Checks that flex_attention and eager attention agree in float64, and returns what the mask was proved to be."""
    gm, node = attention_of(make, *given, rows=rows, columns=columns)
    proof = prove(node.args[3], node)
    assert proof.attends is not None, proof
    agree(make(rows, columns, *given), proof.attends.text, evaluated(gm, proof.attends.tensors), rows, columns)
    return proof


def evaluated(gm: GraphModule, nodes: tuple[Node, ...]) -> list[Tensor]:
    """The values of nodes on the graph's example inputs."""
    interpreter, values = torch.fx.Interpreter(gm), iter(gm.meta["example_inputs"])
    for n in gm.graph.nodes:
        if n.op != "output":
            interpreter.env[n] = next(values) if n.op == "placeholder" else interpreter.run_node(n)
    return [interpreter.env[n] for n in nodes]


def agree(mask: Tensor | None, attends: Any, reads: list[Tensor], rows: int = S, columns: int = S, **how: Any) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(B, h, n, D, dtype=torch.float64, requires_grad=True) for h, n in ((2 * H, rows), (H, columns), (H, columns)))
    sinks = torch.randn(2 * H, dtype=torch.float64, requires_grad=True) if how.pop("sinks", False) else None
    inputs = (q, k, v, mask, sinks, tuple(reads))
    attributes = {"attends": attends, "causal": False, "scale": None, "softcap": 0.0, "dropout_p": 0.0} | how
    call = Call("attention", "native", "cpu", spec_of(inputs), attributes=attributes)
    wanted = ops.attention(
        q, k, v, mask, sinks, causal=attributes["causal"], enable_gqa=True, softcap=attributes["softcap"], scale=attributes["scale"]
    )
    found = flex(call, q, k, v, sinks, reads)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    weights, leaves = torch.randn_like(wanted), [t for t in (q, k, v, sinks) if t is not None]
    for a, b in zip(torch.autograd.grad(found, leaves, weights), torch.autograd.grad(wanted, leaves, weights), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def row(n: int) -> Tensor:
    return torch.arange(n)[:, None]


def column(n: int) -> Tensor:
    return torch.arange(n)[None, :]


def valid(*lengths: tuple[int, int], holes: bool = False) -> Tensor:
    """[B, S] int64: 1 in each sample's range of positions."""
    made = torch.stack([((torch.arange(S) >= a) & (torch.arange(S) < b)).long() for a, b in lengths])
    if holes:
        made[:, 70:75] = 0
    return made


PADDINGS = {
    "none": valid((0, S), (0, S)),
    "left": valid((40, S), (3, S)),
    "right": valid((0, 130), (0, 1)),
    "both": valid((20, 90), (140, 142)),
    "holes": valid((5, 140), (0, S), holes=True),
    "nothing is valid": valid((0, 0), (10, S)),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_causal_and_padded(padding):
    proof = both(lambda s, t, m: (column(t) <= row(s)) & m.bool()[:, None, None, :], PADDINGS[padding])
    assert (proof.kind, proof.within) == ("padded", "causal")


@pytest.mark.parametrize("padding", ["left", "both"])
def test_full_and_padded(padding):
    proof = both(lambda s, t, m: (m != 0)[:, None, None, :].expand(-1, 1, s, t), PADDINGS[padding])
    assert (proof.kind, proof.within) == ("padded", "all")


def test_a_window_and_padded():
    proof = both(lambda s, t, m: (column(t) <= row(s)) & (row(s) - column(t) < 20) & (m > 0)[:, None, None], PADDINGS["both"])
    assert (proof.kind, proof.within, proof.window) == ("padded", "window", 19)


def test_queries_that_are_masked_too():
    """Padding that masks queries as well as keys is right too."""
    both(lambda s, t, m: m.bool()[:, None, None, :] & m.bool()[:, None, :, None] & (column(t) <= row(s)), PADDINGS["both"])


def test_packed():
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((10, 90, 50), (1, 149))])

    def make(s: int, t: int, positions: Tensor) -> Tensor:
        sequence = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        return (column(t) <= row(s)) & (sequence[:, None, :, None] == sequence[:, None, None, :])

    proof = both(make, positions)
    assert (proof.kind, proof.within) == ("packed", "causal")
    assert proof.described == "causal within the sequences that input L['given'][0] tells apart"


@pytest.mark.parametrize(
    "make",
    [
        lambda s, t: column(t) - row(s) <= t - s,
        lambda s, t: (column(t) <= row(s)) | (column(t) < 30),
        lambda s, t: (column(t) <= row(s)) & (column(t) > row(s) - 7),
    ],
    ids=["aligned at the bottom right", "prefix", "window"],
)
def test_without_data(make):
    both(make, rows=140)


def test_a_mask_that_is_given():
    torch.manual_seed(0)
    proof = both(lambda s, t, m: m, torch.rand(B, 1, S, S) > 0.3)
    assert proof.kind == "unknown"


def test_what_may_lie_outside_is_not_read():
    """A full cache, then new tokens that may be padding: the new tokens' mask is not indexed outside of its bounds."""
    new = torch.rand(B, S - 100) > 0.3
    both(lambda s, t, m: torch.cat((torch.ones(B, 100, dtype=torch.bool), m), 1)[:, None, None, :].expand(B, 1, s, t), new)


@pytest.mark.parametrize("how", [{"softcap": 2.0}, {"sinks": True}, {"softcap": 1.0, "sinks": True, "scale": 0.7}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_capped_and_with_sinks(how, causal):
    agree(None, (), [], causal=causal, **how)


numbers = st.integers(0, S)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.tuples(numbers, numbers), st.tuples(numbers, numbers), st.booleans(), st.sampled_from([None, 0, 5, 129]), st.booleans())
def test_any_padding(first, second, holes, window, sinks):
    datum = (("", 1), ("datum0", -1))
    sums = [datum, (("column", 1), ("row", -1)), *([] if window is None else [(("row", 1), ("column", -1), ("", -window))])]
    attends = ((tuple(sums),), ((0, (((("batch", 1),), False), ((("column", 1),), False))),))
    keys = valid(first, second, holes=holes).bool()
    mask = keys[:, None, None, :] & (column(S) <= row(S))
    agree(mask if window is None else mask & (row(S) - column(S) <= window), attends, [keys], sinks=sinks)


FORMULA = (((("column", 1), ("row", -1)),),), ()


def reason(mask: bool = True, rows: int = 1024, columns: int = 1024, head: int = 64, **changed: Any) -> str | None:
    """Why flex_attention does not compute an attention in bfloat16 with a mask; "" if torch's own kernels are as good."""
    dtype = changed.pop("dtype", torch.bfloat16)
    q, k = (torch.empty(2, 4, n, head, dtype=dtype, device="meta") for n in (rows, columns))
    inputs = {
        "q": q,
        "k": k,
        "v": k,
        "mask": torch.empty(rows, columns, device="meta") if mask else None,
        "sinks": changed.pop("sinks", None),
    }
    attributes = {"attends": FORMULA, "softcap": 0.0, "dropout_p": 0.0} | changed
    return FlexAttention().unsupported(Case(op_named("attention"), inputs, attributes, None, torch.device("cuda"), trains=True))


@pytest.mark.parametrize(
    "case",
    [{}, {"mask": False, "softcap": 50.0}, {"mask": False, "sinks": torch.ones(4)}, {"dtype": torch.float16}, {"head": 256}],
    ids=str,
)
def test_what_it_computes(case):
    assert reason(**case) is None


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ({"attends": ()}, "no formula"),
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"head": 512}, "not 512 and 512"),
        ({"columns": 512}, "up to 512 keys"),
        ({"rows": 1}, "for one row"),
    ],
    ids=str,
)
def test_what_it_does_not(case, why):
    found = reason(**case)
    assert found is not None and why in found


def test_without_a_mask_torch_has_kernels():
    assert reason(mask=False) == ""
