"""`te_dynamo.release_high_precision`: a compiled model's results do not change, and the memory is freed."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import te_dynamo
from te_dynamo import weight_cache
from te_dynamo.fp8_weight import FP8Weight
from te_dynamo.release import Released
from tests.models import SMALL
from tests.numerics import sqnr

pytestmark = pytest.mark.usefixtures("no_codegen")


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Adapted(nn.Module):
    """A frozen linear with a LoRA adapter."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a, self.b = nn.Linear(width, 16, bias=False), nn.Linear(16, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def frozen(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return model.to(dtype).eval().requires_grad_(False)


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="te_fp8", fullgraph=True, options=options)


def called(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Tensor]:
    run = compiled(model, **options)
    return run, run(x)


def fp8_bytes() -> int:
    """Bytes of all copies that any graph keeps."""
    copies = [t for kept in weight_cache.SHARED.values() for t in kept.copies]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in copies if t.element_size() == 1}.values())


@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_bit_stays_and_the_memory_is_free(recipe, dtype):
    model, x = frozen(nn.Sequential(Block(), Block()), dtype), torch.randn(8, 64, dtype=dtype)
    high = model(x)
    run, before = called(model, x, recipe=recipe)
    weight = weakref.ref(model[0].up.weight)
    released = te_dynamo.release_high_precision(run)
    gc.collect()
    assert weight() is None
    assert released.names == ["0.up.weight", "0.down.weight", "1.up.weight", "1.down.weight"]
    assert released.freed == sum(m.weight.numel() for b in model for m in (b.up, b.down)) * dtype.itemsize
    assert torch.equal(run(x), before)
    assert model[0].up.weight.dtype == dtype and not model[0].up.weight.requires_grad
    # Other readers of the weight get the FP8 values.
    assert sqnr(high, model(x)) > 20 and not torch.equal(high, model(x))


def test_it_is_still_fp8_and_each_length_has_the_same_copies():
    gc.collect()
    already = fp8_bytes()
    model = frozen(nn.Sequential(Block(), Block()))
    elements = sum(m.weight.numel() for b in model for m in (b.up, b.down))
    _run, _ = called(model, torch.randn(8, 64, dtype=torch.bfloat16))
    assert fp8_bytes() - already == elements
    te_dynamo.release_high_precision(model)
    for tokens in (8, 16, 24):
        torch._dynamo.reset()
        x = torch.randn(tokens, 64, dtype=torch.bfloat16)
        report = te_dynamo.explain(model, x)
        assert report.fp8_flop_fraction == 1
        torch.compile(model, backend="te_fp8", dynamic=False)(x)
        assert fp8_bytes() - already == elements


