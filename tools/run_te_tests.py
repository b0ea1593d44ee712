"""Runs Transformer Engine's own tests on `tests/te_on_cpu`; writes to docs/te-tests.md how many pass, and why the others fail.

    git clone https://github.com/NVIDIA/TransformerEngine
    python tools/run_te_tests.py TransformerEngine

Each test file runs in its own process, with a time limit.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Tests:
    """One of TE's test files."""

    path: str  # below tests/pytorch
    select: str = ""  # pytest -k
    left_out: str = ""  # the tests that are not selected, and why
    capability: str = "9.0"
    trusts_pickles: bool = False  # as NVIDIA's CI does

    @property
    def name(self) -> str:
        return f"`{self.path}`" + ("" if self.capability == "9.0" else f" on {self.capability}")


FILES = (
    Tests("test_recipe.py"),
    Tests("test_float8_current_scaling_exact.py"),
    Tests("test_float8_blockwise_scaling_exact.py"),
    Tests("test_float8blockwisetensor.py"),
    Tests("test_quantized_tensor.py"),
    Tests(
        "attention/test_attention.py",
        "not test_mha_fp8_vs_f16 or (dtype1 and delayed-True-False-True-True-bshd)",
        "of `test_mha_fp8_vs_f16` all but one variant in bf16 (delayed scaling, input layer norm, FP8 backward, bshd): too many for a CPU",
        trusts_pickles=True,
    ),
    Tests("test_grouped_linear.py"),
    Tests(
        "test_grouped_linear.py",
        "not mxfp8 and not MXFP8 and not nvfp4 and not NVFP4 and not cutlass",
        "MXFP8 and NVFP4, whose grouped GEMMs have no stand-in, and CUTLASS's",
        "10.0",
    ),
    Tests("test_permutation.py", "index_map", "all but the index map: its kernels are Triton's, for a GPU"),
    Tests(
        "test_fusible_ops.py",
        "not grouped and not dropout",
        "grouped linears and MLPs, dropout: no stand-in",
    ),
    Tests("test_quantized_tensor.py", "mxfp8 or MXFP8", "what is not about MXFP8: it runs on the Hopper", "10.0"),
    Tests("test_fusible_ops.py", "mxfp8 and test_layernorm_mlp", "all but MXFP8's layer norm and MLP", "10.0"),
)

# Why a test fails or is skipped: the first pattern that is found in its message.
REASONS = (
    (r"BackendCompilerFailed", "is compiled by Inductor, for a GPU"),
    (r"requires CUDA m_splits|dummy base class CUDAGraph", "asks for a tensor that lies on a GPU"),
    (r"lists of FP8 matrices", "FP8 weights one by one in the grouped GEMM have no stand-in"),
    (r"tex\.(scaled_\w+|situglu|dsituglu)", "activations that fold in the MoE's probabilities, and SiTU-GLU, have no stand-in"),
    (r"tex\.fused_rope", "fused RoPE has no stand-in"),
    (r"tex\.(\w+) has no stand-in", r"`tex.\1` has no stand-in"),
    (r"NVFP4Quantizer has no stand-in", "NVFP4 has no stand-in"),
    (r"NVTE_ALIBI", "ALiBi has no stand-in"),
    (r"with dropout has no stand-in", "attention with dropout has no stand-in"),
    (r"torch.cuda.Stream requires CUDA", "captures a CUDA graph"),
    (r"assert 'cpu' == 'cuda'", "asks for a tensor that lies on a GPU"),
    (
        r"fused_attn_fwd_fp8 vs unfused_attn_fwd_f16 RMSE",
        "trains heads of 64 in FP8, which no Hopper does: not skipped, for 2.20.2's selector is asked about bf16; O spans one step of FP8",
    ),
    (r"Less than two backends", "one attention backend only: nothing to compare"),
    (r"No FP8 attention backend", "this device has no such FP8 attention"),
    (r"[Ff]lash[- _]?[Aa]tt", "no flash-attn"),
    (r"MXFP8", "a Hopper has no MXFP8"),
    (r"NVFP4|SM100|Blackwell|10\.0", "for a Blackwell"),
)


