"""Who computes what: implementations, the providers that they belong to, and which one a site gets.

    @implements("linears", provider="native", recipes=PER_TENSOR, devices=("cuda",))
    class NativeLinears(Implementation): ...

An implementation itself says where it is not available and what it does not support, each as a clause for a report. What no
implementation takes keeps its definition, in high precision, for Inductor to compile.
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
HIGH_PRECISION = type(None)  # in `recipes`: no recipe

Quantize = Callable[[Tensor], Quantized]
Needs = Any  # a bool for each tensor input, arranged as `Call.spec`: whether its gradient is wanted


@dataclass(frozen=True)
class Case:
    """A site as an implementation sees it during planning.

    inputs: its fake tensors by name; attributes: those of the operation, and those of `SemanticOp.attributes_of`.
    recipe: None for high precision; trains: whether it has gradients.
    learns: whether a gradient flows to the input of this name; in_memory: whether that input is already in memory, so that no kernel that
        computes it could be fused with its reader.
    shares_input: whether another linear that is taken reads the same input.
    only_operand: for a producer, whether only the operand that it makes is used.
    remakes: what backward recomputes (see `Call.remakes`).
    transposed, keeps_fp8: for a producer, whether backward reads the transposed copy of the operand, and whether the producer's inputs
        are kept in FP8; only_reader: whether nothing else reads these, a GEMM's output.
    """

    op: SemanticOp
    inputs: Mapping[str, Any]
    attributes: Mapping[str, Any]
    recipe: Recipe | None
    device: torch.device
    trains: bool
    learns: Callable[[str], bool] = lambda name: False
    in_memory: Callable[[str], bool] = lambda name: False
    shares_input: bool = False
    only_operand: bool = True
    remakes: tuple[str, ...] = ()
    transposed: bool = False
    keeps_fp8: bool = False
    only_reader: bool = False


class Forward(NamedTuple):
    """outputs: the operation's before `SemanticOp.outputs`; saved: what backward gets back, without inputs (see
    `Implementation.backward_reads`); amaxes: for each scale of the site, in the order of its roles, any number of amaxes, the largest of
    which counts; none for a site without state."""

    outputs: list[Tensor]
    saved: list[Quantized]
    amaxes: list[Tensor]


class Backward(NamedTuple):
    """gradients: one for each input, nested like the inputs, None if not wanted; amaxes: as in `Forward`."""

    gradients: list[Any]
    amaxes: list[Tensor]
    handed: Sequence[Tensor] = ()  # the fields of the quantized gradient that it hands over, if its call says so


class Packed(NamedTuple):
    """The results of an operator of `lowering.opaque`, each tensor with its own memory: amaxes: f32, one for each scale, or none; results:
    outputs, or the gradients that are wanted; saved: as in `Forward`."""

    amaxes: Tensor
    results: list[Tensor]
    saved: Sequence[Quantized] = ()


class Implementation:
    """How a provider computes an operation in some recipes.

    opaque: it runs inside an operator that Inductor does not look into (`lowering.opaque`); otherwise it is traced, and its plain torch is
        fused with its neighbors.
    generated: `forward` calls what Inductor generates kernels for, and autograd follows it; a graph that is not compiled has the
        operation's definition instead. In high precision.
    calibrates: whether it computes with scales that were never set; if not, another implementation does until they are.
    shared: groups of roles for which its kernels take a single scale.
    takes_producer: whether its first input may come from a producer; it then has `quantize_operand`, and its backward does not read that
        input.
    takes_gradient: whether its output's gradient may come quantized, as a `MadeGradient`: if one scale is known for it.
    cached: the kinds of quantized weights that it takes (see `Call.cached`).
    layout: of an attention, the layout to which it rearranges q, k and v; "" if it reads them where they are.
    """

    opaque = False
    generated = False
    calibrates = True
    shared: tuple[tuple[str, ...], ...] = ()
    takes_producer = False
    takes_gradient = False
    cached: frozenset[str] = frozenset()
    layout = ""

    def backward_reads(self, call: Call, needs: Needs) -> Collection[str]:
        """The names of the operation's inputs that its backward gets (the others are None there); with "outputs", a list of the outputs
        follows the inputs. needs: nested like the inputs."""
        return ()

    def unavailable(self, recipe: Recipe | None, device: torch.device) -> str | None:
        """Why it cannot compute this recipe on this device."""
        return None

    def suits(self, device: torch.device) -> bool:
        """Whether it is made for this device. If not, with provider="auto" another implementation that is takes its place."""
        return True

    def unsupported(self, case: Case) -> str | None:
        """Why it cannot, or should not, compute this site."""
        return None

    def not_worth_it(self, case: Case, x: Tensor, weight: Tensor) -> str | None:
        """Why a weight GEMM of this site, `x [..., K] @ weight [N, K].T`, would be slower than in high precision."""
        return cost.not_worth_it(x, weight, training=case.trains, shares_input=case.shares_input)

    def hands_gradient_of(self, case: Case) -> bool:
        """Whether it can write the gradient of its inputs quantized; it then has `quantized_gradient`."""
        return False

    def kernel(self, case: Case) -> str:
        """What a report should say about the kernel that computes this site, if anything."""
        return ""

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        """inputs: the operation's, in order. The first is a `MadeOperand` if a producer made it. Quantized weights replace the weights if
        cached for inference, and follow as one more input if cached for training."""
        raise NotImplementedError

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        raise NotImplementedError

    def quantized_gradient(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scale: Tensor
    ) -> Backward:
        """Hands over the gradient of the GEMM's output that its first inputs are views of, as `call.hands_gradient` describes it
        (`kernels.tiles.Both`), which takes the place of these inputs' own gradients."""
        raise NotImplementedError

    def quantize_operand(self, call: Call, x: Tensor, scale: ScaleOf) -> Quantized:
        """The first input [tokens, K], as its GEMMs read it; only for implementations with `takes_producer`."""
        raise NotImplementedError

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        """The weight of each GEMM, each scaled by its own amax, as `call.cached` says."""
        raise NotImplementedError

    def kept_as(self, call: Call) -> Kept | None:
        """How the GPU kernel in `kernels.refresh` can remake what `quantize_weights` gives; None if it cannot."""
        return None

    # For opaque implementations: the whole operator in one kernel, from flat inputs and packed scales (see `lowering.opaque`); None if
    # there is no kernel for this call, which is then computed as above.

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

    # For opaque implementations: FLOPs, from shapes (None for absent inputs) nested like the tensors.

    def flops(self, call: Call, inputs: Sequence[Any]) -> int:
        return 0

    def backward_flops(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Any], needs: Needs) -> int:
        return 0

    # For opaque implementations: run on fake tensors to infer the results.

    def fake_forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        return self.forward(call, inputs, scales, needs)

    def fake_backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        return self.backward(call, inputs, saved, grads, scales, needs)


