"""Unmodified Hugging Face models: one graph, every linear and attention a site, FP8's error and no more."""

from __future__ import annotations

import copy

import pytest
import torch

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.sites import Site
from tests.models import CASES, SMALL, Case, cases, output
from tests.numerics import sqnr

pytestmark = pytest.mark.usefixtures("no_codegen")
slow = (pytest.mark.slow, pytest.mark.inductor)
MATRIX = [
    *(
        pytest.param(name, *how, marks=pytest.mark.inductor if name == "llama" else (), id=f"{name}-{how[0]}-{how[1]}-quick")
        for name, how in {
            "llama": ("sdpa", torch.bfloat16),
            "gemma3": ("eager", torch.bfloat16),
            "gpt2": ("eager", torch.float32),
            "bert": ("sdpa", torch.float32),
            "vit": ("eager", torch.bfloat16),
            "t5": ("sdpa", torch.bfloat16),
        }.items()
    ),
    *(
        pytest.param(name, attention, dtype, marks=slow, id=f"{name}-{attention}-{dtype}")
        for name in CASES
        for attention in ("sdpa", "eager")
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def check_sites(case: Case, sites: list[Site]) -> None:
    taken = [s for s in sites if s.provider and s.kind in ("linear", "norm_linear", "activation_linear")]
    left = [(s.path, s.reason) for s in sites if not s.provider and s.kind == "linear"]
    assert len(taken) == case.linears, left
    assert all("logits" in str(reason) for _, reason in left), left
    assert len({s.path for s in taken}) == case.linears
    attentions = [s for s in sites if s.kind == "attention"]
    assert [s.reason for s in attentions] == [None] * case.attentions
    assert all(s.layout for s in attentions)


@pytest.mark.parametrize(("name", "attention", "dtype"), MATRIX)
def test_trains_and_infers_as_one_graph(name, attention, dtype, request):
    quick = request.node.get_closest_marker("slow") is None
    case = (SMALL if quick else CASES)[name]
    model = case.model(attention, dtype)
    reference = copy.deepcopy(model)
    graphs: list[list[Site]] = []
    fp8 = torch.compile(model, backend=te_fp8, fullgraph=True)
    inputs = case.inputs(dtype)
    with observing(lambda gm, sites, options: graphs.append(list(sites))):
        for _ in range(2):
            model.zero_grad()
            y = output(fp8(**inputs))
            (y.float() * weights_of(y)).mean().backward()
    assert len(graphs) == 1
    check_sites(case, graphs[0])

    y_ref = output(reference(**inputs))
    (y_ref.float() * weights_of(y_ref)).mean().backward()
    assert y.dtype == y_ref.dtype
    assert 17 < sqnr(y_ref, y) < 60
    pairs = zip(reference.named_parameters(), model.parameters(), strict=True)
    gradients = {path: (p_ref.grad, p.grad) for (path, p_ref), p in pairs if p_ref.grad is not None}
    largest = max(exact.norm() for exact, _ in gradients.values())
    noise = [path for path, (exact, _) in gradients.items() if exact.norm() < 1e-5 * largest]
    assert all("k" in path and path.endswith("bias") for path in noise)  # a key's bias does not change a softmax
    assert {path: e for path, pair in gradients.items() if path not in noise and (e := sqnr(*pair)) < 7} == {}

    graphs.clear()
    model.eval(), reference.eval()
    with torch.no_grad(), observing(lambda gm, sites, options: graphs.append(list(sites))):
        y, y_ref = output(fp8(**inputs)), output(reference(**inputs))
    assert len(graphs) == 1
    check_sites(case, graphs[0])
    assert 17 < sqnr(y_ref, y) < 60


def weights_of(y: torch.Tensor) -> torch.Tensor:
    """Weights for a loss: with a sum of squares, the output of a last LayerNorm gives a constant, and all gradients would be noise."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("plain", ["aot_eager", pytest.param("inductor", marks=slow)])
@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_lengths_that_change_recompile_once_more_at_most(name, plain):
    case = SMALL[name]

    def graphs(backend) -> int:
        torch._dynamo.reset()
        count = []

        def counting(gm, inputs):
            count.append(1)
            return backend(gm, inputs)

        run = torch.compile(case.model(), backend=counting)
        for length in (10, 13, 18, 29):
            output(run(**case.inputs(length=length))).sum().backward()
        return len(count)

    assert graphs(te_fp8) <= graphs(torch._dynamo.lookup_backend(plain)) + 1


@pytest.mark.parametrize("count", [2, 8])
def test_per_layer_compile_gives_each_layer_its_own_scales(count):
    """With one graph, however many layers there are."""
    case = cases(count)["llama"]
    model = case.model()
    layers = model.model.layers
    seen: list[object] = []
    for layer in layers:
        layer.compile(backend=te_fp8, fullgraph=True)
    with observing(lambda gm, sites, options: seen.append(sites)):
        for _ in range(2):
            output(model(**case.inputs())).square().mean().backward()
    assert len(seen) == 1  # one graph serves all layers
    found = te_dynamo.scale_state(model).state_dict()
    assert len({found[f"model.layers.{i}.mlp.down_proj.weight.scale"].item() for i in range(len(layers))}) == len(layers)
    reference = case.model()
    assert 20 < sqnr(output(reference(**case.inputs())), output(model(**case.inputs())))


def test_accelerate_s_regional_compilation_gives_each_layer_its_own_scales():
    from accelerate.utils import compile_regions

    case = CASES["llama"]
    model, reference = case.model(), case.model()
    compiled = compile_regions(model, backend="te_fp8")
    seen: list[object] = []
    with observing(lambda gm, sites, options: seen.append({s.path for s in sites if s.provider})):
        for _ in range(2):
            output(compiled(**case.inputs())).square().mean().backward()
    layers = [paths for paths in seen if any(path.endswith("down_proj") for path in paths)]  # type: ignore[attr-defined]
    assert len(layers) == 1  # one graph serves all layers
    found = te_dynamo.scale_state(compiled).state_dict()
    count = len(reference.model.layers)
    assert all(
        found[f"model.layers.{i}.mlp.down_proj.{role}.scale"] > 0 for i in range(count) for role in ("input", "weight", "grad_output")
    )
    assert len({found[f"model.layers.{i}.mlp.down_proj.weight.scale"].item() for i in range(count)}) == count
    assert 20 < sqnr(output(reference(**case.inputs())), output(compiled(**case.inputs())))
