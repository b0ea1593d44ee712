"""`python -m te_dynamo doctor`: this machine as te_dynamo sees it.

Functions gather facts as data; `as_text` and `as_json` show them. Which provider computes what is not hard-coded here: stages
1 to 4 of the backend run on a small model, for each device, provider and recipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._inductor import cpp_builder
from torch.fx import GraphModule
from torch.utils import collect_env

import te_dynamo
from te_dynamo.backend import planned
from te_dynamo.config import CHOICES, Options
from te_dynamo.ir import all_ops
from te_dynamo.lowering.devices import ADA, Capability, dotted
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te.hardware import unavailable_recipe
from te_dynamo.lowering.te.library import first_line
from te_dynamo.recipe import RECIPES
from te_dynamo.report.trials import Trial, trials
from te_dynamo.sites import Sites

TE_PACKAGES = ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu12", "transformer_engine_cu13")
PACKAGES = ("torch", "triton", *TE_PACKAGES, "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
CUDNN_OF_TE = 91200  # MIN_CUDNN_VERSION in transformer_engine/common/__init__.py, 2.20.2
OPERATIONS = ("linear", "norm + linear", "attention", "FP8 attention")


@dataclass(frozen=True)
class Device:
    name: str  # PyTorch's
    model: str  # the manufacturer's
    capability: Capability | None
    memory: int | None  # bytes


@dataclass(frozen=True)
class Missing:
    what: str
    remedy: str  # a command if there is one, else what to do
    needed: bool = True  # False if te_dynamo works without it


@dataclass(frozen=True)
class Choice:
    provider: str | None  # None: left to Inductor
    note: str = ""  # why not the provider that was asked for, or other remarks


@dataclass(frozen=True)
class Coverage:
    device: str
    provider: str  # as the user names it
    recipe: str
    choices: dict[str, Choice]  # by operation


@dataclass(frozen=True)
class Diagnosis:
    te_dynamo: str
    registered: str | None  # the target of the backend's entry point
    devices: list[Device]
    driver: str | None
    packages: dict[str, str | None]
    cuda: str | None
    cudnn: int | None  # 91002 is 9.10.2
    compiler: str | None
    plans: list[Coverage] = field(default_factory=list)
    te_recipes: dict[str, dict[str, str | None]] = field(default_factory=dict)  # by CUDA device: why TE does not support a recipe
    missing: list[Missing] = field(default_factory=list)
    trials: dict[str, list[Trial]] = field(default_factory=dict)  # by device


def diagnose() -> Diagnosis:
    """Gathers everything. What cannot be determined is reported as missing, not raised."""
    machine, broken = devices()
    packages = {name: _version(name) for name in PACKAGES}
    found = Diagnosis(te_dynamo.__version__, registered(), machine, driver(), packages, torch.version.cuda, cudnn(), compiler())
    first_of_kind = {(d.model, d.capability): d for d in reversed(machine)}.values()
    distinct = [d for d in machine if d in first_of_kind]
    found.missing.extend([*broken, *missing(found, [d for d in distinct if d.capability is not None])])
    for d in distinct:
        device = torch.device(d.name)
        found.plans.extend(plan(device, provider, recipe) for provider in CHOICES["provider"] for recipe in RECIPES)
        found.trials[d.name] = trials(device)
        if d.capability is not None:
            found.te_recipes[d.name] = {name: unavailable_recipe(recipe(), device) for name, recipe in RECIPES.items()}
    return found


def devices() -> tuple[list[Device], list[Missing]]:
    """The CPU and every CUDA device that responds; and those that do not."""
    cpu = collect_env.run_and_parse_first_match(collect_env.run, "LC_ALL=C lscpu", r"Model name:\s*(.*)")
    memory = None
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [Device("cpu", f"{cpu or platform.processor() or platform.machine()}, {os.cpu_count()} cores", None, memory)]
    broken = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            properties, capability = torch.cuda.get_device_properties(i), torch.cuda.get_device_capability(i)
            found.append(Device(f"cuda:{i}", properties.name, capability, properties.total_memory))
        except Exception as error:  # drivers raise all kinds
            broken.append(Missing(f"cuda:{i} does not answer: {first_line(error)}", "look at it with nvidia-smi"))
    return found, broken


def driver() -> str | None:
    """The version of NVIDIA's driver; None if there is none."""
    return collect_env.get_nvidia_driver_version(collect_env.run)


def cudnn() -> int | None:
    with contextlib.suppress(RuntimeError):  # torch loads another version than it was built for
        return torch.backends.cudnn.version()
    return None


def compiler() -> str | None:
    """The C++ compiler that Inductor uses."""
    with contextlib.suppress(Exception):  # Inductor raises its own error if it finds none
        return shutil.which(cpp_builder.get_cpp_compiler())
    return None


def registered() -> str | None:
    """What "te_fp8" stands for in `torch.compile(backend="te_fp8")`."""
    return next((entry.value for entry in entry_points(group="torch_dynamo_backends", name="te_fp8")), None)


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