class Producer:
    """How a provider computes the operand of a site and its quantization together.

    kernel: its name in reports; calibrates: whether it computes with a scale that was never set.
    hands_gradient: whether it can write the gradient of its inputs quantized; it then has `quantized_gradient`.
    """

    kernel = "the provider's kernel"
    calibrates = True
    hands_gradient = False

    def backward_reads(self, call: Call) -> Collection[str]:
        """The names of the inputs that its backward gets."""
        return ()

    def saves(self, call: Call) -> int:
        """How many `Quantized` its forward saves."""
        return 0

    def unsupported(self, case: Case) -> str | None:
        """Why it does not make the operand here; Inductor then does."""
        return None

    def forward(self, call: Call, inputs: Sequence[Any], scale: ScaleOf, quantize: Quantize) -> tuple[Quantized, list[Quantized]]:
        """The operand [tokens, K], and what is saved. Its leading sizes are those of the first input: [..., n].

        quantize: how the site quantizes an operand [tokens, K] itself, for a producer that has no cast of its own.
        """
        raise NotImplementedError

    def operand_again(self, call: Call, saved: Sequence[Quantized], scale: Scale, casting: Casting) -> Quantized:
        """The transposed copy of the operand, in backward, if the call remakes its input: forward then made none."""
        raise NotImplementedError

    def backward(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, needs: Needs) -> list[Any]:
        """grad: of the operand, in high precision, [..., K] -> a gradient for each input; None for one that is not wanted."""
        raise NotImplementedError

    def quantized_gradient(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, scale: Tensor, wanted: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """Like `backward`, for the GEMM's output that the inputs are views of, cast with `scale` as `wanted` says (`lowering.handed`): the
        fields of `kernels.tiles.Both`."""
        raise NotImplementedError


class Substitute(NamedTuple):
    """The recipe by which a provider computes a site whose own recipe it does not have, and the reason, as a clause."""

    recipe: Callable[[Any], Recipe]
    reason: str


@dataclass(frozen=True)
class Provider:
    """A source of kernels. unavailable: why it has none on a device, as a clause."""

    name: str
    unavailable: Callable[[torch.device], str | None]


PROVIDERS: dict[str, Provider] = {}

_Key = tuple[str, str, type, str]  # operation, provider, recipe class, device type ("" for any)
_IMPLEMENTATIONS: dict[_Key, Implementation] = {}
_PRODUCERS: dict[_Key, Producer] = {}
_MISSING: dict[tuple[str, str, type], str] = {}
_INSTEAD: dict[tuple[str, str, type], Substitute] = {}
Made = TypeVar("Made", bound=type)


def provider(name: str, unavailable: Callable[[torch.device], str | None]) -> None:
    """Declares a provider."""
    PROVIDERS[name] = Provider(name, unavailable)


def missing(op: str, provider: str, reasons: Mapping[type[Recipe], str]) -> None:
    """Says why a provider does not have an operation in these recipes, as clauses."""
    _MISSING.update({(op, provider, recipe): reason for recipe, reason in reasons.items()})


def instead(op: str, provider: str, substitutes: Mapping[type[Recipe], Substitute]) -> None:
    """Says by which recipe a provider computes an operation where the options give it one of these."""
    _INSTEAD.update({(op, provider, recipe): substitute for recipe, substitute in substitutes.items()})


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
    """The implementation of an operation (or of what it is grouped into), None if there is none."""
    return _found(_IMPLEMENTATIONS, op.grouped or op.name, provider, type(recipe), device.type)


def find_producer(op: SemanticOp, provider: str, recipe: Recipe | None, device: torch.device) -> Producer | None:
    return _found(_PRODUCERS, op.name, provider, type(recipe), device.type)


@cache
def implementation_of(call: Call) -> Implementation:
    """Raises KeyError for a call that has no implementation."""
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
    """Who computes a site, None if nothing does; reason: why it is not the graph's own provider, as a clause."""

    provider: str
    implementation: Implementation | None
    reason: str | None = None


def choose_for(op: SemanticOp, recipe: Recipe, requested: str, chosen: str, device: torch.device) -> Choice:
    """Who computes a site with this recipe, where `chosen` is the graph's own provider; the shapes that it takes are not considered.

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
    """Who computes a site with a scale that was never set, if the site's provider does not."""
    for name in ("native", "reference"):
        found = find(op, name, recipe, device)
        if found is not None and found.calibrates:
            return name
    raise LookupError(f"te_fp8: nobody computes {op.name!r} with scales that were never set; register a `reference` implementation")


def why_not(op: SemanticOp, recipe: Recipe | None, provider: str, device: torch.device, *, asked: bool = False) -> str | None:
    """Why a provider does not compute an operation in a recipe on a device, as a clause. asked: its availability is already known."""
    found = find(op, provider, recipe, device)
    if found is None:
        default = f"{provider} does not implement {op.kind} with this recipe on {device.type}"
        return _MISSING.get((op.grouped or op.name, provider, type(recipe)), default)
    return (None if asked else PROVIDERS[provider].unavailable(device)) or found.unavailable(recipe, device)


def recipe_by(op: SemanticOp, recipe: Recipe | None, provider: str) -> tuple[Recipe | None, str]:
    """The recipe by which a provider computes a site without weights to which the options give `recipe`; and if it is another one, why."""
    substitute = _INSTEAD.get((op.name, provider, type(recipe)))
    return (recipe, "") if substitute is None else (substitute.recipe(recipe), substitute.reason)


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
    """The Python functions that lowered graphs call, by qualified name: torch's caches must be told that they are pure."""
    from te_dynamo.ir.permute import permute
    from te_dynamo.lowering import site

    load()
    functions = [site.record, site.site, site.unpack, permute, *(op.definition for op in all_ops())]
    return [f"{f.__module__}.{f.__name__}" for f in functions]
