"""Kept weights that a kernel requantizes on a GPU: in Triton's interpreter, and for which providers and recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from te_dynamo.ir import op_named
from te_dynamo.lowering import registry
from te_dynamo.lowering.call import Call
from te_dynamo.recipe import RECIPES

CUDA = torch.device("cuda")


def test_by_triton_s_interpreter(interpreter):
    cases = Path(__file__).with_name("refresh_in_interpreter.py")
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(cases.parents[2]), str(cases)]
    printed = interpreter(f"""
        import pytest, sys
        failed = pytest.main({arguments})
        print("exit", int(failed))
    """)
    assert " passed" in printed and printed.endswith("exit 0\n"), printed[-4000:]


def made_again(provider: str, recipe: str) -> bool:
    attributes = {"out_dtype": torch.bfloat16, "merged": False, "interleave": 0, "sizes": (32,), "in_features": 32}
    call = Call("linears", provider, "cuda", (torch.bfloat16, (), ()), RECIPES[recipe]().key, cached="inference", attributes=attributes)
    return registry.implementation_of(call).kept_as(call) is not None


@pytest.mark.parametrize(
    ("provider", "by_kernel", "by_version"),
    [
        ("native", {"delayed", "current", "rowwise"}, set()),
        ("te", {"delayed", "current"}, {"block", "mxfp8"}),
        ("reference", {"delayed", "current", "rowwise"}, {"block", "mxfp8", "nvfp4"}),
    ],
)
def test_whose_weights(provider, by_kernel, by_version):
    """As docs/how-it-works.md says."""
    assert all(made_again(provider, recipe) for recipe in by_kernel)
    assert not any(made_again(provider, recipe) for recipe in by_version)


@pytest.mark.parametrize(("cached", "by_kernel"), [("inference", True), ("training", False)])
@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
def test_experts(recipe, cached, by_kernel):
    """Training needs a transposed copy of each matrix, which the kernel does not write."""
    found = registry.find(op_named("grouped_linear"), "native", RECIPES[recipe](), CUDA)
    call = Call("grouped_linear", "native", "cuda", (torch.bfloat16, torch.bfloat16, torch.int32), RECIPES[recipe]().key, cached=cached)
    assert found is not None and (found.kept_as(call) is not None) == by_kernel
