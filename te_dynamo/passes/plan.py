"""Stage 4: who computes each site, by which recipe, in which layout; and the record of it for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.config import Options
from te_dynamo.ir import op_of, site_of
from te_dynamo.ir.graph import fake, is_call, same_shape, same_size, tensor, upstream
from te_dynamo.ir.meta import IN_MEMORY, MASK, NOTES, ORIGIN, PATH, PLAN, PRODUCER, READER, RECIPE, SITE, members_of, origin_of, site_path
from te_dynamo.ir.op import Gemm, SemanticOp, op_named
from te_dynamo.ir.sizes import product
from te_dynamo.lowering import handed, registry
from te_dynamo.lowering.cost import flops_of_gemm
from te_dynamo.lowering.fp8 import casting_of
from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU
from te_dynamo.lowering.memory import MEMORY
from te_dynamo.lowering.registry import Case, Implementation
from te_dynamo.passes.attach import anchor_of
from te_dynamo.passes.effects import storage
from te_dynamo.passes.padding import keeps_padding
from te_dynamo.passes.readers import Reader
from te_dynamo.passes.regions import regions
from te_dynamo.passes.select import wants_fp8
from te_dynamo.passes.weights import is_view, origin
from te_dynamo.recipe import DelayedScaling, Recipe
from te_dynamo.sites import Site, Sites, module_path


@dataclass(frozen=True)
class Plan:
    """How a semantic node is computed.

    provider: who computes it; recipe: None for high precision; trains: whether it has gradients, and so records its amaxes. implemented:
    whether an implementation of the provider computes it; otherwise its definition does.
    opaque: whether that runs inside an operator, which detects by itself which scales were never set.
    calibrator: who computes it while a scale was never set: the provider itself, or another if that does not calibrate.
    amax_group: the name of the process group whose ranks share first scales, or "": in inference a rank may run alone.
    shared: roles that share a scale because a kernel takes one scale for them (`Implementation.shared`).
    layout: of an attention, the layout to which its implementation rearranges q, k and v, or "".
    keeps_fp8, remakes: what is kept for backward (see `Call`).
    produces: whether the provider makes its operand by a `Producer`.
    in_memory: for linears, roles whose tensor is already in memory, as in `lowering.call.Call`.
    takes_gradient: for linears whose output's gradient comes quantized, its description by `lowering.handed`; hands_gradient: for the
    site that hands it over, the name of the linears' node, and the same description.
    """

    provider: str
    recipe: Recipe | None
    trains: bool
    implemented: bool = False
    opaque: bool = False
    calibrator: str = ""
    amax_group: str = ""
    keeps_fp8: bool = False
    remakes: tuple[str, ...] = ()
    produces: bool = False
    in_memory: tuple[str, ...] = ()
    takes_gradient: Mapping[str, Any] = field(default_factory=dict)
    hands_gradient: tuple[str, Mapping[str, Any]] | None = None
    shared: tuple[tuple[str, ...], ...] = ()
    layout: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether scales that were never set need a graph of their own: opaque implementations detect them by themselves."""
        return not self.opaque or self.calibrator != self.provider

    @property
    def has_state(self) -> bool:
        return self.implemented and self.recipe is not None and self.recipe.stateful

    def __str__(self) -> str:
        return f"{self.provider}, {f'{self.recipe.name} scaling' if self.recipe else 'high precision'}"


