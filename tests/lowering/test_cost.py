"""Where FP8 pays on a GPU: against plain arithmetic, and who asks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from te_dynamo.backend import observing, te_fp8
from te_dynamo.lowering.cost import not_worth_it
from te_dynamo.lowering.devices import H100


def reason(tokens: int, k: int, n: int, *, training: bool, device: str = "cuda") -> str | None:
    with FakeTensorMode():
        x, weight = torch.empty(tokens, k, device=device), torch.empty(n, k, device=device)
    return not_worth_it(x, weight, training=training, device=H100)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("tokens", "k", "n", "pays"),
    [
        (8192, 4096, 14336, True),  # a Llama's MLP: 1 TFLOP, a millisecond saved, for 100 MB that are moved in 0.1 ms
        (4096, 4096, 4096, True),
        (64, 64, 64, False),  # nothing to save
        (16384, 256, 256, None),
    ],
)
def test_a_large_gemm_pays_and_a_small_one_does_not(tokens, k, n, pays, training):
    found = reason(tokens, k, n, training=training)
    # By hand, in microseconds: half the time of a bf16 GEMM at three quarters of 990 TFLOP/s, against bytes at 3.35 TB/s.
    saved = (3 if training else 1) * 2 * tokens * k * n * (1 / (0.75 * 989.5e6) - 1 / (0.70 * 1979e6))
    bytes_moved = (6 * n * k + 3 * tokens * (n + k)) if training else tokens * k
    assert (found is None) == (saved > bytes_moved / (0.85 * 3350e3))
    assert pays is None or (found is None) == pays
    assert found is None or f"save {saved:.1f} us" in found


def test_fewer_tokens_never_pay_more():
    """From some number of tokens on it pays."""
    taken = [reason(2**i, 1024, 1024, training=True) is None for i in range(16)]
    assert not taken[0] and taken[-1] and taken == sorted(taken)


def test_on_a_cpu_nothing_is_refused():
    assert reason(1, 16, 16, training=True, device="cpu") is None


@pytest.mark.parametrize("grad", [True, False])
def test_whoever_selects_asks_for_each_linear(grad, no_codegen, monkeypatch):
    asked = []

    def too_small(x, weight, *, training):
        asked.append((tuple(x.shape), tuple(weight.shape), training))
        return "too small to pay" if weight.shape[0] == 16 else None

    monkeypatch.setattr("te_dynamo.passes.select.not_worth_it", too_small)
    torch._dynamo.reset()
    model, found = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), {}
    with (
        torch.set_grad_enabled(grad),
        observing(lambda gm, sites, _: found.update({s.path: s.reason for s in sites if s.kind == "linear"})),
    ):
        torch.compile(lambda x: model(x), backend=te_fp8, options={"include_logits": True})(torch.randn(8, 32))
    assert {path[-1]: reason for path, reason in found.items()} == {"0": None, "2": "too small to pay"}
    assert set(asked) == {((8, 32), (48, 32), grad), ((8, 48), (16, 48), grad)}


def test_the_device_at_hand_decides(monkeypatch):
    """What pays on an RTX 4090, whose memory is slow beside its GEMMs' gain, is less than on an H100."""
    from te_dynamo.lowering.devices import H100, PEAKS, peak_of

    names = iter(["NVIDIA GeForce RTX 4090", "a GPU of tomorrow"])
    peak_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert peak_of(torch.device("cuda", 0)) is PEAKS["NVIDIA GeForce RTX 4090"]
    assert peak_of(torch.device("cuda", 1)) is H100
    peak_of.cache_clear()
