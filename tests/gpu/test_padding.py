"""`padding="skip"` on the device: attention of packed sequences against the attention that computes padding too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from te_dynamo.backend import te_fp8
from tests.gpu.device import DEVICE
from tests.gpu.helpers import sites_of
from tests.numerics import sqnr

pytestmark = pytest.mark.gpu
BATCH, LENGTH = 3, 640
RANGES = {"right": (0, 300), "left": (200, LENGTH), "both": (17, 501), "none": (0, LENGTH)}


@pytest.mark.parametrize("padding", RANGES)
def test_tokens_that_are_no_padding_stay_as_they_are(padding: str, provider: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        use_cache=False,
    )
    model = LlamaModel._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).to(DEVICE)
    ids, mask = torch.randint(0, 99, (BATCH, LENGTH), device=DEVICE), torch.ones(BATCH, LENGTH, dtype=torch.int64, device=DEVICE)
    start, end = RANGES[padding]
    mask[0, :start] = mask[0, end:] = 0
    mask[1, 5:8] = 0
    found: dict[str, list[torch.Tensor]] = {}
    for option in ("exact", "skip"):
        torch._dynamo.reset()
        run = torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=False, options={"provider": provider, "padding": option})
        sites = sites_of(lambda run=run, option=option: found.update({option: step(model, run, ids, mask)}))
        layouts = {site.layout for site in sites if site.kind == "attention"}
        assert layouts == {"thd_thd_thd"} if option == "skip" else "thd_thd_thd" not in layouts
    for exact, skipped in zip(found["exact"], found["skip"], strict=True):
        assert torch.isfinite(skipped).all() and sqnr(exact, skipped) > 15  # the first scales are those of all tokens


def step(model: torch.nn.Module, run: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The result for tokens that are no padding, and the gradients of a loss that reads these."""
    model.zero_grad()
    hidden = run(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    hidden.float().square().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