def test_graphs_of_other_lengths_share_copies_before_it_too():
    gc.collect()
    already = fp8_bytes()
    model = frozen(Block())
    run = torch.compile(model, backend="te_fp8", options={"recipe": "rowwise"}, dynamic=False)
    x = torch.randn(24, 64, dtype=torch.bfloat16)
    outputs = [run(x[:tokens])[:8] for tokens in (8, 16, 24)]
    assert fp8_bytes() - already == model.up.weight.numel() + model.down.weight.numel()
    assert all(torch.equal(outputs[0], other) for other in outputs)
    model.up.weight.mul_(2)  # every graph sees it
    again = [run(x[:tokens])[:8] for tokens in (8, 16, 24)]
    assert not torch.equal(outputs[0], again[0]) and all(torch.equal(again[0], other) for other in again)
    assert fp8_bytes() - already == model.up.weight.numel() + model.down.weight.numel()


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_lora_trains_on_bit_for_bit(recipe):
    torch.manual_seed(0)
    x, target = torch.randn(32, 64), torch.randn(32, 64)

    def losses(release: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = Adapted()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        run, found = compiled(model, recipe=recipe, provider="reference"), []
        for step in range(6):
            if step == 3 and release:
                assert te_dynamo.release_high_precision(run).names == ["base.weight"]
                assert isinstance(model.base.weight, FP8Weight)
            loss = F.mse_loss(run(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return found

    assert losses(release=True) == losses(release=False)


def test_loading_brings_high_precision_back():
    model, other, x = frozen(Block()), frozen(Block()), torch.randn(8, 64, dtype=torch.bfloat16)
    run, _ = called(model, x)
    te_dynamo.release_high_precision(run)
    run(x)
    model.load_state_dict({"up.bias": other.up.bias}, strict=False)
    assert isinstance(model.up.weight, FP8Weight)
    model.load_state_dict(other.state_dict())
    assert type(model.up.weight) is nn.Parameter and torch.equal(model(x), other(x))
    after = run(x)
    assert te_dynamo.release_high_precision(run).names == ["up.weight", "down.weight"]  # and again
    assert torch.equal(after, compiled(other)(x))


def test_it_is_neither_written_nor_saved_and_the_adapters_are():
    model, x = Adapted(), torch.randn(32, 64)
    run = compiled(model, provider="reference", recipe="current")
    run(x).sum().backward()
    te_dynamo.release_high_precision(run)
    with pytest.raises(RuntimeError, match="let go by te_dynamo.release_high_precision.*cannot be saved.*load_state_dict"):
        torch.save(model.state_dict(), io.BytesIO())
    with pytest.raises(RuntimeError, match="cannot be saved"):
        safetensors.torch.save(model.state_dict())
    with pytest.raises(RuntimeError, match="cannot be written"):
        model.base.weight.zero_()
    torch.save({name: t for name, t in model.state_dict().items() if not name.startswith("base.w")}, io.BytesIO())
    saved = io.BytesIO()
    torch.save(model.base.weight.dequantize(), saved)
    saved.seek(0)
    assert sqnr(torch.load(saved), model.base.weight.dequantize()) == float("inf")
    twin = copy.deepcopy(model)
    assert twin.base.weight is not model.base.weight and torch.equal(twin(x), model(x))
    assert torch.equal(model.bfloat16().base.weight, twin.base.weight.dequantize().bfloat16())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class AlsoRead(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up.weight.sum()


class SecondAlsoRead(nn.Module):
    """Two linears of one GEMM."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gate(x)) * self.up(x) + self.up.weight.sum()


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both.chunk(2)
        return F.linear(x, a) * F.linear(x, b)


def _view_of_a_buffer() -> nn.Module:
    model = Block()
    model.up.weight.data = torch.randn(200, 64)[:128]
    return model


LEFT = [
    (Tied, {}, "embedding.weight", "not one module holds it, but several, or none"),
    (AlsoRead, {}, "up.weight", "a graph reads it in high precision too"),
    (SecondAlsoRead, {}, "up.weight", "a graph reads it in high precision too"),
    (Part, {}, "both", "a part of it is the weight of a linear, or another form of it"),
    (_view_of_a_buffer, {}, "up.weight", "it is a view of a larger tensor, which would stay"),
    (Block, {}, "norm.weight", "no compiled graph keeps an FP8 copy of it"),
    (Block, {"recipe": "block"}, "up.weight", "its FP8 copy has other scales than one for the weight or for each row"),
]


def test_a_square_weight_that_is_read_transposed():
    """Its copy is transposed, which the shape does not show."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    model = frozen(Square())
    called(model, torch.randn(16, 64, dtype=torch.bfloat16))
    before = model.w.detach().clone()
    assert te_dynamo.release_high_precision(model).names == ["w"]
    assert sqnr(before, model.w.dequantize()) > 25


def test_a_cast_leaves_the_values_in_fp8_and_others_cannot_be_set():
    model, x = frozen(Block()), torch.randn(16, 64, dtype=torch.bfloat16)
    run, _ = called(model, x)
    te_dynamo.release_high_precision(model)
    weight, expected = model.up.weight, run(x)
    for other in (torch.zeros(128, 64, dtype=torch.bfloat16), torch.zeros(128, 64), torch.zeros(64, 128, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="cannot be written.*Remedy"):
            weight.data = other
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        assert model.up.weight is weight and weight.dtype == dtype and torch.equal(weight.dequantize(), weight.values().to(dtype))
        with pytest.raises(RuntimeError, match="invalid python storage"):  # its memory is gone
            Tensor.untyped_storage(weight).data_ptr()
    assert torch.equal(run(x), expected)


@pytest.mark.parametrize("case", LEFT, ids=lambda case: case[3])
def test_what_is_left_is_told_why(case):
    make, options, name, reason = case
    model, x = frozen(make(), torch.float32), torch.randn(8, 64)
    run, before = called(model, x, **options)
    released = te_dynamo.release_high_precision(run)
    assert name not in released.names and released.left[name] == reason
    assert reason in str(released)
    assert torch.equal(run(x), before)
    assert te_dynamo.release_high_precision(run).left.items() >= {(name, "it was released before") for name in released.names}


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.data.copy_(w.data * 2)], ids=["in place", "through .data"])
def test_what_changed_since_the_last_call_is_left(write):
    model, x = frozen(Block()), torch.randn(8, 64, dtype=torch.bfloat16)
    run, _ = called(model, x)
    write(model.up.weight)
    released = te_dynamo.release_high_precision(run)
    assert released.names == ["down.weight"] and "changed since" in released.left["up.weight"]
    run(x)
    assert te_dynamo.release_high_precision(run).names == ["up.weight"]


def test_one_that_learns_keeps_its_gemm():
    """q, k and v are one GEMM, with one copy."""
    model = Merged()
    model.k.weight.requires_grad_(True)
    x = torch.randn(2, 16, 64)
    run = compiled(model)
    with torch.no_grad():
        before = run(x)
        released = te_dynamo.release_high_precision(run)
        assert released.left["k.weight"] == "it learns (requires_grad)"
        assert torch.equal(run(x), before)


class Merged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (4, 16)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("length", [16, 528])
def test_the_weights_of_one_gemm(length):
    """For long sequences, their rows are ordered head by head."""
    model, x = frozen(Merged(), torch.bfloat16), torch.randn(1, length, 64, dtype=torch.bfloat16)
    high = [m.weight.clone() for m in (model.q, model.k, model.v)]
    run, before = called(model, x)
    assert te_dynamo.release_high_precision(run).names == ["q.weight", "k.weight", "v.weight", "o.weight"]
    assert torch.equal(run(x), before)
    assert all(sqnr(w, m.weight.dequantize()) > 28 for w, m in zip(high, (model.q, model.k, model.v), strict=True))


def test_a_real_model():
    """GPT-2's weights are stored inputs first; its head is tied to its embedding."""
    model, inputs = frozen(SMALL["gpt2"].model(), torch.float32), SMALL["gpt2"].inputs()
    run = compiled(model, recipe="current")
    with torch.no_grad():
        before = run(**inputs).logits
        released = te_dynamo.release_high_precision(run)
        assert [n for n in released.left if n.endswith("weight") and "ln_" not in n] == ["transformer.wte.weight", "transformer.wpe.weight"]
        assert torch.equal(run(**inputs).logits, before)


def test_nothing_to_release():
    assert te_dynamo.release_high_precision(nn.Linear(16, 16)) == Released(
        left=dict.fromkeys(("weight", "bias"), "it learns (requires_grad)")
    )


@given(st.sampled_from([0.0, 1.0, 0.3, -0.7]), st.booleans(), st.integers(0, 2**31), st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=60, deadline=None)
def test_its_values_are_quantized_to_the_same(margin, by_row, seed, size):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 32, generator=generator) * size
    w[0] = 0
    top = 448.0 * 2**-margin

    def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
        amax = w.abs().amax(1, keepdim=True) if by_row else w.abs().amax()
        scale = torch.where(amax > 0, top / amax, 1.0)
        return (w * scale).clamp(-448, 448).to(torch.float8_e4m3fn), 1 / scale

    data, inverse = quantize(w)
    weight = FP8Weight(
        data, inverse, w.shape, w.stride(), torch.float32, False, (top, float(torch.tensor(min(top, 448.0)).to(torch.float8_e4m3fn)))
    )
    again, inverse_again = quantize(weight.detach().values())
    assert torch.equal(again.view(torch.uint8), data.view(torch.uint8))
    torch.testing.assert_close(inverse_again, inverse, rtol=1e-6, atol=0)
