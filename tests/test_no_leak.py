"""A causal model's output for a token does not depend on later tokens, bitwise, unless the recipe's scale does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import te_dynamo
from te_dynamo.backend import te_fp8
from tests.models import SMALL, VOCABULARY

KEPT = 11  # tokens that stay


def logits(run: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return run(input_ids=ids).logits[:, :KEPT]


def changes(model: nn.Module, train: bool, **options: Any) -> bool:
    """Whether the logits of the first tokens change with the others. The changed tokens are large, to change every amax."""
    torch._dynamo.reset()
    run = torch.compile(model, backend=te_fp8, fullgraph=True, options=options)
    ids = torch.randint(3, VOCABULARY - 1, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] *= 50
    if train:
        for _ in range(3):
            run(input_ids=ids).logits.square().sum().backward()
    model.eval()
    other = ids.clone()
    other[:, KEPT:] = VOCABULARY - 1
    return not torch.equal(logits(run, ids), logits(run, other))


@pytest.mark.parametrize("attention", ["high_precision", "fp8"])
def test_delayed_scaling_does_not_look_ahead(attention: str, no_codegen: None) -> None:
    assert not changes(SMALL["llama"].model(), train=True, recipe="delayed", attention=attention)


@pytest.mark.parametrize("recipe", ["rowwise", "block", "mxfp8"])
def test_scales_of_a_token_do_not_look_ahead(recipe: str, no_codegen: None) -> None:
    assert not changes(SMALL["llama"].model(), train=False, recipe=recipe, provider="auto" if recipe == "rowwise" else "reference")


@pytest.mark.parametrize("recipe", ["current", "nvfp4"])
def test_a_scale_of_all_tokens_does(recipe: str, no_codegen: None) -> None:
    assert changes(SMALL["llama"].model(), train=False, recipe=recipe, provider="auto" if recipe == "current" else "reference")


@pytest.mark.parametrize(("recipe", "looks_ahead"), [("current", True), ("nvfp4", True), ("rowwise", False)])
def test_explain_says_so(recipe: str, looks_ahead: bool, no_codegen: None) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    options = {"recipe": recipe, "provider": "reference" if recipe == "nvfp4" else "auto"}
    notes = te_dynamo.explain(Attention(), torch.randn(2, 16, 64), options=options).notes
    assert any("one scale for all tokens" in note for note in notes) == bool(notes) == looks_ahead
