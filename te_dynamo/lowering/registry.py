"""Who computes what: implementations, the providers that they belong to, and which one a site gets.

    @implements("linears", provider="native", recipes=PER_TENSOR, devices=("cuda",))
    class NativeLinears(Implementation): ...

An implementation says by itself where it is not available and what it does not support, each as a clause for a report. What no
implementation takes stays as its definition, in high precision, for Inductor to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from te_dynamo.ir.op import SemanticOp, all_ops
from te_dynamo.lowering import cost
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import Casting
from te_dynamo.lowering.quantized import Kept, Quantized, Scale, ScaleOf, Scales
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Recipe

PER_TENSOR: tuple[type[Recipe], ...] = (DelayedScaling, Float8CurrentScaling)
HIGH_PRECISION = type(None)  # stands among `recipes` for no recipe

Quantize = Callable[[Tensor], Quantized]
Needs = Any  # a bool for each tensor input, arranged as `Call.spec`: whether its gradient is wanted


@dataclass(frozen=True)
class Case:
    """A site that an implementation is asked about, when it is planned.

    inputs: its fake tensors by name; attributes: those of the operation, and those of `SemanticOp.attributes_of`.
    recipe: None for high precision; trains: whether it has gradients.
    learns: whether a gradient flows to the input of this name; in_memory: whether that lies in memory already, so that no
        kernel that makes it could be fused with what reads it.
    only_operand: of a producer, whether nothing but the operand that it makes is wanted of it.
    remakes: what backward makes again (see `Call.remakes`).
    transposed, keeps_fp8: of a producer, whether backward reads the transposed copy of the operand, and whether what the producer reads is
        kept in FP8; only_reader: whether nothing else reads that, a GEMM's output.
    """

    op: SemanticOp
    inputs: Mapping[str, Any]
    attributes: Mapping[str, Any]
    recipe: Recipe | None
    device: torch.device
    trains: bool
    learns: Callable[[str], bool] = lambda name: False
    in_memory: Callable[[str], bool] = lambda name: False
    only_operand: bool = True
    remakes: tuple[str, ...] = ()
    transposed: bool = False
    keeps_fp8: bool = False
    only_reader: bool = False


class Forward(NamedTuple):
    """outputs: those of the operation before `SemanticOp.outputs`; saved: what backward is given back, with nothing among it that
    is an input (see `Implementation.backward_reads`); amaxes: of each scale of the site, in the order of its roles, any number
    of amaxes of which the largest counts; none for a site without state."""

    outputs: list[Tensor]
    saved: list[Quantized]
    amaxes: list[Tensor]


class Backward(NamedTuple):
    """gradients: one for each input, arranged as these, None where it is not wanted; amaxes: as in `Forward`."""

    gradients: list[Any]
    amaxes: list[Tensor]
    handed: Sequence[Tensor] = ()  # the fields of the quantized gradient that it hands over, where its call says so


class Packed(NamedTuple):
    """What an operator of `lowering.opaque` gives, each tensor with memory of its own: amaxes: f32, one for each scale, or none; results:
    outputs, or the gradients that are wanted; saved: as in `Forward`."""

    amaxes: Tensor
    results: list[Tensor]
    saved: Sequence[Quantized] = ()


class Implementation:
    """How a provider computes an operation in some recipes.

    opaque: it runs inside an operator that Inductor does not look into (`lowering.opaque`); otherwise it is traced, and what it
        does in plain torch is fused with its neighbors.
    generated: `forward` calls what Inductor generates kernels for, and autograd follows it; a graph that is not compiled has the
        operation's definition instead. In high precision.
    calibrates: whether it computes with scales that were never set; if not, another does until they are.
    shared: roles of which its kernels take one scale for all.
    takes_producer: whether its first input may come from a producer: it has `quantize_operand` then, and its backward does not
        read that input.
    takes_gradient: whether the gradient of its output may come quantized, as a `MadeGradient`: where one scale is known for it.
    cached: the kinds of quantized weights that it takes (see `Call.cached`).
    """

    opaque = False
    generated = False
    calibrates = True
    shared: tuple[tuple[str, ...], ...] = ()
    takes_producer = False
    takes_gradient = False
    cached: frozenset[str] = frozenset()

    def backward_reads(self, call: Call, needs: Needs) -> Collection[str]:
        """The inputs of the operation, by name, that its backward is given (the others are None there); "outputs", for a list of
        these after the inputs. needs: arranged as the inputs."""
        return ()

    def unavailable(self, recipe: Recipe | None, device: torch.device) -> str | None:
        """Why it cannot compute this recipe on this device."""
        return None

    def suits(self, device: torch.device) -> bool:
        """Whether it is made for this device. With provider="auto" another computes what it is not made for, if one is."""
        return True

    def unsupported(self, case: Case) -> str | None:
        """Why it cannot, or should not, compute this site."""
        return None

    def not_worth_it(self, case: Case, x: Tensor, weight: Tensor) -> str | None:
        """Why a weight GEMM of this site, `x [..., K] @ weight [N, K].T`, would be slower than in high precision."""
        return cost.not_worth_it(x, weight, training=case.trains)

    def hands_gradient_of(self, case: Case) -> bool:
        """Whether it can write the gradient of its inputs quantized: it has `quantized_gradient` then."""
        return False

    def kernel(self, case: Case) -> str:
        """What a report is to say of the kernel that computes this site, if anything."""
        return ""

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        """inputs: the operation's, in order. The first is an `MadeOperand` where a producer made it; the weights are where they are
        cached for inference, and follow as one more input where they are cached for training."""
        raise NotImplementedError

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        raise NotImplementedError

    def quantized_gradient(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scale: Tensor
    ) -> Sequence[Tensor]:
        """The gradient of the GEMM's output that its inputs are views of, as `call.hands_gradient` says (`kernels.tiles.Both`)."""
        raise NotImplementedError

    def quantize_operand(self, call: Call, x: Tensor, scale: ScaleOf) -> Quantized:
        """The first input [tokens, K], as its GEMMs read it: of those that take an operand from a producer."""
        raise NotImplementedError

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        """The weight of each GEMM, each scaled by its own amax, as `call.cached` says."""
        raise NotImplementedError

    def kept_as(self, call: Call) -> Kept | None:
        """What `quantize_weights` gives, for the kernel that makes it again on a GPU (`kernels.refresh`); None where that cannot."""
        return None

    # Of an opaque one: the whole of an operator by a kernel of its own, out of flat inputs and packed scales (see `lowering.opaque`); None
    # where it has none for this call: then it is computed as above.

    def packed_forward(self, call: Call, inputs: Sequence[Any], scales: Tensor | None, start: int, needs: Sequence[bool]) -> Packed | None:
        return None

    def packed_backward(
        self,
        call: Call,
        inputs: Sequence[Any],
        saved: Sequence[Any],
        grads: Sequence[Tensor],
        scales: Tensor | None,
        start: int,
        needs: Sequence[bool],
    ) -> Packed | None:
        return None

    # Of an opaque one: its FLOPs, out of shapes (None for what is not there), arranged as the tensors are.

    def flops(self, call: Call, inputs: Sequence[Any]) -> int:
        return 0

    def backward_flops(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Any], needs: Needs) -> int:
        return 0

    # Of an opaque one: run on fake tensors to infer what it gives.

    def fake_forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        return self.forward(call, inputs, scales, needs)

    def fake_backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        return self.backward(call, inputs, saved, grads, scales, needs)


