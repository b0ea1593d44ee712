"""`te_dynamo.estimate`: what FP8 would gain on a GPU that is not present."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from te_dynamo.config import Options
from te_dynamo.lab.isolated import isolated
from te_dynamo.lab.launches import FORWARD, Launch
from te_dynamo.lab.roofline import HOST_US, by_group
from te_dynamo.lab.step import SiteCost, Step, measure
from te_dynamo.lowering.cost import BF16_REACHED, FP8_REACHED
from te_dynamo.lowering.devices import GPU, Peak, gpu_named

INDUCTOR = "Inductor"
RECIPES = ("delayed", "current", "rowwise")  # the recipes to compare: those that torch's own kernels support
HOW_FAR = (
    "Predicted, not measured: launches and bytes are those of the code that Inductor generates for this GPU, times are a roofline. Trust "
    "the ratio within a tenth, kernels and bytes more, milliseconds less. docs/estimate.md says why."
)


FORKED = "autograd's threading in combination with fork"  # in what autograd says; on a machine with a GPU every backward starts threads


class EstimateFailed(RuntimeError):
    """A model that could not be compiled or run on fake tensors."""


class Example(NamedTuple):
    """A model, and the arguments of one call."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One way to compile the step.

    kernels: all launches; gemms: how many of these are GEMMs; gigabytes: moved outside of GEMMs and attention; saved: bytes held for
    backward; ms: device time, the sum of forward_ms and backward_ms; host_ms: time to launch everything without CUDA graphs; groups:
    microseconds by purpose; fp8_tflop, tflop: of the GEMMs in FP8, and of all GEMMs.
    """

    label: str
    kernels: int
    gemms: int
    tflop: float
    fp8_tflop: float
    gigabytes: float
    saved: int
    ms: float
    forward_ms: float
    backward_ms: float
    host_ms: float
    groups: dict[str, float]
    launches: list[Launch]
    seconds: float

    @classmethod
    def of(cls, label: str, step: Step) -> Side:
        launches = step.launches
        gemms = [launch for launch in launches if launch.kind == "gemm"]
        forward = sum(launch.us for launch in launches if launch.phase == FORWARD) / 1e3
        ms = sum(launch.us for launch in launches) / 1e3
        return cls(
            label,
            len(launches),
            len(gemms),
            sum(g.flops for g in gemms) / 1e12,
            sum(g.flops for g in gemms if g.math == "fp8") / 1e12,
            sum(launch.bytes for launch in launches if launch.kind not in ("gemm", "attention")) / 1e9,
            step.saved,
            ms,
            forward,
            ms - forward,
            len(launches) * HOST_US / 1e3,
            by_group(launches),
            launches,
            step.seconds,
        )


@dataclass(frozen=True)
class SiteEstimate:
    """A site of te_fp8, as in `te_dynamo.explain`. bf16_us, us: microseconds of its GEMMs in the step, in bf16 and as computed; the cost of
    quantization is in `Side.groups`."""

    kind: str
    path: str
    provider: str | None
    recipe: str | None
    reason: str | None
    bf16_us: float
    us: float


@dataclass(frozen=True)
class Estimate:
    """What `te_dynamo.estimate` returns. `print(estimate)` shows it.

    device: the GPU's name; torch: the version that compiled; training: forward and backward, else forward only.
    sides: Inductor, te_fp8 with the given options and, with compare=True, te_fp8 with each recipe. sites: those of te_fp8 with the
    given options.
    """

    device: str
    peak: Peak
    torch: str
    training: bool
    sides: tuple[Side, ...]
    sites: tuple[SiteEstimate, ...]
    notes: tuple[str, ...]

    @property
    def inductor(self) -> Side:
        return self.sides[0]

    @property
    def fp8(self) -> Side:
        return self.sides[1]

    @property
    def speedup(self) -> float:
        """Inductor's time divided by that of te_fp8."""
        return self.inductor.ms / self.fp8.ms

    def to_dict(self, *, launches: bool = False) -> dict[str, Any]:
        """Everything, in types that `json.dumps` takes; the launches only if asked for."""
        sides = [asdict(side) | {"speedup": self.inductor.ms / side.ms} for side in self.sides]
        for side in sides if not launches else ():
            del side["launches"]
        return asdict(self) | {"sides": sides, "speedup": self.speedup, "how_far": HOW_FAR}

    def to_markdown(self) -> str:
        from te_dynamo.lab.show import as_markdown

        return as_markdown(self)

    def __str__(self) -> str:
        from te_dynamo.lab.show import as_text

        return as_text(self)


