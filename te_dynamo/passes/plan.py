"""Stage 4: who computes each site, by which recipe, in which layout; and the record of it for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.config import Options
from te_dynamo.lowering.cost import flops_of_linear
from te_dynamo.lowering.fp8_attention import unsupported as unsupported_attention
from te_dynamo.lowering.providers import choose_for, provider_named
from te_dynamo.lowering.te.attention_limits import Case, refused
from te_dynamo.lowering.te.library import capability, cudnn_version, unavailable
from te_dynamo.passes.fuse import LAYOUT, MEMBERS
from te_dynamo.passes.graph import is_call, tensor
from te_dynamo.passes.layout import Layout, packed_in_memory
from te_dynamo.passes.regions import regions
from te_dynamo.passes.select import RECIPE, site_path, wants_fp8
from te_dynamo.passes.weights import is_view
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Recipe
from te_dynamo.report.sites import Site, Sites, module_path

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
            instead = _why_no_norm_kernel(node, key, recipe, trains) if key == "te" and node.target is ops.norm_linears else ""
            node.meta[PLAN] = Plan(key, recipe, trains, peers_of(recipe, peers), norm_kernel=instead is None)
            node.meta[SITE] = _linear_sites(node, sites, key, recipe, reason)
            if key == "te" and node.target is ops.norm_linears:
                node.meta[SITE].detail["norm"] = instead or "TE's kernel"
        elif is_call(node, ops.attention):
            node.meta[PLAN], node.meta[SITE] = _attention(node, sites, options, provider, device, where[node][1], peers)
        elif is_call(node, ops.norm):
            node.meta[PLAN] = Plan(provider, None, where[node][1])
            node.meta[SITE] = Site("norm", module_path(node), node.name, provider=provider.partition(":")[0])


def _why_no_norm_kernel(node: Node, provider: str, recipe: Recipe, trains: bool) -> str | None:
    """Why a norm before linears is left to Inductor, as a clause; None where the provider's own kernel is to compute it."""
    x, weight, bias = node.args[:3]
    if not trains:
        return "Inductor writes it in FP8 as well, and inference needs no transposed copy"
    if any(output.args[1] == 0 and output.users for output in node.users):
        return "its result is wanted in high precision too"
    if not lies_in_memory(x):
        return "Inductor fuses it with what makes its input"
    return provider_named(provider).unsupported_norm(*(tensor(t) for t in (x, weight, bias)), node.kwargs["kind"], recipe)


def lies_in_memory(node: Any) -> bool:
    """Whether a value is an input of the graph or made by a GEMM: there is nothing that a kernel could be fused with."""
    while is_view(node):
        if is_call(node.args[0], ops.linears, ops.norm_linears):
            return True
        node = node.args[0]
    return node.op == "placeholder"


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
        instead = _why_no_te_attention(node, precision, device, trains)
        if instead is None:
            lies_as = (packed_in_memory(node) if precision is None else None) or Layout(node.meta[LAYOUT].form, "").name
            provider = site.provider = "te"
        site.detail["kernel"] = f"TE's fused attention, {lies_as}" if instead is None else f"not TE's: {instead}"
    sites.add(site)
    return Plan(provider, precision, trains, peers_of(wanted, peers), lies_as=lies_as), site


def te_beside(options: Options, device: torch.device) -> bool:
    """Whether what the chosen provider has no kernel for may go to TE: FP8 attention on a GPU, which else is its definition."""
    return options.provider == "auto" and device.type == "cuda" and unavailable(device) is None


def _why_no_te_attention(node: Node, precision: Recipe | None, device: torch.device, trains: bool) -> str | None:
    """Why TE's fused attention does not compute a site, as a clause; None where it does."""
    q, k, v = (tensor(a) for a in node.args[:3])
    case = Case(
        dtype=q.dtype,
        head_qk=int(q.shape[3]),
        head_v=int(v.shape[3]),
        s_q=q.shape[2],
        s_kv=k.shape[2],
        causal=node.kwargs.get("causal", False),
        mask=len(node.args) > 3 and node.args[3] is not None,
        dropout=node.kwargs.get("dropout_p", 0.0),
        trains=trains,
        in_fp8=precision is not None,
        capability=capability(device),
        cudnn=cudnn_version(),
    )
    if precision is None and packed_in_memory(node) is None:
        return "q, k and v are made apart, and torch's attention takes them as they lie"
    if precision is not None and not isinstance(precision, DelayedScaling):
        return f"its kernels have delayed scales for S and dP, and {precision.name!r} scaling has none"
    return refused(case)


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