class Sample(nn.Module):
    """Each operation once, in sizes that every provider supports."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(256), nn.Linear(256, 768, bias=False), nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 128)).transpose(1, 3).unbind(2)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@cache
def sample() -> GraphModule | str:
    """The sample's graph as Dynamo gives it to a backend, with CPU tensors; or why Dynamo failed."""
    recorder = EagerAndRecordGraphs()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.compile(Sample().bfloat16(), backend=recorder, fullgraph=True)(torch.randn(1, 128, 256, dtype=torch.bfloat16))
    except Exception as error:
        return f"Dynamo does not run: {first_line(error)}"
    return recorder.graphs[0]


def plan(device: torch.device, provider: str, recipe: str) -> Coverage:
    """Which provider computes what, in training."""
    graph = sample()
    if isinstance(graph, str):
        return Coverage(str(device), provider, recipe, dict.fromkeys(OPERATIONS, Choice(None, graph)))
    choices: dict[str, Choice] = {}
    for attention, operations in (("high_precision", OPERATIONS[:3]), ("fp8", OPERATIONS[3:])):
        try:
            sites = planned(graph, Options(provider=provider, recipe=recipe, attention=attention), device)
            choices |= {operation: _choice(operation, sites) for operation in operations}
        except Exception as error:  # a provider that was asked for by name is unavailable, or a library does not load
            choices |= dict.fromkeys(operations, Choice(None, first_line(error)))
    return Coverage(str(device), provider, recipe, choices)


def _choice(operation: str, sites: Sites) -> Choice:
    path = {"linear": "out", "norm + linear": "qkv"}.get(operation)
    site = next((s for s in sites if (s.kind == "attention" if path is None else s.path == path)), None)
    if site is None:
        return Choice(None, next((s.reason or "" for s in sites if s.kind == "graph"), "not taken"))
    producers = [op.kind for op in all_ops() if not op.is_site]
    notes = [site.detail.get(key) for key in ("provider", *producers, "kernel", "fp8")]
    if operation == "norm + linear" and site.kind == "linear":
        notes.append("the norm by itself")
    in_fp8 = operation != "FP8 attention" or site.detail.get("precision") == "fp8"
    return Choice(site.provider if in_fp8 else None, "; ".join(note for note in (*notes, site.reason) if note))


def missing(found: Diagnosis, gpus: Sequence[Device]) -> Iterator[Missing]:
    """What te_dynamo would use but does not find, in the order in which to install it."""
    if found.registered is None:
        folder = Path(te_dynamo.__file__).parent.parent
        yield Missing("the name te_fp8 is not registered: te_dynamo is on the path, but not installed", f"pip install -e {folder}")
    else:
        tested = next(str(need.specifier) for need in map(Requirement, requires("te_dynamo") or ()) if need.name == "torch")
        if not _within(torch.__version__, tested):
            yield Missing(f"te_dynamo is not tested with torch {torch.__version__}", f'pip install "torch{tested}"')
    for d in (d for d in gpus if d.capability < ADA):
        what = f"{d.name} ({d.model}) has compute capability {dotted(d.capability)}: FP8 needs {dotted(ADA)}"
        yield Missing(what, "use an Ada, Hopper or Blackwell GPU; on this one te_fp8 leaves everything to Inductor")
    if not gpus and found.cuda is None and found.driver is not None:
        command = f"pip install --force-reinstall torch=={Version(torch.__version__).public}"
        yield Missing("this machine has an NVIDIA driver, but PyTorch is built without CUDA", command)
    elif not gpus and found.cuda is not None:
        why = f"driver {found.driver} may be too old" if found.driver else "no NVIDIA driver answers"
        what = f"PyTorch is built for CUDA {found.cuda} and finds no device: {why}"
        yield Missing(what, "check nvidia-smi and CUDA_VISIBLE_DEVICES", needed=False)
    if found.compiler is None:
        yield Missing("no C++ compiler, which Inductor needs", "apt-get install g++ (or set CXX)")
    if gpus and found.packages["triton"] is None:
        yield Missing("triton is not installed: Inductor and te_dynamo write GPU kernels in it", "pip install triton")
    if (able := next((d for d in gpus if d.capability >= ADA), None)) is not None:
        yield from _of_transformer_engine(found, torch.device(able.name))


def _within(found: str, specifiers: str) -> bool:
    """A pre-release counts as the release that it precedes."""
    return Version(found).base_version in SpecifierSet(specifiers)


