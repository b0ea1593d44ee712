"""A tiny Hugging Face Llama, trained on the device by every provider."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from te_dynamo.backend import te_fp8
from te_dynamo.state import STATE
from tests.gpu.device import DEVICE
from tests.gpu.helpers import sites_of
from tests.models import CASES

pytestmark = pytest.mark.gpu
STEPS = 20


def losses(backend: Any, options: dict[str, Any] | None) -> torch.Tensor:
    """The losses of STEPS steps on the same batch, with AdamW in bf16."""
    case = CASES["llama"]
    model = case.model(dtype=torch.bfloat16).to(DEVICE)
    ids = case.inputs(batch=4, length=64)["input_ids"].to(DEVICE)
    run = torch.compile(model, backend=backend, options=options, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(STEPS):
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().float())
    return torch.stack(found).cpu()


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_llama_trains_as_in_bf16(provider, recipe):
    expected = losses("inductor", None)
    torch._dynamo.reset()
    with STATE.set_aside():
        found: list[torch.Tensor] = []
        sites = sites_of(lambda: found.append(losses(te_fp8, {"provider": provider, "recipe": recipe})))
    assert {site.provider for site in sites} == {provider} and sum("linear" in site.kind for site in sites) == CASES["llama"].linears
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(found[0], expected, rtol=0.03, atol=0.02)