@dataclass(frozen=True)
class Planner:
    """What plans depend on besides the graph. provider: the graph's own; amax_group: the name of the ranks' process group, or ""."""

    options: Options
    provider: str
    device: torch.device
    sites: Sites
    amax_group: str = ""

    def case(self, node: Node, op: SemanticOp, recipe: Recipe | None, trains: bool, **facts: Any) -> Case:
        inputs = op.inputs(node)
        return Case(
            op,
            op.examples(node),
            op.all_attributes(node, recipe),
            recipe,
            self.device,
            trains,
            learns=lambda name: is_learned(inputs[name]),
            in_memory=lambda name: lies_in_memory(inputs[name]),
            **facts,
        )

    def unsupported(self, node: Node, trains: bool, shares_input: bool) -> str | None:
        """Why nothing computes a site of weight GEMMs, or nothing should, as a clause; None if something does. shares_input: whether
        another site that is taken reads the same input."""
        op, recipe = site_of(node), node.meta[RECIPE]
        assert op is not None
        choice = registry.choose_for(op, recipe, self.options.provider, self.provider, self.device)
        if choice.implementation is None:
            return choice.reason
        case = self.case(node, op, recipe, trains, shares_input=shares_input)
        costs = (choice.implementation.not_worth_it(case, fake(gemm.x), fake(gemm.weight)) for gemm in op.gemms(node))
        return choice.implementation.unsupported(case) or next((reason for reason in costs if reason), None)

    def plan(self, gm: GraphModule, *, grad_enabled: bool) -> None:
        """Puts a `Plan` and its `Site` on every semantic node of `gm`."""
        where = regions(gm.graph, grad_enabled)
        for node in gm.graph.nodes:
            op = op_of(node)
            if op is None:
                continue
            trains = where[node][1]
            if op.gemms(node):
                self._gemms(node, op, trains)
            elif op.is_site:
                self._alone(node, op, trains)
            else:
                node.meta[PLAN] = self._without_scales(node, op, trains)
                node.meta[SITE] = Site(op.kind, module_path(node), node.name, provider=self.provider)
        by_name = {n.name: n for n in gm.graph.nodes}
        for node in gm.graph.nodes:
            if (reader := node.meta.get(READER)) is not None and (read_by := by_name.get(reader.node)) is not None:
                self._hand_over(node, reader, read_by)

    def _hand_over(self, linears: Node, reader: Reader, read_by: Node) -> None:
        """Notes on both plans that the gradient of a GEMM's output comes quantized from what reads the output: if the gradient's scale is
        known, and its transposed copy is wanted, which would otherwise cost a separate kernel."""
        site = next((u for u in read_by.users if u.meta.get(PRODUCER) == read_by.name), read_by)
        plan, other = linears.meta[PLAN], site.meta[PLAN]
        op = op_of(linears)
        assert op is not None
        taker = registry.find(op, plan.provider, plan.recipe, self.device) if plan.implemented else None
        if taker is None or not (taker.takes_gradient and plan.trains and isinstance(plan.recipe, DelayedScaling)):
            return
        if not self._hands(site, read_by, other):
            return
        _, weights, biases = linears.args
        transposed, sums = (any(t is not None and fake(t).requires_grad for t in tensors) for tensors in (weights, biases))
        if not transposed:
            return
        casting = casting_of(plan.recipe.key)
        described = handed.described(
            reader.starts,
            reader.widths,
            casting.gradient,
            casting.saturates_infinite,
            ALIGNMENT_ON_GPU,
            data=is_learned(linears.args[0]),
            transposed=True,
            sums=sums,
        )
        linears.meta[PLAN] = replace(plan, takes_gradient=described)
        site.meta[PLAN] = replace(other, hands_gradient=(linears.name, described))

    def _hands(self, site: Node, read_by: Node, plan: Plan) -> bool:
        """Whether whatever computes `read_by`, by itself or as the producer of a site, hands over a gradient."""
        op = op_of(read_by)
        assert op is not None
        if site is not read_by:
            producer = registry.find_producer(op, plan.provider, plan.recipe, self.device)
            return plan.produces and producer is not None and producer.hands_gradient
        found = registry.find(op, plan.provider, plan.recipe, self.device) if plan.implemented else None
        return found is not None and found.hands_gradient_of(self.case(read_by, op, plan.recipe, plan.trains))

    def _without_scales(self, node: Node, op: SemanticOp, trains: bool) -> Plan:
        """An operation that is never in FP8 by itself: computed by the provider's kernel, if it has one; else by its definition."""
        found = registry.find(op, self.provider, None, self.device)
        if found is None or found.unsupported(self.case(node, op, None, trains)) is not None:
            return Plan(self.provider, None, trains)
        return self._computed_by(self.provider, found, op, None, trains)

    def _group_of(self, recipe: Recipe | None) -> str:
        """The ranks that share the first scales of a site: those that share its amaxes."""
        return self.amax_group if getattr(recipe, "reduce_amax", False) else ""

    def _computed_by(
        self, provider: str, implementation: Implementation, op: SemanticOp, recipe: Recipe | None, trains: bool, **more: Any
    ) -> Plan:
        return Plan(
            provider,
            recipe,
            trains,
            implemented=True,
            opaque=implementation.opaque,
            calibrator=provider if implementation.calibrates else registry.calibrator_of(op, recipe, self.device),
            amax_group=self._group_of(recipe) if trains else "",
            shared=implementation.shared,
            layout=implementation.layout,
            **more,
        )

    def _gemms(self, node: Node, op: SemanticOp, trains: bool) -> None:
        """A site of weight GEMMs; the report has a site for each GEMM."""
        recipe: Recipe = node.meta[RECIPE]
        choice = registry.choose_for(op, recipe, self.options.provider, self.provider, self.device)
        implementation = choice.implementation
        assert implementation is not None, "a site that nobody computes is left to Inductor by `select`"
        maker = next((n for n in node.all_input_nodes if n.name == node.meta.get(PRODUCER)), None)
        memory, remakes = MEMORY[self.options.memory], self._remakes(op.gemms(node)) if trains else ()
        keeps_fp8 = trains and memory.activations == "fp8" and not getattr(recipe, "like_te", False)
        kept = {"remakes": remakes, "keeps_fp8": keeps_fp8}
        producer, kept_by_inductor = self._producer(node, maker, choice.provider, implementation, recipe, trains, kept)
        produces = kept_by_inductor is None
        plan = self._computed_by(choice.provider, implementation, op, recipe, trains, produces=produces, **kept)
        if trains and implementation.takes_gradient:
            found = {"input": is_in_memory(op.gemms(node)[0].x), "grad_output": is_returned_as_it_is(node)}
            plan = replace(plan, in_memory=tuple(role for role, there in found.items() if there))
        kind = op.kind if maker is None else f"{op_of(maker).kind}_{op.kind}"
        taken = []
        for gemm, member in zip(op.gemms(node), members_of(node), strict=True):
            site = Site(kind, member.get(PATH, ""), member.get(ORIGIN, node.name), choice.provider, recipe=recipe.name)
            site.flops = flops_of_gemm(fake(gemm.x), fake(gemm.weight))
            if choice.reason is not None:
                site.detail["provider"] = choice.reason
            _note_scale(site, recipe)
            if op.attributes(node).get("merged"):
                site.detail["merged"] = len(members_of(node))
            taken.append(self.sites.add(site))
        if maker is not None and kept_by_inductor != "":
            taken[0].detail[op_of(maker).kind] = kept_by_inductor or producer.kernel
        node.meta[PLAN], node.meta[SITE] = plan, taken[0]

    def _remakes(self, gemms: Sequence[Gemm]) -> tuple[str, ...]:
        """What backward recomputes for these GEMMs, which share their input."""
        x = gemms[0].x
        features = sum(fake(g.weight).numel() // int(fake(x).shape[-1]) for g in gemms)
        return MEMORY[self.options.memory].remakes(features, product(fake(x).shape[:-1]), in_memory=lies_in_memory(x))

    def _producer(
        self,
        node: Node,
        maker: Node | None,
        provider: str,
        implementation: Implementation,
        recipe: Recipe,
        trains: bool,
        kept: Mapping[str, Any],
    ) -> tuple[registry.Producer | None, str | None]:
        """The kernel that could make the operand, and why Inductor makes it instead, as a clause; "" if there is no such kernel."""
        op = op_of(maker)
        producer = None if op is None else registry.find_producer(op, provider, recipe, self.device)
        if maker is None or op is None or producer is None or not implementation.takes_producer:
            return None, ""
        if implementation.opaque and not producer.calibrates:
            return producer, "its kernel wants a scale that was set, which the linears' operator may meet unset"
        gemm, _ = origin(maker.args[0])
        only_reader = gemm is not None and (reader := gemm.meta.get(READER)) is not None and reader.node == maker.name
        facts = {"only_operand": set(maker.users) == {node}, "transposed": _weights_learn(node), "only_reader": only_reader}
        return producer, producer.unsupported(self.case(maker, op, recipe, trains, **facts, **kept))

    def _alone(self, node: Node, op: SemanticOp, trains: bool) -> None:
        """A site without weights: an attention. In FP8 if that is wanted and possible, else in high precision."""
        site = Site(op.kind, site_path(node), origin_of(node), self.provider)
        wanted: Recipe | None = node.meta[RECIPE] if wants_fp8(node, self.options) else None
        proof, skips = node.meta.get(MASK), {}
        if self.options.padding == "skip" and op.skipping and proof is not None and proof.kind in ("padded", "unknown"):
            keeps = keeps_padding(node, proof)
            skips = {"padding": "skipped: its rows give 0" if keeps is None else f"not skipped: {keeps}"}
            if keeps is None:
                op, wanted = op_named(op.skipping), None
                node.target = op.definition
        plan = Plan(self.provider, None, trains)
        detail: dict[str, str] = {}
        in_fp8 = op_named(op.forward_only) if op.forward_only and self._only_forward(op, wanted, trains) else op
        for recipe in (wanted, None) if wanted is not None else (None,):
            plan, detail = self._implemented(node, op if recipe is None else in_fp8, recipe, trains, detail)
            if plan.implemented:
                break
        if plan.recipe is not None:
            node.target = in_fp8.definition
            if in_fp8 is not op and trains:
                detail = detail | {"backward": "high precision"}
        site.provider, site.recipe = plan.provider, None if plan.recipe is None else plan.recipe.name
        site.flops = _activation_flops(node, op)
        site.layout = plan.layout or node.meta.get(IN_MEMORY)
        if proof is not None:
            site.detail["mask"] = proof.described
        site.detail |= skips
        site.detail["precision"] = "fp8" if plan.recipe else "high"
        _note_scale(site, plan.recipe)
        site.detail |= {**node.meta.get(NOTES, {}), **detail}
        node.meta[PLAN], node.meta[SITE] = plan, self.sites.add(site)

    def _only_forward(self, op: SemanticOp, recipe: Recipe | None, trains: bool) -> bool:
        """Whether only the forward of a site without weights is to be in FP8. In inference it is all there is: scales that backward alone
        needs in advance would saturate inputs larger than those of training, which a recipe without state never does."""
        if getattr(self.options, op.kind, "") == "fp8":
            return True
        return recipe is not None and not (trains or recipe.stateful or getattr(recipe, "like_te", False))

    def _implemented(
        self, node: Node, op: SemanticOp, recipe: Recipe | None, trains: bool, detail: dict[str, str]
    ) -> tuple[Plan, dict[str, str]]:
        """The plan of a site in a recipe, by the first of the providers that computes it; by its definition if none does."""
        reasons = dict[str, str]()
        for name in self._candidates(recipe):
            by, why = registry.recipe_by(op, recipe, name)
            case, reason = self.case(node, op, by, trains), registry.why_not(op, by, name, self.device)
            found = registry.find(op, name, by, self.device)
            if reason is None and found is not None:
                reason = found.unsupported(case)
                if reason is None and not found.calibrates:
                    reason = _keeps_no_scales(node, by)
            if reason is None and found is not None:
                kernel = found.kernel(case)
                detail = detail | ({"kernel": kernel} if kernel else _declined(reasons)) | ({"recipe": why} if why else {})
                return self._computed_by(name, found, op, by, trains), detail
            if found is not None or recipe is not None:
                reasons[name] = reason or ""
        declined = _declined(reasons)
        return Plan(self.provider, None, trains), detail | (declined if recipe is None else {"fp8": declined.get("kernel", "")})

    def _candidates(self, recipe: Recipe | None) -> list[str]:
        """The providers to ask, in order. TE, if available, is the one that has FP8 attention on a GPU."""
        if self.provider == "te":
            return ["te", "native"]
        if recipe is None:
            return [self.provider]
        beside = self.options.provider == "auto" and te_is_beside(self.device)
        return [*(["te"] if beside else []), self.provider]


def _keeps_no_scales(node: Node, recipe: Recipe | None) -> str | None:
    """Why a site without weights, whose kernels need its scales in advance, has nowhere to keep them, as a clause."""
    if recipe is None or not recipe.stateful or anchor_of(node) is not None:
        return None
    return "its kernels need scales in advance, which are kept with the weights of an FP8 linear, and its graph has none"


def _note_scale(site: Site, recipe: Recipe | None) -> None:
    """`explain` warns about a site with this detail."""
    if recipe is not None and recipe.mixes_tokens:
        site.detail["scale"] = "of all tokens of a call"


def _declined(reasons: dict[str, str]) -> dict[str, str]:
    """What the report says about kernels that were asked and do not compute a site."""
    told = [("not TE's: " if name == "te" else "") + reason for name, reason in reasons.items() if reason]
    return {"kernel": "; ".join(told)} if told else {}


def te_is_beside(device: torch.device) -> bool:
    """Whether TE may compute what the chosen provider has no kernel for."""
    return "te" in registry.fallbacks(device) and registry.PROVIDERS["te"].unavailable(device) is None


def _weights_learn(node: Node) -> bool:
    op = op_of(node)
    return op is not None and any(fake(g.weight).requires_grad for g in op.gemms(node))


def is_learned(node: Any) -> bool:
    """Whether a gradient could flow from `node` to an input of the graph."""
    return any(n.op == "placeholder" and (t := tensor(n)) is not None and t.requires_grad for n in upstream(node))


def lies_in_memory(node: Any) -> bool:
    """Whether a value is an input of the graph, or computed by a GEMM or an attention: there is nothing to fuse a kernel with."""
    while site_of(node) is None and is_view(node):
        node = node.args[0]
    return site_of(node) is not None or node.op == "placeholder"


def is_in_memory(value: Any) -> bool:
    """Whether a value is an input of the graph or the result of an attention, at most viewed in another shape."""
    node, _ = origin(value)
    if node is None or tensor(node) is None or fake(node).dtype != fake(value).dtype or storage(node) != storage(value):
        return False
    return node.op == "placeholder" or is_call(node, ops.attention)


def is_returned_as_it_is(linears: Node) -> bool:
    """Whether the graph returns the result of a single linear, by itself or in a sum: then its gradient is an input of backward."""
    if len(linears.users) != 1:
        return False
    (node,) = linears.users
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output":
            return True
        value, before = tensor(user), fake(node)
        if value is None or value.dtype != before.dtype:
            return False
        adds = is_call(user, torch.add) and not user.kwargs and same_shape(value.shape, before.shape)
        if not adds and not (is_view(user) and same_size(value.numel(), before.numel())):
            return False
        node = user
    return False


def _activation_flops(node: Node, op: SemanticOp) -> int:
    return op.activation_flops(*(t.shape if isinstance(t, torch.Tensor) else None for t in op.examples(node).values()))