def _of_transformer_engine(found: Diagnosis, device: torch.device) -> Iterator[Missing]:
    if (reason := library.not_installed(device)) is not None:
        yield Missing(f"the provider 'te': {reason.partition(' (pip')[0]}", library.install(), needed=False)
        return
    # Each of these makes the import of TE fail, with a less helpful exception.
    versions = {name: v for name in TE_PACKAGES if (v := found.packages[name]) is not None}
    if len(set(versions.values())) > 1:
        said = ", ".join(f"{name} {v}" for name, v in versions.items())
        command = library.install(f"=={versions['transformer_engine']}")
        yield Missing(f"Transformer Engine's packages are of different versions: {said}", command)
    major = (found.cuda or "").partition(".")[0]
    other = {"12": "transformer_engine_cu13", "13": "transformer_engine_cu12"}.get(major, "")
    if other in versions and f"transformer_engine_cu{major}" not in versions:
        command = f"pip uninstall {other}; pip install transformer_engine_cu{major}=={versions[other]}"
        yield Missing(f"{other} is installed, but PyTorch is built for CUDA {found.cuda}", command)
    if found.cudnn is not None and found.cudnn < CUDNN_OF_TE:
        what = f"cuDNN {_cudnn_text(found.cudnn)}: Transformer Engine needs {_cudnn_text(CUDNN_OF_TE)} or newer"
        yield Missing(what, f"pip install -U nvidia-cudnn-cu{major}")
    try:
        library.api()
    except Exception as error:  # a library is not found, or of another version
        command = f"{library.install()} --force-reinstall --no-cache-dir"
        yield Missing(f"transformer_engine cannot be imported: {first_line(error)}", command)


def as_json(found: Diagnosis) -> str:
    return json.dumps(asdict(found), indent=2)


def as_text(found: Diagnosis) -> str:
    lines = [f"te_dynamo {found.te_dynamo}", *_machine(found)]
    for device in dict.fromkeys(p.device for p in found.plans):
        lines += _plans(device, [p for p in found.plans if p.device == device])
        if (reasons := found.te_recipes.get(device)) is not None:
            lines.append(f"  Transformer Engine's recipes on {device}: {', '.join(n for n, r in reasons.items() if r is None) or 'none'}")
            lines += [f"      not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    needs = [f"  {'' if m.needed else '(optional) '}{m.what}\n      {m.remedy}" for m in found.missing]
    lines += ["", "Missing", *(needs or ["  nothing"]), "", "Tried"]
    lines += [f"  {device}: {t.what}\n      {t.result}: {t.detail}" for device, tried in found.trials.items() for t in tried]
    return "\n".join(lines)


def _machine(found: Diagnosis) -> Iterator[str]:
    yield from ("", "Devices")
    for d in found.devices:
        capability = f", compute capability {dotted(d.capability)}" if d.capability else ""
        memory = f", {d.memory / 2**30:.0f} GiB" if d.memory is not None else ""
        yield f"  {d.name:<8} {d.model}{capability}{memory}"
    yield f"  NVIDIA driver: {found.driver or 'none'}"
    if not any(d.capability for d in found.devices):
        yield "  no CUDA device: what runs here has FP8's numerics; docs/memory-and-speed.md has its speed on CPUs"
    yield from ("", "Packages", *(f"  {name:<26} {installed or '-'}" for name, installed in found.packages.items()))
    yield f"  torch is built for {'CUDA ' + found.cuda if found.cuda else 'no CUDA'}, cuDNN {_cudnn_text(found.cudnn)}"
    yield f"  C++ compiler: {found.compiler or 'none'}"
    yield f'  backend="te_fp8": {found.registered or "not registered"}'


def _plans(device: str, plans: Sequence[Coverage]) -> Iterator[str]:
    """A table of what provider="auto" chooses, with its notes below; then each provider by name."""
    numbers: dict[str, int] = {}
    rows = [("recipe", *OPERATIONS)]
    for p in (p for p in plans if p.provider == "auto"):
        marks = [f" [{numbers.setdefault(c.note, len(numbers) + 1)}]" if c.note else "" for c in p.choices.values()]
        rows.append((p.recipe, *((c.provider or "-") + mark for c, mark in zip(p.choices.values(), marks, strict=True))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("", f'Who computes what on {device}, provider="auto" (-: left to Inductor)')
    yield from ("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    yield from (f"  [{number}] {note}" for note, number in numbers.items())
    yield f"  By name on {device}"
    for name in dict.fromkeys(p.provider for p in plans if p.provider != "auto"):
        yield from _by_name(name, [p for p in plans if p.provider == name])


def _by_name(name: str, plans: Sequence[Coverage]) -> Iterator[str]:
    able = [p.recipe for p in plans if p.choices["linear"].provider == name]
    yield f"    {name:<10} {', '.join(able) or 'not available'}"
    refusals: dict[str, list[str]] = {}
    for p in (p for p in plans if p.recipe not in able):  # a note may be an exception's: "te_fp8: what happened: why. Remedy: ..."
        clause = p.choices["linear"].note.removeprefix("te_fp8: ").partition(". Remedy")[0]
        refusals.setdefault(clause.partition(": ")[2] or clause, []).append(p.recipe)
    for reason, recipes in refusals.items():
        yield f"      {'not ' + ', '.join(recipes) + ': ' if able else ''}{reason}"


def _cudnn_text(number: int | None) -> str:
    """9.10.2 from 91002; before 9.0 three digits follow the major version."""
    major, rest = divmod(number or 0, 10000 if (number or 0) >= 90000 else 1000)
    return "none" if number is None else f"{major}.{rest // 100}.{rest % 100}"
