"""What a slot is called: the path of its module in the model that the user passes, looked up on demand.

    <path>.<role>                 of a linear, role input, weight or grad_output; `<role>` alone at the root
    <path>.<attribute>.<role>     if the parameter is not called "weight"
    <path>.<n>.<role>             of the n-th further visit of that weight in one call
    <path>.attention.<role>       of an attention, role q, k, v, s, o, do, dp or dqkv

Wrappers are not part of a path: those of torch.compile, DistributedDataParallel, FSDP, activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from te_dynamo.ir import all_ops
from te_dynamo.sites import WRAPPERS
from te_dynamo.state.homes import Home, Slot
from te_dynamo.state.registry import ScaleState

Model = nn.Module | Mapping[str, Any]


def modules_of(model: Model) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """A model's modules by path, without wrappers. A mapping names modules and tensors; tensors are yielded as they are."""
    roots = {"": model} if isinstance(model, nn.Module) else model
    for name, root in roots.items():
        if isinstance(root, Tensor):
            yield name, root
        else:
            yield from _named_modules(root, name, set())


def _named_modules(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """As `module.named_modules(prefix=path)`, without the wrappers."""
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    bases = (c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch."))
    wrapped = next((WRAPPERS[name] for name in bases if name in WRAPPERS), None)
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_modules(child, path if name == wrapped else join(path, name), seen)


def _homes_of(state: ScaleState, model: Model) -> dict[str, Home]:
    """The homes of a model's weights by name, each once: `<path>`, or `<path>.<attribute>` if that is not "weight"."""
    found: dict[int, tuple[str, Home]] = {}
    for path, owner in modules_of(model):
        if isinstance(owner, Tensor):
            homes = {path: state.homes.by_weight.get(id(owner))}
        else:
            homes = {weight_name(path, a): state.homes.by_place.get((id(owner), a)) for a in owner._parameters}
        for name, home in homes.items():
            if home is not None:
                found.setdefault(id(home), (name, home))
    return dict(found.values())


def weight_name(path: str, attribute: str) -> str:
    return path if attribute == "weight" else join(path, attribute)


def _slot_name(base: str, home: Home, slot: Slot) -> str:
    """The name of a slot of a home called `base`."""
    ordinal, role = slot
    if kind_of(role) and ordinal in home.routes:
        up, down = home.routes[ordinal]
        parts = base.split(".") if base else []
        base = ".".join([*parts[: max(0, len(parts) - up)], *down])
        ordinal = 0
    return join(base, f"{ordinal}.{role}" if ordinal else role)


def slots_of(state: ScaleState, model: Model) -> dict[str, tuple[Home, Slot]]:
    """Every slot of a model, by name, in the model's order."""
    result: dict[str, tuple[Home, Slot]] = {}
    for base, home in _homes_of(state, model).items():
        for slot in home.slots:
            name = _slot_name(base, home, slot)
            while name in result:  # two attentions of one module
                name = _numbered(name)
            result[name] = (home, slot)
    return result


def roles() -> Iterator[str]:
    """Every role of any operation, as slot names end in it."""
    for op in all_ops():
        yield from (*op.roles.saved_forward, *op.roles.saved_gradient)


def kind_of(role: str) -> str:
    """ "attention" of "attention.q": a site without a weight of its own, named by the path of its module; "" for a linear's role."""
    return role.rpartition(".")[0]


def split(name: str) -> tuple[str, str] | None:
    """(path, role) of a slot's name, None if it ends in no role."""
    for role in roles():
        if name == role or name.endswith("." + role):
            return name.removesuffix(role).removesuffix("."), role
    return None


def _numbered(name: str) -> str:
    """`a.attention.q` -> `a.1.attention.q` -> `a.2.attention.q`."""
    found = split(name)
    assert found is not None
    path, role = found
    before, _, last = path.rpartition(".")
    path = f"{before}.{int(last) + 1}" if last.isdigit() and before else f"{path}.1"
    return join(path, role)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
