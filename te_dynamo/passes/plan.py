"""Stage 4: who computes each site, by which recipe, in which layout; and the record of it for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.config import Options
from te_dynamo.ir.graph import is_call, tensor
from te_dynamo.lowering.cost import flops_of_linear
from te_dynamo.lowering.fp8_attention import unsupported as unsupported_attention
from te_dynamo.lowering.providers import choose_for
from te_dynamo.passes.fuse import LAYOUT, MEMBERS
from te_dynamo.passes.layout import Layout as AttentionLayout
from te_dynamo.passes.layout import packed_in_memory
from te_dynamo.passes.regions import regions
from te_dynamo.passes.select import RECIPE, site_path, wants_fp8
from te_dynamo.passes.te_kernels import te_beside, why_no_norm_kernel, why_no_te_attention
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Recipe
from te_dynamo.sites import Site, Sites, module_path

PLAN = "te_plan"
SITE = "te_site"


@dataclass(frozen=True)
class Plan:
    """provider: its key (see `lowering.providers`); recipe: None for what stays in high precision; trains: whether the site
    has gradients, and so records its amaxes; peers: the name of the process group whose ranks share first scales, or "";
    norm_kernel: whether a norm and its linears use the provider's own kernel for the norm; lies_as: the layout in which q, k
    and v of an attention lie in memory, as TE spells it, where TE's kernel computes it, "" where none does."""

    provider: str
    recipe: Recipe | None
    trains: bool
    peers: str = ""
    norm_kernel: bool = False
    lies_as: str = ""


def plan(
    gm: GraphModule, sites: Sites, options: Options, provider: str, device: torch.device, *, grad_enabled: bool, peers: str = ""
) -> None:
    """Puts a `Plan` and its `Site` on every semantic node of `gm`."""
    where = regions(gm.graph, grad_enabled)
    for node in gm.graph.nodes:
        if is_call(node, ops.linears, ops.norm_linears):
            recipe = node.meta[RECIPE]
            key, reason = choose_for(recipe, options.provider, provider, device)
            trains = where[node][1]
            instead = why_no_norm_kernel(node, key, recipe, options, trains) if key == "te" and node.target is ops.norm_linears else ""
            node.meta[PLAN] = Plan(key, recipe, trains, peers_of(recipe, peers), norm_kernel=instead is None)
            node.meta[SITE] = _linear_sites(node, sites, key, recipe, reason)
            if key == "te" and node.target is ops.norm_linears:
                node.meta[SITE].detail["norm"] = instead or "TE's kernel"
        elif is_call(node, ops.attention):
            node.meta[PLAN], node.meta[SITE] = _attention(node, sites, options, provider, device, where[node][1], peers)
        elif is_call(node, ops.norm):
            node.meta[PLAN] = Plan(provider, None, where[node][1])
            node.meta[SITE] = Site("norm", module_path(node), node.name, provider=provider.partition(":")[0])


def peers_of(recipe: Recipe, peers: str) -> str:
    """The ranks that share the first scales of a site: those that share its amaxes."""
    return peers if getattr(recipe, "reduce_amax", False) else ""


def _linear_sites(node: Node, sites: Sites, provider: str, recipe: Recipe, instead: str | None) -> Site:
    fused = node.target is ops.norm_linears
    x, weights = node.args[0], node.args[3 if fused else 1]
    taken = []
    for weight, member in zip(weights, node.meta[MEMBERS], strict=True):
        site = Site(
            kind="norm_linear" if fused else "linear",
            path=member.get("te_path", ""),
            node=member.get("te_origin", node.name),
            provider=provider.partition(":")[0],
            recipe=recipe.name,
            flops=flops_of_linear(tensor(x), tensor(weight)),
        )
        if instead is not None:
            site.detail["provider"] = instead
        if node.kwargs["merged"]:
            site.detail["merged"] = len(node.meta[MEMBERS])
        taken.append(sites.add(site))
    return taken[0]


def _attention(
    node: Node, sites: Sites, options: Options, provider: str, device: torch.device, trains: bool, peers: str
) -> tuple[Plan, Site]:
    q, k, v = (tensor(a) for a in node.args[:3])
    layout = node.meta[LAYOUT].name
    site = Site("attention", site_path(node), node.meta.get("te_origin", node.name), provider=provider.partition(":")[0], layout=layout)
    wanted: Recipe | None = node.meta[RECIPE]
    precision: Recipe | None = None
    if wanted is not None and wants_fp8(node, options):
        mask = tensor(node.args[3]) if len(node.args) > 3 else None
        kwargs = {key: node.kwargs.get(key, default) for key, default in (("dropout_p", 0.0), ("enable_gqa", False))}
        reason = unsupported_attention(q, k, v, mask, **kwargs)
        if reason is None and mask is not None and trains and is_learned(node.args[3]):
            reason = "FP8 attention gives no gradient to its mask (a learned bias)"
        if reason is None and not isinstance(wanted, (DelayedScaling, Float8CurrentScaling)):
            reason = f"FP8 attention has one scale a tensor; the recipe {wanted.name!r} has no such thing"
        if reason is None:
            precision, site.recipe = wanted, wanted.name
        else:
            site.detail["fp8"] = reason
    proof = node.meta.get("mask")
    if proof is not None:
        site.detail["mask"] = proof.kind if proof.kind != "unknown" else proof.reason
    site.detail["precision"] = "fp8" if precision else "high"
    site.flops = _attention_flops(node)
    lies_as = ""
    if provider == "te" or (precision is not None and te_beside(options, device)):
        instead = why_no_te_attention(node, precision, device, trains)
        if instead is None:
            lies_as = (packed_in_memory(node) if precision is None else None) or AttentionLayout(node.meta[LAYOUT].form, "").name
            provider = site.provider = "te"
        site.detail["kernel"] = f"TE's fused attention, {lies_as}" if instead is None else f"not TE's: {instead}"
    sites.add(site)
    return Plan(provider, precision, trains, peers_of(wanted, peers), lies_as=lies_as), site


def is_learned(node: Any) -> bool:
    """Whether a gradient could flow from `node` to an input of the graph."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if not isinstance(current, Node) or current in seen:
            continue
        seen.add(current)
        value = tensor(current)
        if current.op == "placeholder" and value is not None and value.requires_grad:
            return True
        stack.extend(current.all_input_nodes)
    return False


def _attention_flops(node: Node) -> int:
    q, k, v = (tensor(a) for a in node.args[:3])
    sizes = [s if isinstance(s, int) else int(s.node.hint or 1) for s in (*q.shape, k.shape[-2], v.shape[-1])]
    b, h, s, d, s_kv, d_v = sizes
    return 2 * b * h * s * s_kv * (d + d_v)