class Producer:
    """How a provider makes the operand of a site, quantized, together with what would have computed it in high precision.

    kernel: what a report calls it; calibrates: whether it computes with a scale that was never set.
    hands_gradient: whether it can write the gradient of its inputs quantized: it has `quantized_gradient` then.
    """

    kernel = "the provider's kernel"
    calibrates = True
    hands_gradient = False

    def backward_reads(self, call: Call) -> Collection[str]:
        """The inputs, by name, that its backward is given."""
        return ()

    def saves(self, call: Call) -> int:
        """How many `Quantized` its forward saves."""
        return 0

    def unsupported(self, case: Case) -> str | None:
        """Why it does not make an operand here; Inductor does then."""
        return None

    def forward(self, call: Call, inputs: Sequence[Any], scale: ScaleOf, quantize: Quantize) -> tuple[Quantized, list[Quantized]]:
        """The operand [tokens, K], and what is saved. Its leading sizes are those of the first input: [..., n].

        quantize: how the site quantizes an operand [tokens, K] itself, for a producer that has no cast of its own.
        """
        raise NotImplementedError

    def operand_again(self, call: Call, saved: Sequence[Quantized], scale: Scale, casting: Casting) -> Quantized:
        """The transposed copy of the operand, in backward, where the call remakes its input: forward made none then."""
        raise NotImplementedError

    def backward(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, needs: Needs) -> list[Any]:
        """grad: of the operand, in high precision, [..., K] -> a gradient for each input; None for one that is not wanted."""
        raise NotImplementedError

    def quantized_gradient(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, scale: Tensor, wanted: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """As `backward`, of the GEMM's output that the inputs are views of, cast by `scale` as `wanted` says (`lowering.handed`): the
        fields of `kernels.tiles.Both`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Provider:
    """Whose kernels. unavailable: why it has none on a device, as a clause."""

    name: str
    unavailable: Callable[[torch.device], str | None]


PROVIDERS: dict[str, Provider] = {}

_Key = tuple[str, str, type, str]  # operation, provider, recipe class, device type ("" for any)
_IMPLEMENTATIONS: dict[_Key, Implementation] = {}
_PRODUCERS: dict[_Key, Producer] = {}
_MISSING: dict[tuple[str, str, type], str] = {}
Made = TypeVar("Made", bound=type)


def provider(name: str, unavailable: Callable[[torch.device], str | None]) -> None:
    """Declares a provider."""
    PROVIDERS[name] = Provider(name, unavailable)


def missing(op: str, provider: str, reasons: Mapping[type[Recipe], str]) -> None:
    """Says why a provider does not have an operation in these recipes, as clauses."""
    _MISSING.update({(op, provider, recipe): reason for recipe, reason in reasons.items()})


def _keys(op: str, provider: str | Sequence[str], recipes: Sequence[type], devices: Sequence[str]) -> list[_Key]:
    names = (provider,) if isinstance(provider, str) else provider
    return [(op, name, recipe, device) for name in names for recipe in recipes for device in devices]


def implements(
    op: str, *, provider: str | Sequence[str], recipes: Sequence[type], devices: Sequence[str] = ("",), **given: Any
) -> Callable[[Made], Made]:
    """Registers a class of implementations: one instance, made with the keywords that are left, for all of these."""

    def register(made: Made) -> Made:
        instance = made(**given)
        _IMPLEMENTATIONS.update(dict.fromkeys(_keys(op, provider, recipes, devices), instance))
        implementation_of.cache_clear()
        return made

    return register


def produces(op: str, *, provider: str | Sequence[str], recipes: Sequence[type], devices: Sequence[str] = ("",)) -> Callable[[Made], Made]:
    """Registers a class of producers, as `implements`."""

    def register(made: Made) -> Made:
        _PRODUCERS.update(dict.fromkeys(_keys(op, provider, recipes, devices), made()))
        producer_of.cache_clear()
        return made

    return register


def _found(table: Mapping[_Key, Any], op: str, provider: str, recipe: type, device: str) -> Any:
    load()
    return table.get((op, provider, recipe, device)) or table.get((op, provider, recipe, ""))


def find(op: SemanticOp, provider: str, recipe: Recipe | None, device: torch.device) -> Implementation | None:
    """The implementation of an operation (or of what it is grouped into), None where there is none."""
    return _found(_IMPLEMENTATIONS, op.grouped or op.name, provider, type(recipe), device.type)


def find_producer(op: SemanticOp, provider: str, recipe: Recipe | None, device: torch.device) -> Producer | None:
    return _found(_PRODUCERS, op.name, provider, type(recipe), device.type)


@cache
def implementation_of(call: Call) -> Implementation:
    """Raises KeyError for a call that nobody implements."""
    recipe = type(call.scaling) if call.recipe else HIGH_PRECISION
    found = _found(_IMPLEMENTATIONS, call.op, call.provider, recipe, call.device)
    if found is None:
        raise KeyError(f"te_fp8: no implementation of {call.op!r} by {call.provider!r} for {recipe.__name__} on {call.device!r}")
    return found


@cache
def producer_of(call: Call) -> Producer:
    found = _found(_PRODUCERS, call.op, call.provider, type(call.scaling), call.device)
    if found is None:
        raise KeyError(f"te_fp8: {call.provider!r} has no producer {call.op!r} on {call.device!r}")
    return found


def choose(requested: str, device: torch.device) -> tuple[str | None, str | None]:
    """The provider of a graph on a device, or None and the reason.

    Raises RuntimeError where one that was asked for by name is not available.
    """
    load()
    name = "native" if requested == "auto" else requested
    reason = PROVIDERS[name].unavailable(device)
    if reason is None:
        return name, None
    if requested == "auto":
        return None, reason
    others = "'auto'" if requested == "te" else "'auto' or 'reference'"
    raise RuntimeError(f"te_fp8: provider={requested!r} is not available: {reason}. Remedy: fix this, or use provider={others}.")


class Choice(NamedTuple):
    """Who computes a site, None where nobody does; reason: why it is not the graph's own provider, as a clause."""

    provider: str
    implementation: Implementation | None
    reason: str | None = None


def choose_for(op: SemanticOp, recipe: Recipe, requested: str, chosen: str, device: torch.device) -> Choice:
    """Who computes a site of this recipe, where `chosen` is the graph's own provider; what shapes it takes is not asked.

    Raises RuntimeError where the provider that was asked for by name does not have the recipe.
    """
    reason = why_not(op, recipe, chosen, device, asked=True)
    if reason is not None and requested != "auto":
        message = f"provider={requested!r} does not have the recipe {recipe.name!r}: {reason}"
        raise RuntimeError(f"te_fp8: {message}. Remedy: provider='auto' or 'reference'.")
    own = find(op, chosen, recipe, device) if reason is None else None
    if own is not None and (requested != "auto" or own.suits(device)):
        return Choice(chosen, own)
    others = {name: find(op, name, recipe, device) for name in fallbacks(device) if why_not(op, recipe, name, device) is None}
    suited = next((name for name, found in others.items() if found is not None and found.suits(device)), None)
    name = suited or (chosen if own is not None else next(iter(others), chosen))
    return Choice(name, others.get(name, own), reason if own is None else f"{chosen}'s is not made for this device" if suited else None)


def fallbacks(device: torch.device) -> tuple[str, ...]:
    """With provider="auto", who computes what the graph's own provider does not."""
    return ("te", "reference") if device.type == "cuda" else ("reference",)


def calibrator_of(op: SemanticOp, recipe: Recipe | None, device: torch.device) -> str:
    """Who computes a site while a scale of it was never set, where its provider does not."""
    for name in ("native", "reference"):
        found = find(op, name, recipe, device)
        if found is not None and found.calibrates:
            return name
    raise LookupError(f"te_fp8: nobody computes {op.name!r} with scales that were never set; register a `reference` implementation")


def why_not(op: SemanticOp, recipe: Recipe | None, provider: str, device: torch.device, *, asked: bool = False) -> str | None:
    """Why a provider does not compute an operation in a recipe on a device, as a clause. asked: it is known to be available."""
    found = find(op, provider, recipe, device)
    if found is None:
        default = f"{provider} does not implement {op.kind} with this recipe on {device.type}"
        return _MISSING.get((op.grouped or op.name, provider, type(recipe)), default)
    return (None if asked else PROVIDERS[provider].unavailable(device)) or found.unavailable(recipe, device)


def modules() -> set[str]:
    """The modules that declare operations, implementations and producers: their sources decide what is compiled."""
    load()
    made = [*_IMPLEMENTATIONS.values(), *_PRODUCERS.values()]
    return {type(m).__module__ for m in made} | {op.definition.__module__ for op in all_ops()}


@cache
def load() -> None:
    """Imports te_dynamo's own implementations, once."""
    import te_dynamo.lowering.native
    import te_dynamo.lowering.reference
    import te_dynamo.lowering.te.provider  # noqa: F401


def functions_in_graphs() -> list[str]:
    """The Python functions that stand in lowered graphs, by qualified name: torch's caches want to be told that they are pure."""
    from te_dynamo.ir.permute import permute
    from te_dynamo.lowering import site

    load()
    functions = [site.record, site.site, site.unpack, permute, *(op.definition for op in all_ops())]
    return [f"{f.__module__}.{f.__name__}" for f in functions]
