"""The cost of a step besides arithmetic: device synchronization, memory; and that CUDA graphs and recompiles change nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import te_dynamo
from benchmarks.gpu.model import LayerSize, inputs, llama_layer, rotary
from te_dynamo.backend import te_fp8
from te_dynamo.state import STATE
from tests.gpu.device import DEVICE
from tests.gpu.helpers import compiled, mlps, random

pytestmark = pytest.mark.gpu


def trainer(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A training step that reads no number back to the host; it returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def step(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().clone()

    return step


@contextmanager
def no_synchronization() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_instrument_notices_a_synchronization():
    one = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronization():
        one.item()


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_steady_step_does_not_wait_for_the_device(provider, recipe):
    model, x = mlps(), random(4, 64, 256)
    step = trainer(model, compiled(model, provider=provider, recipe=recipe))
    for _ in range(4):
        step(x)
    torch.cuda.synchronize()
    with no_synchronization():
        losses = [step(x) for _ in range(3)]
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_cuda_graphs_change_nothing(provider, recipe):
    """reduce-overhead records and replays every graph: none is skipped, and the losses are the same."""
    found = []
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        counters.clear()
        with STATE.set_aside():
            model = mlps()
            step = trainer(model, compiled(model, provider=provider, recipe=recipe, mode=mode))
            found.append(torch.stack([step(random(4, 64, 256, seed=s)) for s in range(8)]))
        assert counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)
    assert found[1][-1] != found[1][0]


def test_a_recompile_keeps_the_state(small_sites_too):
    """The state is bitwise equal, and the run goes on like one that was never recompiled."""
    found = []
    for again in (False, True):
        torch._dynamo.reset()
        with STATE.set_aside():
            model = mlps()
            step = trainer(model, compiled(model, provider="native"))
            losses = [step(random(4, 64, 256, seed=s)) for s in range(4)]
            if again:
                before = te_dynamo.scale_state(model).state_dict()
                torch._dynamo.reset()
                step = trainer(model, compiled(model, provider="native"))
                after = te_dynamo.scale_state(model).state_dict()
                assert before and before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
            losses += [step(random(4, 64, 256, seed=s)) for s in range(4, 8)]
            found.append((torch.stack(losses), te_dynamo.scale_state(model).state_dict()))
    (losses, state), (losses_again, state_again) = found
    torch.testing.assert_close(losses_again, losses, rtol=1e-5, atol=0)
    assert state.keys() == state_again.keys()
    for key, value in state.items():
        torch.testing.assert_close(state_again[key], value, rtol=1e-2, atol=0, msg=key)


class Stack(nn.Module):
    def __init__(self, size: LayerSize, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(llama_layer(size, DEVICE) for _ in range(layers))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def peak_of_a_step(backend: Any, options: dict[str, Any] | None) -> int:
    """Peak bytes of a training step, including weights, beyond what was allocated before."""
    size, shape = LayerSize(hidden=1024, ffn=3584, heads=8, kv_heads=2), (4, 2048)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    model, (x, dy) = Stack(size, 4), inputs(size, shape, DEVICE)
    cos, sin = rotary(size, shape[1], DEVICE)
    run = torch.compile(model, backend=backend, options=options, dynamic=False)
    for _ in range(3):
        model.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        run(x, cos, sin).backward(dy)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(DEVICE) - before


def test_a_step_needs_no_more_memory_than_in_bf16(provider):
    """Linears keep the activations of 8192 tokens in FP8, which saves more than the weights' FP8 copies need."""
    if provider == "reference":
        pytest.skip("the definition multiplies in float32")
    peak_of_a_step("inductor", None)  # cuBLAS keeps the workspaces of its first calls
    ours, inductor = peak_of_a_step(te_fp8, {"provider": provider}), peak_of_a_step("inductor", None)
    assert ours <= inductor, f"{ours / 2**20:.0f} MiB against {inductor / 2**20:.0f}"


def changed_unseen(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(-2)


@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_weights_that_changed_unseen_are_quantized_again_without_waiting(recipe, mode):
    """Bitwise equal to fresh copies."""
    model, x = mlps().eval(), random(16, 256)
    run = compiled(model, provider="native", recipe=recipe, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        for _ in range(2):
            torch.cuda.synchronize()
            with no_synchronization():
                changed_unseen(model)
                y = run(x).clone()
            te_dynamo.weights_changed(model)
            assert torch.equal(y, run(x))
            assert (y - model(x)).float().norm() < 0.1 * model(x).float().norm()


def test_a_replayed_graph_sees_weights_that_changed():
    model, x = mlps().eval(), random(16, 256)
    run = compiled(model, provider="native", recipe="current")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for _ in range(3):
            run(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = run(x)
        for _ in range(2):
            graph.replay()
            assert (y - model(x)).float().norm() < 0.1 * model(x).float().norm()
            changed_unseen(model)
