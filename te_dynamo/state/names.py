"""What a slot is called: the path of its module in the model that the user passes, asked for when it is wanted.

    <path>.<role>                 a linear's, roles input, weight, grad_output; `<role>` alone at the root
    <path>.<attribute>.<role>     where the parameter is not called "weight"
    <path>.<n>.<role>             of the n-th further visit of that weight in one call
    <path>.attention.<role>       an attention's, roles q, k, v, s, o, do, dp, dqkv

Wrappers are not part of a path: those of torch.compile, DistributedDataParallel, FSDP, activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from te_dynamo.state.homes import Home, Slot
from te_dynamo.state.registry import ScaleState

# class name -> the attribute under which a wrapper holds what it wraps. By name: some are private, and importing all is slow.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, without the wrappers."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        wrapped = wrapped_name(module)
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, path if name == wrapped else join(path, name))

    return walk(model, "")


def wrapped_name(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds what it wraps."""
    return next((WRAPPERS[c.__name__] for c in type(module).__mro__ if c.__name__ in WRAPPERS and c.__module__.startswith("torch.")), None)


def homes_of(state: ScaleState, model: nn.Module | Mapping[str, Any]) -> dict[str, Home]:
    """The homes of a model's weights by name, each once: `<path>`, or `<path>.<attribute>` where that is not "weight".

    model: a module, or a mapping of names to modules and tensors, for functions that close over them.
    """
    found: dict[str, Home] = {}
    known: set[int] = set()

    def add(name: str, home: Home | None) -> None:
        if home is not None and id(home) not in known:
            known.add(id(home))
            found[name] = home

    for prefix, root in roots_of(model):
        if isinstance(root, Tensor):
            add(prefix, state.homes.by_weight.get(id(root)))
            continue
        for path, module in named_modules(root):
            for attribute in module._parameters:
                base = join(prefix, path)
                add(base if attribute == "weight" else join(base, attribute), state.homes.by_place.get((id(module), attribute)))
    return found


def roots_of(model: nn.Module | Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [("", model)] if isinstance(model, nn.Module) else list(model.items())


def slot_name(base: str, home: Home, slot: Slot) -> str:
    """The name of a slot of a home called `base`."""
    ordinal, role = slot
    if role.startswith("attention.") and ordinal in home.attention:
        up, down = home.attention[ordinal]
        parts = base.split(".") if base else []
        base = ".".join([*parts[: max(0, len(parts) - up)], *down])
        ordinal = 0
    return join(base, f"{ordinal}.{role}" if ordinal else role)


def slots_of(state: ScaleState, model: nn.Module | Mapping[str, Any]) -> dict[str, tuple[Home, Slot]]:
    """Every slot of a model, by name, in the model's order."""
    result: dict[str, tuple[Home, Slot]] = {}
    for base, home in homes_of(state, model).items():
        for slot in home.slots:
            name = slot_name(base, home, slot)
            while name in result:  # two attentions of one module
                name = _numbered(name)
            result[name] = (home, slot)
    return result


def _numbered(name: str) -> str:
    """`a.attention.q` -> `a.1.attention.q` -> `a.2.attention.q`."""
    head, _, role = name.rpartition("attention.")
    path = head.removesuffix(".")
    before, _, last = path.rpartition(".")
    path = f"{before}.{int(last) + 1}" if last.isdigit() and before else f"{path}.1"
    return join(path, f"attention.{role}")


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
