"""The reported layout of an attention is that of its operands when it runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from te_dynamo.backend import observing, te_fp8
from te_dynamo.ir.layout import in_memory
from te_dynamo.passes.memory import described
from te_dynamo.sites import Site
from tests.models import SMALL

EXPECTED = {
    "llama": "bshd_bs2hd",  # grouped heads
    "qwen3": "bshd_bs2hd",  # and a norm of each head
    "gpt2": "bs3hd",
    "bert": "bs3hd",
    "vit": "bs3hd",
    "t5": "bs3hd",
}


class Operands(TorchDispatchMode):
    """Records the layout of q, k and v whenever torch's attention runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func._schema.name and not func._schema.name.endswith("backward"):
            q, k, v = args[:3]
            layout = in_memory(q, k, v)
            self.seen.append(described(q, k, v) if layout is None else layout.name)
        return func(*args, **(kwargs or {}))


def reported_and_seen(name: str, **options: Any) -> tuple[list[Site], list[str]]:
    case = SMALL[name]
    model, inputs, sites = case.model(), case.inputs(), []
    run = torch.compile(model, backend=te_fp8, fullgraph=True, options=options)
    torch._dynamo.reset()
    # In training, torch would decompose attention with T5's learned bias.
    with torch.set_grad_enabled(name != "t5"):
        with observing(lambda gm, found, _: sites.extend(s for s in found.taken() if s.kind == "attention")):
            run(**inputs)  # compiled first: Dynamo skips frames while a mode is on
        with Operands() as operands:
            run(**inputs)
    return sites, operands.seen


def check(name: str, short: int, expected: str) -> None:
    sites, seen = reported_and_seen(name, short_sequence=short)
    assert len(sites) == len(seen) == SMALL[name].attentions
    assert sorted(s.layout or "" for s in sites) == sorted(seen)
    assert any(layout.startswith(expected) for layout in seen)
    for site in sites:
        if (site.layout or "").startswith("as the model left it"):
            assert re.search(r"^wanted bs\w+, but (\w+.* copies q|they come from different GEMMs)", site.detail["layout"]), site.detail


@pytest.mark.parametrize("name", EXPECTED)
def test_the_reported_layout_is_in_memory(name: str, no_codegen: None) -> None:
    check(name, 512, EXPECTED[name])


@pytest.mark.parametrize(("name", "expected"), [("bert", "bsh3d"), ("vit", "bsh3d"), ("llama", "bshd_bsh2d"), ("gemma3", "bshd_bsh2d")])
def test_above_the_short_length_it_is_interleaved(name: str, expected: str, no_codegen: None) -> None:
    check(name, 4, expected)


def test_generated_code_keeps_it() -> None:
    check("bert", 512, "bs3hd")


def qkv(b: int, s: int, h: int, d: int, interleaved: bool) -> list[Tensor]:
    buffer = torch.empty(b, s, *((h, 3, d) if interleaved else (3, h, d)))
    return [t.transpose(1, 2) for t in buffer.unbind(-2 if interleaved else -3)]


@pytest.mark.parametrize("interleaved", [False, True])
def test_names_are_told_from_memory_alone(interleaved: bool) -> None:
    q, k, v = qkv(2, 5, 3, 4, interleaved)
    name = "bsh3d" if interleaved else "bs3hd"
    assert in_memory(q, k, v).name == name
    assert in_memory(*(t.transpose(0, 2).contiguous().transpose(0, 2) for t in (q, k, v))) is None  # [H, ...]: no name
    assert in_memory(q, v, k) is None  # another order
    assert in_memory(q, k, v.clone()) is None  # another buffer
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert in_memory(*apart).name == "bshd_bshd_bshd"
    assert in_memory(apart[0], *qkv(2, 5, 3, 4, interleaved)[1:]) is None  # two of three: not side by side in a row of two
    first = [t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (q, k, v)]
    assert in_memory(*first).name == "sbhd_sbhd_sbhd"
    pair = torch.empty(2, 5, 2, 3, 4).unbind(-3)
    assert in_memory(apart[0], *(t.transpose(1, 2) for t in pair)).name == "bshd_bs2hd"