def estimate(
    model: nn.Module,
    /,
    *args: Any,
    device: str = "h100",
    train: bool = True,
    options: Mapping[str, Any] | Options | None = None,
    compare: bool = False,
    **kwargs: Any,
) -> Estimate:
    """Predicts a step of `model(*args, **kwargs)` on a GPU that need not be present: Inductor's, and te_fp8's.

    The step is compiled for that GPU and run on fake tensors in a separate process: the model, its arguments and this process stay as
    they are. The model and its tensors may be on any device, including "meta": they count as on the GPU.

    train: forward and backward, from the output's `loss` if there is one, without the optimizer; else forward only, in eval, without
    gradients.
    device: a name in `te_dynamo.lowering.devices.GPUS`. options: te_fp8's. compare: also with each of the recipes delayed, current
    and rowwise.

    Raises TypeError if `model` is not a module, ValueError for an unknown device, invalid options or if nothing requires grad,
    RuntimeError if the machine cannot do this, EstimateFailed if the model does not run on fake tensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"te_dynamo.estimate takes an nn.Module, not {type(model).__name__}")

    def given() -> Example:
        from te_dynamo.lab.stand_in import StandIns

        stand_ins = StandIns()
        stand_ins.module(model)
        return Example(model, stand_ins.tree(args), stand_ins.tree(kwargs))

    return estimate_of(given, device, train=train, options=options, compare=compare)


def estimate_of(
    build: Callable[[], Example],
    device: str = "h100",
    *,
    train: bool = True,
    options: Mapping[str, Any] | Options | None = None,
    compare: bool = False,
) -> Estimate:
    """Like `estimate`, for the result of `build`, which is called in a FakeTensorMode: all tensors must be fake and on "cuda"."""
    gpu, chosen = gpu_named(device), _plain(Options.from_user(options))
    return isolated(lambda: _estimated(build, gpu, train, chosen, compare))


def _plain(options: Options) -> dict[str, Any]:
    """The options that differ from the defaults, as a dict, to which a compared recipe can be added."""
    return {key: value for key, value in vars(options).items() if value != getattr(Options(), key)}


def _estimated(build: Callable[[], Example], gpu: GPU, train: bool, options: dict[str, Any], compare: bool) -> Estimate:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from te_dynamo.lab.pretend import pretend

    torch.set_num_threads(1)  # a fork has none of the other threads
    pretend(gpu)
    ways = {"te_fp8": options}
    if compare:
        ways |= {f"te_fp8 {recipe}": options | {"recipe": recipe} for recipe in RECIPES}
    with FakeTensorMode(shape_env=ShapeEnv(), allow_fallback_kernels=False):
        example = build()
        example.module.train(train)
        steps = {INDUCTOR: _step(example, gpu, train, "inductor", None)}
        steps |= {label: _step(example, gpu, train, "te_fp8", chosen) for label, chosen in ways.items()}
    ours = steps["te_fp8"]
    sites = [_site(cost, gpu.peak) for cost in ours.sites]
    sides = tuple(Side.of(label, step) for label, step in steps.items())
    return Estimate(gpu.name, gpu.peak, torch.__version__, train, sides, tuple(sites), tuple(_notes(ours, sides[1])))


def _step(example: Example, gpu: GPU, train: bool, backend: str, options: Mapping[str, Any] | None) -> Step:
    try:
        return measure(example.module, example.args, example.kwargs, gpu, backend=backend, options=options, training=train)
    except ValueError:
        raise
    except Exception as error:
        if FORKED in str(error):
            raise EstimateFailed(
                "te_dynamo.estimate: this process has already run a backward, with threads that the process of the prediction lacks. "
                "Remedy: call it before the first backward, or use `python -m te_dynamo estimate`."
            ) from error
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise EstimateFailed(
            f"te_dynamo.estimate: with {backend} the model does not run on fake tensors: {type(error).__name__}: {said}. What needs "
            "values, as .item() and .numpy() do, cannot be estimated: replace it, or estimate a part of the model."
        ) from error


def _site(cost: SiteCost, peak: Peak) -> SiteEstimate:
    site, bf16 = cost.site, cost.flops / (peak.bf16_tflops * BF16_REACHED) / 1e6
    fp8 = cost.flops / (peak.fp8_tflops * FP8_REACHED) / 1e6
    in_fp8 = site.provider is not None and site.recipe is not None and site.kind != "attention"
    return SiteEstimate(site.kind, site.path, site.provider, site.recipe, site.reason, bf16, fp8 if in_fp8 else bf16)


def _notes(step: Step, side: Side) -> Iterable[str]:
    yield from step.warnings
    if side.host_ms > side.ms:
        yield (
            f"the host needs about {side.host_ms:.2f} ms to launch {side.kernels} kernels, the device {side.ms:.2f} ms to run them: "
            'without CUDA graphs (mode="reduce-overhead") the host decides'
        )
    if any(launch.attention for launch in step.launches):
        yield "what the mask of an attention reads (padding, packed sequences) has no values here and counts as hiding nothing"
    if any(launch.math == "f32" and launch.kind == "gemm" for launch in step.launches):
        yield "float32 GEMMs are counted as TF32 (torch.set_float32_matmul_precision('high')); without it they are slower"
