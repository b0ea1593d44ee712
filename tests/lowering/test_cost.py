"""When FP8 pays off on a GPU, against plain arithmetic; and that it is asked for each linear."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from te_dynamo.backend import observing, te_fp8
from te_dynamo.lowering.cost import MEMORY_REACHED, Overhead, not_worth_it
from te_dynamo.lowering.devices import H100


def reason(tokens: int, k: int, n: int, *, training: bool, device: str = "cuda") -> str | None:
    with FakeTensorMode():
        x, weight = torch.empty(tokens, k, device=device), torch.empty(n, k, device=device)
    return not_worth_it(x, weight, training=training, device=H100)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("tokens", "k", "n", "pays"),
    [
        (8192, 4096, 14336, True),  # a Llama's MLP: 1 TFLOP; saves a millisecond, and moves 100 MB in 0.1 ms
        (4096, 4096, 4096, True),
        (64, 64, 64, False),  # nothing to save
        (16384, 256, 256, None),
    ],
)
def test_a_large_gemm_pays_and_a_small_one_does_not(tokens, k, n, pays, training):
    found = reason(tokens, k, n, training=training)
    # By hand, in microseconds: half the time of a bf16 GEMM at three quarters of 990 TFLOP/s, against bytes at 3.35 TB/s.
    saved = (3 if training else 1) * 2 * tokens * k * n * (1 / (0.75 * 989.5e6) - 1 / (0.70 * 1979e6))
    bytes_moved, kernels = (6 * n * k + 3 * tokens * (n + k), 2) if training else (tokens * k, 1)
    assert (found is None) == (saved > bytes_moved / (0.85 * 3350e3) + 1.5 * kernels)
    assert pays is None or (found is None) == pays
    assert found is None or f"save {saved:.1f} us" in found


def test_fewer_tokens_never_pay_more():
    """FP8 pays off from some number of tokens on."""
    taken = [reason(2**i, 1024, 1024, training=True) is None for i in range(16)]
    assert not taken[0] and taken[-1] and taken == sorted(taken)


def test_on_a_cpu_nothing_is_refused():
    assert reason(1, 16, 16, training=True, device="cpu") is None


@pytest.mark.parametrize("grad", [True, False])
def test_whoever_selects_asks_for_each_linear(grad, no_codegen, monkeypatch):
    asked = []

    def too_small(x, weight, *, training, shares_input):
        asked.append((tuple(x.shape), tuple(weight.shape), training))
        return "too small to pay" if weight.shape[0] == 16 else None

    monkeypatch.setattr("te_dynamo.lowering.cost.not_worth_it", too_small)
    torch._dynamo.reset()
    model, found = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), {}
    with (
        torch.set_grad_enabled(grad),
        observing(lambda gm, sites, _: found.update({s.path: s.reason for s in sites if s.kind == "linear"})),
    ):
        torch.compile(lambda x: model(x), backend=te_fp8, options={"include_logits": True})(torch.randn(8, 32))
    assert {path[-1]: reason for path, reason in found.items()} == {"0": None, "2": "too small to pay"}
    assert set(asked) == {((8, 32), (48, 32), grad), ((8, 48), (16, 48), grad)}


@pytest.mark.parametrize("order", ["qk", "kq"])
def test_k_pays_where_q_has_quantized_its_input(order, no_codegen, monkeypatch):
    def too_small(x, weight, *, training, shares_input):
        return None if weight.shape[0] == 48 or shares_input else "too small to pay"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.alone, self.o = nn.Linear(32, 48), nn.Linear(32, 16), nn.Linear(48, 16), nn.Linear(16, 48)

        def forward(self, x):
            made = {name: getattr(self, name)(x) for name in order}
            return self.o(self.alone(made["q"] + made["k"].repeat(1, 3)))

    monkeypatch.setattr("te_dynamo.lowering.cost.not_worth_it", too_small)
    torch._dynamo.reset()
    found = {}
    with observing(lambda gm, sites, _: found.update({s.path: s.reason for s in sites if s.kind == "linear"})):
        torch.compile(Model(), backend=te_fp8, options={"include_logits": True})(torch.randn(8, 32))
    assert found == {"q": None, "k": None, "alone": "too small to pay", "o": None}


def test_a_region_without_gradients_is_inference(no_codegen, monkeypatch):
    """Its weights are quantized once, so it may pay where training does not; and what trains beside it quantizes its input by itself."""
    asked: set[tuple[int, bool, bool]] = set()

    def too_small(x, weight, *, training, shares_input):
        asked.add((weight.shape[0], training, shares_input))
        return "too small to pay" if weight.shape[0] == 16 and not shares_input else None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(32, 48), nn.Linear(32, 16)

        def forward(self, x):
            learned = self.student(x)
            with torch.no_grad():
                taught = self.teacher(x)
            return learned.mean() + taught.mean()

    monkeypatch.setattr("te_dynamo.lowering.cost.not_worth_it", too_small)
    torch._dynamo.reset()
    torch.compile(Model(), backend=te_fp8, options={"include_logits": True})(torch.randn(8, 32))
    assert asked == {(48, True, False), (16, False, False)}


def test_the_device_at_hand_decides(monkeypatch):
    """A known GPU's own peaks count, as an RTX 4090's, whose memory is slow compared with its GEMMs' gain; else an H100's."""
    from te_dynamo.lowering.devices import H100, PEAKS, peak_of

    names = iter(["NVIDIA GeForce RTX 4090", "a GPU of tomorrow"])
    peak_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert peak_of(torch.device("cuda", 0)) is PEAKS["NVIDIA GeForce RTX 4090"]
    assert peak_of(torch.device("cuda", 1)) is H100
    peak_of.cache_clear()


# --- torchao's own model of its kernels, benchmarks/float8/float8_roofline.py and torchao/testing/training/roofline_utils.py: its numbers
# for an H100, with memory slower than in the datasheet, and the bytes that its kernels read and write for each element.

AO_BANDWIDTH, AO_LAUNCH = 2.4e12 * 0.92, 2e-6
AO_GEMM = {1: 1979e12 * 0.78, 2: 989e12 * 0.78}  # by bytes of an operand's element
# By recipe, for a weight, and for an input or gradient with which the kernel before is fused: bytes for each kernel.
AO_CASTS = {"tensorwise": ((2, 0, 3, 3), (0, 0, 4)), "rowwise": ((3, 4, 3), (3, 3))}
# Our cost model with torchao's bytes, and as many kernels as we launch.
AS_TORCHAO = {"tensorwise": Overhead(8, 3, 3, kernels=4), "rowwise": Overhead(10, 6, 6, kernels=4)}
SIZES = (1024, 2048, 4096, 8192, 16384)


def torchao_pays(m: int, k: int, n: int, recipe: str) -> bool:
    def gemms(itemsize: int) -> float:
        def one(m: int, k: int, n: int) -> float:
            moved = itemsize * (m * k + k * n) + 2 * m * n
            return max(2 * m * k * n / AO_GEMM[itemsize], moved / AO_BANDWIDTH, AO_LAUNCH)

        return one(m, k, n) + one(m, n, k) + one(k, m, n)

    of_weight, of_others = AO_CASTS[recipe]
    casts = [b * k * n for b in of_weight] + [b * elements for elements in (m * k, m * n) for b in of_others]
    return gemms(2) > gemms(1) + sum(max(b / AO_BANDWIDTH, AO_LAUNCH) for b in casts)


def we_take(recipe: str) -> dict[tuple[int, int, int], bool]:
    device = replace(H100, gbs=AO_BANDWIDTH / 1e9 / MEMORY_REACHED)
    found = {}
    with FakeTensorMode():
        for m, k, n in product(SIZES, repeat=3):
            x, weight = torch.empty(m, k, device="cuda"), torch.empty(n, k, device="cuda")
            found[m, k, n] = not_worth_it(x, weight, training=True, device=device, overhead=AS_TORCHAO[recipe]) is None
    return found


@pytest.mark.parametrize("recipe", list(AO_CASTS))
def test_with_torchao_s_bytes_the_decisions_are_torchao_s(recipe):
    """docs/estimate.md lists the differences, and the effect of our own bytes."""
    ours = we_take(recipe)
    theirs = {shape: torchao_pays(*shape, recipe) for shape in ours}
    differ = {shape for shape in ours if ours[shape] != theirs[shape]}
    assert len(differ) <= 0.1 * len(ours)
    assert {ours[shape] for shape in differ} == {recipe == "tensorwise"}  # more is taken with one scale a tensor, less by rows
    assert any(ours.values()) and not all(ours.values())
    said = (Path(__file__).parents[2] / "docs" / "estimate.md").read_text()
    assert f"{recipe}: {len(ours) - len(differ)} of {len(ours)}" in said
    assert all(" x ".join(map(str, shape)) in said for shape in differ)
