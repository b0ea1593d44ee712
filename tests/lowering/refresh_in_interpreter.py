"""Run by `test_refresh.py` with TRITON_INTERPRET=1: the kernels that requantize kept weights, and the cache that launches them.

Unlike hardware, the interpreter loses the carry when it rounds to FP8, and a NaN. So where bits are compared, the weights are FP8 values
times a power of two, which their scale undoes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import te_dynamo
from te_dynamo import weight_cache
from te_dynamo.backend import te_fp8
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.kernels import refresh
from te_dynamo.lowering.kernels.refresh import KeptGemm, Refresh, readable
from te_dynamo.lowering.quantized import Quantized
from te_dynamo.lowering.registry import implementation_of
from te_dynamo.passes.lower import CachedWeights
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Float8RowwiseScaling, Recipe
from te_dynamo.state import STATE
from tests.numerics import sqnr

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RECIPES = [
    DelayedScaling(),
    Float8CurrentScaling(),
    Float8CurrentScaling(power_2_scale=True),
    Float8CurrentScaling(amax_epsilon=448.0 * 4),
    Float8RowwiseScaling(),
    Float8RowwiseScaling(power_2_scale=False),
]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: Any) -> Iterator[None]:
    monkeypatch.setattr(refresh, "DEVICES", ("cpu",))
    monkeypatch.setattr(weight_cache, "sample_of", lambda t: torch.empty(0, dtype=torch.uint8))
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield


def exact(rows: int, columns: int, dtype: torch.dtype, exponent: int = 0, top: float = 448.0) -> Tensor:
    """FP8 values, `top` the largest of each row, times a power of two."""
    w = torch.randn(rows, columns).mul(20).clamp(-200, 200).to(torch.float8_e4m3fn).float()
    w[w.abs() < 1] = 0  # smaller values may have fewer digits
    w[torch.arange(rows), torch.arange(rows) % columns] = top
    return (w * 2.0**exponent).to(dtype)


class Linears:
    """Some linears of one input, and the copies of their weights."""

    def __init__(
        self,
        recipe: Recipe,
        sizes: tuple[int, ...],
        columns: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        merged: bool = False,
        interleave: int = 0,
        kind: str = "inference",
        across: bool = False,
    ) -> None:
        attributes = {"out_dtype": dtype, "merged": merged, "interleave": interleave, "sizes": sizes, "in_features": columns}
        self.call = Call("linears", "reference", "cpu", (dtype, (), ()), recipe.key, cached=kind, attributes=attributes)
        made = [exact(n, columns, dtype) for n in sizes]
        self.weights = [w.t().contiguous().t() for w in made] if across else made
        self.made = self.defined()

    def defined(self) -> list[Quantized]:
        return implementation_of(self.call).quantize_weights(self.call, self.weights)

    def gemms(self) -> list[KeptGemm]:
        how = implementation_of(self.call).kept_as(self.call)
        assert how is not None and all(readable(w, w) for w in self.weights)
        return [KeptGemm(how, [self.weights[i] for i in gemm], q) for gemm, q in zip(how.gemms, self.made, strict=True)]

    def right(self) -> bool:
        return all(same(a, b) for q, d in zip(self.made, self.defined(), strict=True) for a, b in zip(q, d, strict=True))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    bits = [t.flatten().view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and torch.equal(*bits)


def spoiled(linears: Linears) -> None:
    for q in linears.made:
        for t in q:
            if t is not None:
                t.fill_(1)


SHAPES: list[tuple[tuple[int, ...], int, dict[str, Any]]] = [
    ((64,), 256, {}),
    ((100,), 37, {}),
    ((1,), 5, {}),
    ((33, 7), 130, {}),
    ((33, 7, 50), 72, {"merged": True}),
    ((32, 32, 32), 72, {"merged": True, "interleave": 8}),
    ((48,), 40, {"across": True}),
]


# Each shape with half of the recipes, alternating dtypes and kinds.
CASES = [
    (shape, RECIPES[(i + 2 * j) % 6], DTYPES[(i + j) % 3], ("inference", "training")[j % 2])
    for i, shape in enumerate(SHAPES)
    for j in range(3)
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_changed_is_made_again_and_nothing_else(case):
    (sizes, columns, how), recipe, dtype, kind = CASES[case]
    kind = "inference" if isinstance(recipe, Float8RowwiseScaling) else kind
    linears = Linears(recipe, sizes, columns, dtype, kind=kind, **how)
    again = Refresh(linears.gemms())
    assert linears.right()
    spoiled(linears)  # not overwritten while nothing changes
    again()
    assert all(bool((t.float() == 1).all()) for q in linears.made for t in q if t is not None)
    for exponent, top in ((3, 448.0), (-2, 288.0 if getattr(recipe, "power_2_scale", False) else 448.0)):
        for w in linears.weights:
            w.copy_(exact(*w.shape, dtype, exponent, top))
        again()
        assert linears.right(), exponent


@pytest.mark.parametrize("recipe", [Float8CurrentScaling(), Float8RowwiseScaling()])
def test_scales_of_any_values(recipe):
    """If values are not exact in FP8, the copy differs by the interpreter's rounding, but scales do not."""
    linears = Linears(recipe, (40,), 50, torch.float32)
    again = Refresh(linears.gemms())
    (w,), (made,) = linears.weights, linears.made
    for change in (torch.zeros_like(w), torch.randn_like(w) * 1e-41, torch.randn_like(w) * 5e37, torch.randn_like(w)):
        w.copy_(change)
        w[3, 4] = torch.nan  # does not count
        again()
        assert torch.equal(made.scale_inv, linears.defined()[0].scale_inv)
    numbers = ~w.isnan()
    assert sqnr(w[numbers], (made.data.float() * made.scale_inv)[numbers]) > 20
    w.fill_(1)
    w[5, 6] = torch.inf
    again()
    (defined,) = linears.defined()
    assert torch.equal(made.scale_inv.isnan(), defined.scale_inv.isnan()) and torch.equal(made.data.float(), defined.data.float())


