"""`python -m te_dynamo doctor`: the machine as te_dynamo sees it.

Facts are gathered by small functions that return data; `as_text` and `as_json` show them. Who computes what is not written down
here: stages 1 to 4 of the backend are run on a small model, for each device, provider and recipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import te_dynamo
from te_dynamo.config import CHOICES, Options
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te.hardware import unavailable_recipe
from te_dynamo.recipe import RECIPES
from te_dynamo.report.trials import Trial, trials
from te_dynamo.sites import Sites

PACKAGES = (
    "torch",
    "triton",
    "transformer_engine",
    "transformer_engine_torch",
    "transformer_engine_cu12",
    "transformer_engine_cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
FP8_CAPABILITY = (8, 9)
CUDNN_OF_TE = 91200  # MIN_CUDNN_VERSION in transformer_engine/common/__init__.py, 2.20.2
OPERATIONS = ("linear", "norm + linear", "attention", "FP8 attention")


@dataclass(frozen=True)
class Device:
    """name: as torch calls it; model: as its maker does; memory: bytes."""

    name: str
    model: str
    capability: tuple[int, int] | None
    memory: int | None


@dataclass(frozen=True)
class Missing:
    """remedy: a command where there is one, else what to do; needed: whether anything does not work without it."""

    what: str
    remedy: str
    needed: bool = True


@dataclass(frozen=True)
class Choice:
    """Who computes an operation: None for nobody (it stays Inductor's); note: why not the one asked for, or what else is to be known."""

    provider: str | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What becomes of a model on a device, for a provider as the user names it and a recipe. choices: by operation."""

    device: str
    provider: str
    recipe: str
    choices: dict[str, Choice]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that is told. registered: where the entry point of the backend leads, None if there is none; te_recipes: by CUDA
    device and recipe, why Transformer Engine does not compute it there, None where it does."""

    te_dynamo: str
    registered: str | None
    devices: list[Device]
    driver: str | None
    packages: dict[str, str | None]
    cuda: str | None
    cudnn: int | None
    compiler: str | None
    plans: list[Plan]
    te_recipes: dict[str, dict[str, str | None]]
    missing: list[Missing]
    trials: dict[str, list[Trial]]


def diagnose() -> Diagnosis:
    """Looks at everything. What cannot be found out is told as missing, not raised."""
    found, broken = devices()
    distinct = kinds(found)
    plans = [plan(torch.device(d.name), provider, recipe) for d in distinct for provider in CHOICES["provider"] for recipe in RECIPES]
    return Diagnosis(
        te_dynamo=te_dynamo.__version__,
        registered=registered(),
        devices=found,
        driver=driver(),
        packages=packages(),
        cuda=torch.version.cuda,
        cudnn=cudnn(),
        compiler=compiler(),
        plans=plans,
        te_recipes={d.name: te_recipes(torch.device(d.name)) for d in distinct if d.capability is not None},
        missing=[*broken, *missing(found)],
        trials={d.name: trials(torch.device(d.name)) for d in distinct},
    )


# --- the machine


def devices() -> tuple[list[Device], list[Missing]]:
    """The CPU and every CUDA device; and those that do not answer."""
    found, broken = [Device("cpu", _cpu_model(), None, _cpu_memory())], []
    for name in _cuda_names():
        try:
            properties = torch.cuda.get_device_properties(torch.device(name))
            capability = torch.cuda.get_device_capability(torch.device(name))
        except Exception as error:  # a driver's, of any kind
            broken.append(Missing(f"{name} does not answer: {_first_line(error)}", "nvidia-smi tells more"))
            continue
        found.append(Device(name, properties.name, capability, properties.total_memory))
    return found, broken


def kinds(found: Sequence[Device]) -> list[Device]:
    """The first of each kind."""
    first: dict[Any, Device] = {}
    for device in found:
        first.setdefault((device.model, device.capability), device)
    return list(first.values())


def _cuda_names() -> list[str]:
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():
            return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return []


def _cpu_model() -> str:
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _cpu_memory() -> int | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        if lines:
            return lines[0]
    return None


def packages() -> dict[str, str | None]:
    """The version of each that matters; None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cudnn() -> int | None:
    """As torch reports it: 91002 is 9.10.2."""
    with contextlib.suppress(Exception):  # libraries of two versions are a RuntimeError
        return torch.backends.cudnn.version()
    return None


def compiler() -> str | None:
    """The C++ compiler that Inductor takes for a CPU, and Triton for its launchers."""
    from torch._inductor import cpp_builder

    with contextlib.suppress(Exception):
        if (found := shutil.which(cpp_builder.get_cpp_compiler())) is not None:
            return found
    return shutil.which("g++") or shutil.which("clang++")


def registered() -> str | None:
    """What the name "te_fp8" stands for in `torch.compile(backend="te_fp8")`."""
    return next((entry.value for entry in entry_points(group="torch_dynamo_backends", name="te_fp8")), None)


# --- who computes what


class Sample(nn.Module):
    """Each operation once, in sizes that every provider takes."""

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
    """Its graph, as Dynamo gives it to a backend, with a CPU's tensors; or why Dynamo could not."""
    graphs: list[GraphModule] = []

    def take(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.compile(Sample().bfloat16(), backend=take, fullgraph=True)(torch.randn(1, 128, 256, dtype=torch.bfloat16))
    except Exception as error:
        return f"Dynamo does not run: {_first_line(error)}"
    return graphs[0]


def plan(device: torch.device, provider: str, recipe: str) -> Plan:
    """Who computes what, in training."""
    from te_dynamo.backend import planned

    graph = sample()
    if isinstance(graph, str):
        return Plan(str(device), provider, recipe, dict.fromkeys(OPERATIONS, Choice(None, graph)))
    choices: dict[str, Choice] = {}
    for attention in ("high_precision", "fp8"):
        try:
            sites = planned(graph, Options(provider=provider, recipe=recipe, attention=attention), device)
        except Exception as error:  # asked for by name and not there, or a library that does not load
            choices |= {operation: Choice(None, _first_line(error)) for operation in OPERATIONS if operation not in choices}
        else:
            choices = {**_choices(sites, attention), **choices}
    return Plan(str(device), provider, recipe, {operation: choices[operation] for operation in OPERATIONS})


def _choices(sites: Sites, attention: str) -> dict[str, Choice]:
    found = {_operation(site.kind, site.path, attention): site for site in sites}
    whole = next((site.reason for site in sites if site.kind == "graph"), None)
    choices = {}
    for operation in OPERATIONS[:3] if attention == "high_precision" else OPERATIONS:
        site = found.get(operation)
        if site is None:
            choices[operation] = Choice(None, whole or "it is not taken")
            continue
        notes = [str(site.detail[key]) for key in ("provider", "norm", "kernel", "fp8") if key in site.detail]
        if site.kind == "linear" and site.path == "qkv":
            notes.append("the norm by itself")
        in_fp8 = operation != "FP8 attention" or site.detail.get("precision") == "fp8"
        choices[operation] = Choice(site.provider if in_fp8 else None, "; ".join([*notes, *([site.reason] if site.reason else [])]))
    return choices


def _operation(kind: str, path: str, attention: str) -> str:
    if kind == "attention":
        return "FP8 attention" if attention == "fp8" else "attention"
    return {"qkv": "norm + linear", "out": "linear"}.get(path, kind)


def te_recipes(device: torch.device) -> dict[str, str | None]:
    return {name: unavailable_recipe(recipe(), device) for name, recipe in RECIPES.items()}


# --- what is missing


def missing(found: Sequence[Device]) -> list[Missing]:
    """What te_dynamo would use and does not find, in the order in which to get it."""
    return [*_of_te_dynamo(), *_of_torch(found), *_of_the_compilers(found), *_of_transformer_engine(found)]


def _of_te_dynamo() -> Iterator[Missing]:
    if registered() is None:
        folder = Path(te_dynamo.__file__).parent.parent
        yield Missing("the name te_fp8 is not registered: te_dynamo is on the path, but not installed", f"pip install -e {folder}")
    specifiers = next((need.partition("torch")[2] for need in _requirements() if need.startswith("torch")), "")
    if specifiers and not _within(torch.__version__, specifiers):
        yield Missing(
            f"torch {torch.__version__} is not among the versions that te_dynamo is tested with", f'pip install "torch{specifiers}"'
        )


def _requirements() -> list[str]:
    with contextlib.suppress(PackageNotFoundError):
        return [need.replace(" ", "") for need in requires("te_dynamo") or ()]
    return []


def _within(found: str, specifiers: str) -> bool:
    """Of bounds as in ">=2.11,<2.16": those that te_dynamo's own metadata has."""
    release = _numbers(found)
    for bound in specifiers.split(","):
        limit = _numbers(bound.lstrip("<>="))
        if (bound.startswith(">=") and release < limit) or (bound.startswith("<") and release[: len(limit)] >= limit):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    digits = ["".join(c for c in part if c.isdigit()) for part in text.partition("+")[0].split(".")[:3]]
    return tuple(int(d) for d in digits if d)


def _of_torch(found: Sequence[Device]) -> Iterator[Missing]:
    if any(d.capability for d in found):
        for d in kinds(found):
            if d.capability is not None and d.capability < FP8_CAPABILITY:
                yield Missing(
                    f"{d.name} ({d.model}) has compute capability {_dotted(d.capability)}: FP8 needs {_dotted(FP8_CAPABILITY)}",
                    "a GPU of the Ada, Hopper or Blackwell family; te_fp8 leaves everything to Inductor here",
                )
    elif torch.version.cuda is None and driver() is not None:
        yield Missing(
            "this machine has an NVIDIA driver, and PyTorch is built without CUDA",
            f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}",
        )
    elif torch.version.cuda is not None:
        said = "no driver answers" if driver() is None else f"driver {driver()} is too old for CUDA {torch.version.cuda}, or hidden"
        yield Missing(f"PyTorch is built for CUDA {torch.version.cuda} and finds no device: {said}", "nvidia-smi tells more", needed=False)


def _of_the_compilers(found: Sequence[Device]) -> Iterator[Missing]:
    if compiler() is None:
        yield Missing("no C++ compiler, which Inductor needs", "apt-get install g++ (or set CXX)")
    if any(d.capability for d in found) and _version("triton") is None:
        yield Missing("triton, in which Inductor and te_dynamo write kernels for a GPU", "pip install triton")


def _of_transformer_engine(found: Sequence[Device]) -> Iterator[Missing]:
    able = [d for d in found if d.capability is not None and d.capability >= FP8_CAPABILITY]
    if not able:
        return
    reason = library.unavailable(torch.device(able[0].name))
    if reason is not None:
        yield Missing(f"the provider 'te': {reason.partition(' (pip')[0]}", library.install(), needed=False)
        return
    versions = {name: v for name in PACKAGES if name.startswith("transformer_engine") and (v := _version(name)) is not None}
    if len(set(versions.values())) > 1:
        said = ", ".join(f"{name} {v}" for name, v in versions.items())
        command = library.install(f"=={versions['transformer_engine']}")
        yield Missing(f"Transformer Engine's packages are of different versions: {said}", command)
    major = (torch.version.cuda or "").partition(".")[0]
    other = {"12": "transformer_engine_cu13", "13": "transformer_engine_cu12"}.get(major)
    if other in versions and f"transformer_engine_cu{major}" not in versions:
        yield Missing(
            f"{other} is installed, and PyTorch is built for CUDA {torch.version.cuda}",
            f"pip uninstall {other}; pip install transformer_engine_cu{major}=={versions[other]}",
        )
    loaded = cudnn()
    if loaded is not None and loaded < CUDNN_OF_TE:
        what = f"cuDNN {_cudnn_text(loaded)}: Transformer Engine needs {_cudnn_text(CUDNN_OF_TE)} or newer"
        yield Missing(what, f"pip install -U nvidia-cudnn-cu{major}")
    try:
        library.api()
    except Exception as error:  # a library that is not found, or of another version
        yield Missing(
            f"transformer_engine cannot be imported: {_first_line(error)}", f"{library.install()} --force-reinstall --no-cache-dir"
        )


# --- showing it


def as_json(found: Diagnosis) -> str:
    return json.dumps(asdict(found), indent=2)


def as_text(found: Diagnosis) -> str:
    parts = [f"te_dynamo {found.te_dynamo}", *_machine(found)]
    for device in dict.fromkeys(p.device for p in found.plans):
        parts += _plans(device, [p for p in found.plans if p.device == device])
        parts += _te_recipes(device, found.te_recipes.get(device))
    parts += ["", "Missing", *(_missing(found.missing) or ["  nothing"]), "", "Tried"]
    for device, tried in found.trials.items():
        parts += [f"  {device}: {t.what}\n      {t.result}: {t.detail}" for t in tried]
    return "\n".join(parts)


def _machine(found: Diagnosis) -> Iterator[str]:
    yield from ("", "Devices")
    for d in found.devices:
        said = [d.model, *([f"compute capability {_dotted(d.capability)}"] if d.capability else [])]
        if d.memory is not None:
            said.append(f"{d.memory / 2**30:.0f} GiB")
        yield f"  {d.name:<8} {', '.join(said)}"
    yield f"  NVIDIA driver: {found.driver or 'none'}"
    if not any(d.capability for d in found.devices):
        yield "  no CUDA device: what runs here has FP8's numerics, not its speed"
    yield from ("", "Packages")
    for name, found_version in found.packages.items():
        yield f"  {name:<26} {found_version or '-'}"
    yield f"  torch is built for {'CUDA ' + found.cuda if found.cuda else 'no CUDA'}, cuDNN {_cudnn_text(found.cudnn)}"
    yield f"  C++ compiler: {found.compiler or 'none'}"
    yield f'  backend="te_fp8": {found.registered or "not registered"}'


def _plans(device: str, plans: Sequence[Plan]) -> Iterator[str]:
    """A table of what provider="auto" does, with its notes below; then the providers by name."""
    notes: dict[str, int] = {}
    auto = [p for p in plans if p.provider == "auto"]
    rows = [("recipe", *OPERATIONS)]
    for p in auto:
        cells = []
        for choice in p.choices.values():
            mark = f" [{notes.setdefault(choice.note, len(notes) + 1)}]" if choice.note else ""
            cells.append((choice.provider or "-") + mark)
        rows.append((p.recipe, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    yield from ("", f'Who computes what on {device}, provider="auto" (-: left to Inductor)')
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from (f"  [{number}] {note}" for note, number in notes.items())
    yield f"  By name on {device}"
    for name in dict.fromkeys(p.provider for p in plans if p.provider != "auto"):
        yield from _by_name(name, [p for p in plans if p.provider == name])


def _by_name(name: str, plans: Sequence[Plan]) -> Iterator[str]:
    able = [p.recipe for p in plans if p.choices["linear"].provider == name]
    yield f"    {name:<10} {', '.join(able) or 'not available'}"
    refusals: dict[str, list[str]] = {}
    for p in plans:
        if p.recipe not in able:
            refusals.setdefault(_reason_alone(p.choices["linear"].note), []).append(p.recipe)
    for reason, recipes in refusals.items():
        yield f"      {'' if not able else 'not ' + ', '.join(recipes) + ': '}{reason}"


def _te_recipes(device: str, reasons: dict[str, str | None] | None) -> Iterator[str]:
    if reasons is not None:
        yield f"  Transformer Engine's recipes on {device}: {', '.join(n for n, r in reasons.items() if r is None) or 'none'}"
        yield from (f"      not {name}: {reason}" for name, reason in reasons.items() if reason is not None)


def _reason_alone(note: str) -> str:
    """Without what an exception says around it."""
    inner = note.removeprefix("te_fp8: ").partition(". Remedy")[0]
    return inner.partition(": ")[2] or inner


def _missing(missing: Sequence[Missing]) -> list[str]:
    return [f"  {'' if m.needed else '(optional) '}{m.what}\n      {m.remedy}" for m in missing]


def _cudnn_text(number: int | None) -> str:
    """9.10.2 from 91002; before 9.0 there were three digits behind the major version."""
    if number is None:
        return "none"
    major, rest = divmod(number, 10000 if number >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