@dataclass
class Result:
    tests: Tests
    passed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    unfinished: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("te", type=Path, help="a checkout of TransformerEngine, v2.20 or the commits before it")
    parser.add_argument("--junit", type=Path, help="a folder to keep pytest's XML in (default: it is deleted)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "te-tests.md")
    parser.add_argument("--limit", type=int, default=600, help="seconds for each file (default: %(default)s)")
    parser.add_argument("--only", default="", help="run only files whose name contains this, and write nothing")
    arguments = parser.parse_args()
    directory = arguments.te.resolve() / "tests" / "pytorch"
    if not directory.is_dir():
        parser.error(f"{arguments.te} is not a checkout of TransformerEngine: {directory} is missing")
    with tempfile.TemporaryDirectory() as temporary:
        junit = arguments.junit or Path(temporary)
        junit.mkdir(parents=True, exist_ok=True)
        results = [run(tests, directory, junit.resolve(), arguments.limit) for tests in FILES if arguments.only in tests.path]
    text = "\n".join(table(results, (arguments.te / "build_tools" / "VERSION.txt").read_text().strip()))
    print(text)
    if not arguments.only:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")
    return 0


def run(tests: Tests, directory: Path, junit: Path, limit: int) -> Result:
    xml = junit / f"{Path(tests.path).stem}-{tests.capability}.xml"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "tests.te_on_cpu.plugin", "-p", "no:cacheprovider", "-q", "--tb=short", tests.path]
    command += [f"--capability={tests.capability}", f"--junitxml={xml}", *(["-k", tests.select] if tests.select else [])]
    settings = {
        "NVTE_TORCH_COMPILE": "0",  # no compiled helpers
        "PYTORCH_JIT": "0",
        "PYTHONPATH": str(ROOT),
        "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": str(int(tests.trusts_pickles)),
    }
    print(f"{tests.path} ...", file=sys.stderr, flush=True)
    try:
        subprocess.run(command, cwd=directory, env=os.environ | settings, timeout=limit, stdout=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        return Result(tests, unfinished=f"stopped after {limit} s")
    if not xml.exists():
        return Result(tests, unfinished="pytest could not run it")
    result = Result(tests)
    for case in ElementTree.parse(xml).iter("testcase"):
        result.seconds += float(case.get("time", 0))
        failure = next((e for e in case if e.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if failure is not None:
            result.failures[why(failure.get("message", ""))] += 1
        elif skip is not None and "xfail" not in skip.get("type", ""):
            result.skips[why(skip.get("message", ""))] += 1
        else:
            result.passed += 1
    return result


def why(message: str) -> str:
    for pattern, reason in REASONS:
        if match := re.search(pattern, message):
            return match.expand(reason)
    return message.strip().split("\n")[0][:120]


def table(results: list[Result], te: str) -> list[str]:
    lines = [
        "# Transformer Engine's own tests, on a CPU",
        "",
        f"`transformer_engine` {version('transformer_engine')} with `tests/te_on_cpu` as its C++ layer, posing as a Hopper where no other "
        f"capability is named, and the tests of TE {te}: the results of `python tools/run_te_tests.py TransformerEngine` with torch "
        f"{version('torch')}. "
        "Attention's sizes are cut to 2 samples, 256 positions and 4 heads.",
        "",
        "| file | passed | failed | skipped | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in results:
        if r.unfinished:
            lines.append(f"| {r.tests.name} | {r.unfinished} | | | |")
        else:
            counts = (r.passed, r.failures.total(), r.skips.total(), round(r.seconds))
            lines.append(f"| {r.tests.name} | {' | '.join(map(str, counts))} |")
    for title, counter in (("What fails, and why", "failures"), ("What is skipped, by TE itself", "skips")):
        lines += ["", f"## {title}", ""]
        lines += [f"- {r.tests.name}: {n} x {reason}" for r in results for reason, n in getattr(r, counter).most_common()]
    lines += ["", "## What is not run", ""]
    lines += [f"- {r.tests.name}: {r.tests.left_out}" for r in results if r.tests.left_out]
    return lines


if __name__ == "__main__":
    sys.exit(main())