def test_several_gemms_of_several_recipes():
    """If a weight changes, only its GEMM is quantized again, with all of the weights that are merged in it."""
    everyone = [Linears(recipe, (32, 16), 48, DTYPES[i % 3], merged=True) for i, recipe in enumerate(RECIPES)]
    again = Refresh([gemm for linears in everyone for gemm in linears.gemms()])
    for changed in (everyone[0], everyone[-1]):
        for linears in everyone:
            spoiled(linears)
        changed.weights[1].copy_(exact(16, 48, changed.weights[1].dtype, 1))
        again()
        assert [linears.right() for linears in everyone] == [linears is changed for linears in everyone]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 64), (512, 512), (1000, 3)])
def test_samples_are_spread(shape):
    """All elements of a small weight; the same number of a larger one, from all regions."""
    linears = Linears(Float8CurrentScaling(), shape[:1], shape[1])
    offsets = Refresh(linears.gemms()).offsets[0]
    elements = shape[0] * shape[1]
    assert len(offsets.unique()) == min(elements, refresh.SAMPLES) and offsets.min() >= 0 and offsets.max() < elements
    if elements > refresh.SAMPLES:
        for of_dim in (offsets // shape[1], offsets % shape[1]):
            counts = torch.bincount(of_dim * 4 // (of_dim.max() + 1) if of_dim.max() > 3 else of_dim)
            assert counts.min() > 0.8 * counts.float().mean()


def test_what_differs_in_2_percent_is_seen():
    linears = Linears(Float8CurrentScaling(), (128,), 128)
    again = Refresh(linears.gemms())
    for seed in range(3):
        torch.manual_seed(seed)
        linears.weights[0][torch.rand(128, 128) < 0.02] *= -1
        again()
        assert linears.right()


@pytest.mark.parametrize("recipe", [DelayedScaling(), Float8RowwiseScaling()])
def test_experts(recipe):
    """Their matrices are stored one after the other; if a model stores them inputs first, the kernel cannot read them."""
    attributes = {"out_dtype": torch.bfloat16, "in_features": 40, "inputs_first": False}
    call = Call("grouped_linear", "native", "cuda", (torch.bfloat16, ()), recipe.key, cached="inference", attributes=attributes)
    weights = torch.stack([exact(24, 40, torch.bfloat16, exponent) for exponent in (0, 0, -1)])
    cached = CachedWeights((0,), (lambda w: w,), call, ((True, True, False, False, False, False),))
    copies = cached.make([weights])
    again = Refresh(cached.made_again([weights], copies))
    for changed in (1, 2):
        weights[changed] = exact(24, 40, torch.bfloat16, changed)
        again()
        assert all(same(a, b) for a, b in zip(copies, cached.make([weights]), strict=True))
    assert cached.made_again([weights.mT.contiguous().mT], copies) == []


# -- wired into the cache


def another() -> Tensor:
    return exact(32, 32, torch.float32, -11)


class Model(nn.Module):
    """Two linears of one input, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32, bias=False) for _ in range(3))
        for linear in self.children():
            linear.weight = nn.Parameter(another())

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.first(x)) + self.second(x))


def through_data(w: nn.Parameter) -> None:
    w.data.mul_(-2)


def copied(w: nn.Parameter) -> None:
    w.data.copy_(another())


def by_numpy(w: nn.Parameter) -> None:
    memory = w.detach().numpy()
    np.negative(memory, out=memory)
    memory *= 2


def address_comes_back(w: nn.Parameter) -> None:
    old = w.data
    w.data = another()
    old.mul_(-2)
    w.data = old


def by_a_flat_buffer(w: nn.Parameter) -> None:
    """Writes through a flat buffer, of which the weight has been a view since before the first call."""
    w.flat.mul_(-2)  # type: ignore[attr-defined]


def left_alone(model: nn.Module) -> None:
    for p in model.parameters():
        p.flat = torch.cat([torch.zeros(3), p.detach().flatten()])  # type: ignore[attr-defined]
        p.data = p.flat[3:].view(p.shape)  # type: ignore[attr-defined]


CHANGES = [through_data, copied, by_numpy, address_comes_back, by_a_flat_buffer]


def compiled(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend=te_fp8, options={"provider": "reference", "recipe": "current"} | options)


@pytest.mark.parametrize(("change", "recipe"), [*((change, "current") for change in CHANGES), (copied, "delayed"), (copied, "rowwise")])
def test_weights_that_changed_unseen_are_made_again(change, recipe, no_codegen, monkeypatch):
    launched: list[str] = []
    look, write = Refresh._look, Refresh._write
    monkeypatch.setattr(Refresh, "_look", lambda self, record: launched.append("look") or look(self, record=record))
    monkeypatch.setattr(Refresh, "_write", lambda self: launched.append("write") or write(self))
    model, x = Model().eval(), torch.randn(16, 32)
    left_alone(model)
    run = compiled(model, recipe=recipe)
    with torch.no_grad():
        for _ in range(2):
            assert sqnr(model(x), run(x)) > 20
        for weight in (model.first.weight, model.third.weight):
            versions = [p._version for p in model.parameters()]
            change(weight)
            launched.clear()
            y = run(x)
            assert launched == ["look", "write"] and versions == [p._version for p in model.parameters()]
            assert sqnr(model(x), y) > 20
            te_dynamo.weights_changed(model)
            assert torch.equal(y, run(x))


def test_not_noticed_without_it(no_codegen, monkeypatch):
    """Without the kernel, the tests here would fail."""
    monkeypatch.setattr(refresh, "DEVICES", ())
    model, x = Model().eval(), torch.randn(16, 32)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        through_data(model.first.weight)
        assert sqnr(model(x), run(x)) < 5
        te_dynamo.weights_changed(model)
        assert sqnr(model(x), run(x)) > 20


def test_kept_in_training(no_codegen):
    model, x = Model(), torch.randn(16, 32)
    run = compiled(model, keep_weights=True)
    run(x).sum().backward()
    through_data(model.third.weight)
    for w in (w.weight for w in model.children()):
        w.grad = None
    y = run(x)
    y.sum().backward()
    found = [w.weight.grad for w in model.children()]
    assert sqnr(model(x), y) > 20
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(sqnr(e, f) > 15 for e, f in zip(expected, found, strict=True))


def test_seen_and_unseen_at_once(no_codegen):
    """A weight that is requantized because the host saw it change must not hide one that only the samples show."""
    model, x = Model().eval(), torch.randn(16, 32)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        through_data(model.first.weight)
        model.third.weight.mul_(-2)
        assert sqnr(model(x), run(x)) > 20
        through_data(model.third.weight)
        model.second.weight = nn.Parameter(another())
        assert sqnr(model(x), run(x)) > 20


def test_two_graphs_of_one_model(no_codegen):
    model, x = Model().eval(), torch.randn(16, 32)
    runs = [compiled(model), compiled(lambda x: model.second(x).relu())]
    truths = [model, lambda x: model.second(x).relu()]
    with torch.no_grad():
        for _ in range(3):
            for run, truth in zip(runs, truths, strict=True):
                assert sqnr(truth(x), run(x)) > 20
            through_data(model.second.weight)


def test_inside_a_cuda_graph(no_codegen, monkeypatch):
    """A copy that was not made before capture is made by the graph at each replay, and not kept; kept ones live as long as the process."""
    model, x = Model().eval(), torch.randn(16, 32)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        (copies,) = [c for cache in weight_cache.WeightCache.everyone for c in cache.entries.values()]
        kept: list[Any] = []
        monkeypatch.setattr(weight_cache, "_capturing", lambda tensors: True)
        monkeypatch.setattr(weight_cache, "_IN_CUDA_GRAPHS", kept)
        for _ in range(2):
            run(x)
        assert len(kept) == 1 and kept[0] == (copies.kept, copies.refreshes) and copies.refreshes
        before = copies.kept
        model.first.weight.mul_(-2)
        assert sqnr(model(x), run(x)) > 20 and copies.kept is before and len(kept) == 1


def test_a_weight_that_the_model_casts_is_left_to_its_version(no_codegen):
    model, x = Model().eval(), torch.randn(16, 32)
    run = compiled(lambda x: nn.functional.linear(x.bfloat16(), model.first.weight.bfloat16()))
    with torch.no_grad():
        run(x)
        (copies,) = [c for cache in weight_cache.WeightCache.everyone for c in cache.entries.values()]
        assert not copies.refreshes
