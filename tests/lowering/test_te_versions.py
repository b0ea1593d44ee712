"""te_dynamo's calls to Transformer Engine, against the signatures of each version (tests/te_signatures, tools/te_signatures.py).

The operators run on TE's Python package with a stand-in for its C++ layer. Their calls to `library.api()` are recorded, and bound to each
version's signatures. A new operator needs a sample here, or in the `samples` of its own tests.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Iterator
from enum import EnumMeta
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import te_dynamo.lowering.te as package
import te_dynamo.lowering.te.provider  # noqa: F401  (registers the operators)
from te_dynamo.lowering.te import library
from tests import te_on_cpu
from tests.lowering import test_te, test_te_blocks, test_te_groups
from tests.te_on_cpu.extension import FACTS as BUILT
from tests.te_on_cpu.extension import VERSION as BUILT_VERSION
from tests.te_on_cpu.extension import parameters

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
FOLDER = Path(__file__).parent.parent / "te_signatures"
VERSIONS = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # "quantize" of the extension is "tex.quantize"
Samples = dict[str, tuple[Any, tuple[Any, ...]]]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


ORDERED = sorted(VERSIONS, key=numbers)
SUPPORTED = [v for v in ORDERED if library.OLDEST <= numbers(v)[:2] < library.NEWEST]


# --- samples: an operator and its arguments


def norm_and_bias() -> Samples:
    ops, one = torch.ops.te_dynamo, torch.ones(())
    x, weight = torch.randn(32, 64, dtype=BF16), torch.ones(64, dtype=BF16)
    return {
        "te_bgrad_quantize": (ops.te_bgrad_quantize, (x, one, E5M2)),
        "te_norm, layer": (ops.te_norm, (x, weight, weight.clone(), one, E4M3, "layer", 1e-5, False)),
        "te_norm, rms": (ops.te_norm, (x, weight, None, one, E4M3, "rms", 1e-6, True)),
    }


def attention() -> Samples:
    ops, one = torch.ops.te_dynamo, torch.ones(())
    layout, how = "bshd_bshd_bshd", (True, 0.1)
    b, s, h, d = 2, 32, 2, 128
    q, k, v, o, do = (torch.randn(b, s, h, d, dtype=BF16) for _ in range(5))
    lse, rng = torch.zeros(b, h, s, 1), torch.zeros(2, dtype=torch.int64)
    q8, k8, v8, o8 = (t.to(E4M3) for t in (q, k, v, o))
    qkv8 = (q8, k8, v8)
    return {
        "te_attention_fwd": (ops.te_attention_fwd, (q, k, v, layout, *how, True)),
        "te_attention_bwd": (ops.te_attention_bwd, (do, q, k, v, o, lse, rng, layout, *how)),
        "te_fp8_attention_fwd": (ops.te_fp8_attention_fwd, (*qkv8, [one] * 3, one, one, layout, *how, BF16, True)),
        "te_fp8_attention_bwd": (
            ops.te_fp8_attention_bwd,
            (do.to(E5M2), *qkv8, o8, lse, rng, one, one, one, one, one, one, layout, *how, BF16),
        ),
    }


SOURCES: tuple[Callable[[], Samples], ...] = (
    test_te.samples,
    norm_and_bias,
    attention,
    test_te_blocks.samples,
    test_te_groups.samples,
)
NAMES = [name for source in SOURCES for name in source()]

# The first version that accepts the calls of a sample, if that is not the oldest known one.
SINCE = {
    "te_gemm": "2.14.1",  # Float8TensorStorage(fake_dtype=)
    "te_gemm with a bias": "2.14.1",
    "te_attention_fwd": "2.15.0",  # fused_attn_fwd(o_format=)
    "te_attention_bwd": "2.15.0",  # fused_attn_bwd(do_format=, dqkv_layout=), and no dqkv_dtype
    "te_fp8_attention_fwd": "2.15.0",
    "te_fp8_attention_bwd": "2.15.0",
    "te_block_gemm, block": "2.14.1",  # Float8BlockwiseQTensorStorage(fake_dtype=)
    "te_block_gemm, mxfp8": "2.14.1",  # MXFP8TensorStorage(fake_dtype=)
    **{f"te_grouped_gemm, {layout}": "2.14.1" for layout in ("TN", "NN", "NT")},  # general_grouped_gemm_for_grouped_tensor
    **{name: "2.19.0" for name in NAMES if "x 32" in name},  # MXFP8Quantizer(with_2d_quantization=)
}


# --- recording and binding


class Recorded:
    """Stands for a function, class or module of TE: records calls, and passes them on."""

    def __init__(self, real: Any, prefix: str, calls: list[Call]) -> None:
        self._real, self._prefix, self._calls = real, prefix, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.append((self._prefix + self._real.__name__, args, kwargs))
        return self._real(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return Recorded(value, self._prefix, self._calls) if callable(value) and not isinstance(value, type) else value


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[Call]]:
    """The calls to TE from here on."""
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    te_on_cpu.install()
    found: list[Call] = []
    api = library.api()
    for name, value in vars(api).items():
        if isinstance(value, ModuleType):
            monkeypatch.setattr(api, name, Recorded(value, "tex.", found))
        elif callable(value) and not isinstance(value, EnumMeta):
            monkeypatch.setattr(api, name, Recorded(value, "", found))
    yield found


@cache
def signature(text: str) -> inspect.Signature:
    scope: dict[str, Any] = {}
    exec(f"def function({text}): ...", scope)
    return inspect.signature(scope["function"])


def refused(version: str, call: Call) -> str | None:
    """Why a version would reject a call, or ignore one of its arguments; None if it accepts the call."""
    name, args, kwargs = call
    facts = VERSIONS[version]
    if name.startswith("tex."):
        text = facts["extension"].get(name.removeprefix("tex."), {}).get("parameters")
    else:
        text = facts["python"].get(name)
    if text is None:
        return f"{version} has no {name} (or tools/te_signatures.py does not look for it)"
    try:
        bound = signature(text).bind(*args, **kwargs)
    except TypeError as error:
        return f"{version}: {name}({text}): {error}"
    variadic = {p.name for p in bound.signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    dropped = {key: value for key, value in bound.arguments.items() if key in variadic}
    return f"{version}: {name}({text}) has no place for {dropped}" if dropped else None


def run(name: str) -> None:
    torch.manual_seed(0)
    (found,) = (source()[name] for source in SOURCES if name in source())
    op, args = found
    with te_on_cpu.pretended((10, 0) if "mxfp8" in name or "grouped" in name else (9, 0)):
        op(*(t.clone() if isinstance(t, Tensor) else t for t in args))  # an operator's arguments must be separate tensors


# --- the tests


def test_the_supported_versions_are_known():
    assert SUPPORTED and BUILT_VERSION in SUPPORTED


def test_every_operator_has_a_sample():
    known = {key.removeprefix("te_dynamo::") for key in torch._library.custom_ops.OPDEFS if key.startswith("te_dynamo::te_")}
    assert known == {name.partition(",")[0].split()[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_called_is_taken(calls, name):
    run(name)
    assert calls
    good = [v for v in ORDERED if not any(refused(v, call) for call in calls)]
    reasons = [reason for v in SUPPORTED for call in calls if (reason := refused(v, call))]
    assert not reasons, "\n".join(reasons)
    since = SINCE.get(name, ORDERED[0])
    assert good == ORDERED[ORDERED.index(since) :], f"the calls of {name} are taken by {good}"


def test_a_call_that_would_be_refused_is_noticed(calls):
    te = library.api()
    with pytest.raises(TypeError), library.running():
        te.Float8Quantizer(torch.ones(1), torch.zeros(1), te.dtype[E4M3], True, row=True)
    for call in (
        calls[0],  # passes a keyword-only parameter by position, and one that does not exist
        ("Float8Quantizer", (1, 2), {}),  # one too few
        ("Float8TensorStorage", (), {"data": 1, "fp8_scale_inv": 1, "fp8_dtype": 1, "color": 1}),  # dropped by **kwargs
        ("tex.layernorm_bwd", (1, 2, 3, 4, 5), {"sm_margin": 0, "zero_centered_gamma": False}),  # pybind knows no names there
        ("tex.rmsnorm_fwd", (1,) * 7, {}),
        ("tex.no_such_function", (), {}),
    ):
        assert refused(BUILT_VERSION, call), call
    assert not refused(BUILT_VERSION, ("tex.layernorm_bwd", (1, 2, 3, 4, 5, 0, False), {}))


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(Path(package.__path__[0]).glob("*.py")):
        yield path.name, ast.parse(path.read_text())


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_is_imported_is_there(version):
    seen, facts = 0, VERSIONS[version]["modules"]
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_engine."):
                for alias in node.names:
                    seen += 1
                    assert node.module.removeprefix("transformer_engine.") in facts[alias.name].split(", "), (file, alias.name)
    assert seen


@pytest.mark.parametrize("version", SUPPORTED)
def test_private_attributes_are_there(version):
    """The attributes of TE's tensors that we read have no public names."""
    known = {name for names in VERSIONS[version]["attributes"].values() for name in names.split(", ")}
    for file, tree in sources():
        ours = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert node.attr in known | ours | {"_replace"}, (file, node.attr)  # a named tuple's
        setting = [n.targets[0].attr for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Attribute)]
        assert set(setting) & {"internal", "optimize_for_gemm"} <= known


def test_what_is_read_from_sources_is_what_the_built_module_says():
    """The extension's functions and enums, for the version that was also read from the built module."""
    facts = VERSIONS[BUILT_VERSION]
    for name, found in facts["extension"].items():
        read = [p for p in signature(found["parameters"]).parameters.values()]
        built = parameters(BUILT["functions"][name])
        assert [p.default is not p.empty for p in read] == [optional for _, optional in built], name
        positional = all(p.kind is p.POSITIONAL_ONLY for p in read)
        assert positional == (built[0][0] == "arg0"), name
        assert positional or [p.name for p in read] == [n for n, _ in built], name
    for name, values in facts["enums"].items():
        assert values == BUILT["enums"][name], name
