"""`python -m te_dynamo estimate module:factory`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

DESCRIPTION = """\
Predict what te_fp8 would give over Inductor on a GPU that need not be there.

factory() returns the model and the arguments of one call: (model, args), with args a tuple, a dict of keywords or one tensor, or
(model, args, kwargs). It is called with fake tensors on, whose default device is the GPU: a model of any size takes no memory, no values
are there, and nothing can be loaded into it.
"""


def add(commands: Any) -> None:
    """Adds the command to the parsers of `python -m te_dynamo`."""
    parser = commands.add_parser(
        "estimate",
        help="predict a step on a GPU that is not there: kernels, bytes, memory, time, against Inductor",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("factory", metavar="MODULE:FACTORY")
    parser.add_argument("--device", action="append", help="h100 (the default), h200, b200, gb200, l40s, rtx4090, rtx5090, ...; repeatable")
    parser.add_argument("--compare", action="store_true", help="also with each of the recipes delayed, current and rowwise")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", default=True, help="forward and backward (the default)")
    mode.add_argument("--eval", dest="train", action="store_false", help="forward alone, in eval, without gradients")
    parser.add_argument("--recipe", help="te_fp8's option")
    parser.add_argument("--provider", help="te_fp8's option")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=JSON", help="any other of te_fp8's options; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a keyword of the factory; repeatable")
    parser.add_argument("--real", action="store_true", help="call the factory as it is, with real tensors: for one that fails on fake ones")
    parser.add_argument("--kernels", action="store_true", help="list every launch")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Returns 1 if nothing could be estimated: the reason is on stderr."""
    import torch

    from te_dynamo.lab import show
    from te_dynamo.lab.estimate import EstimateFailed, estimate, estimate_of

    if not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the GPU that is here, if any, is not the one in question
    try:
        options = _pairs("--option", chosen.option)
        options |= {key: value for key in ("recipe", "provider") if (value := getattr(chosen, key)) is not None}
        how: dict[str, Any] = {"train": chosen.train, "options": options, "compare": chosen.compare}
        build = _build(chosen.factory, _pairs("--set", chosen.set), real=chosen.real)
        found = []
        for device in chosen.device or ["h100"]:
            if chosen.real:
                module, args, kwargs = build()
                found.append(estimate(module, *args, device=device, **how, **kwargs))
            else:
                found.append(estimate_of(build, device, **how))
    except (ValueError, TypeError, EstimateFailed, RuntimeError) as error:
        print(f"python -m te_dynamo estimate: {error}", file=sys.stderr)
        return 1
    if chosen.json:
        print(json.dumps([e.to_dict(launches=chosen.kernels) for e in found], indent=1))
        return 0
    for e in found:
        if not show.print_rich(e):
            print(e)
        for side in e.sides if chosen.kernels else ():
            print("", show.text_of(show.kernels(side)), sep="\n")
    return 0


def _pairs(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """Parses KEY=JSON; a value that is not JSON is a string."""
    found = {}
    for pair in given:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"{flag} {pair!r} is not KEY=JSON")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _build(name: str, keywords: Mapping[str, Any], *, real: bool) -> Callable[[], Any]:
    """A function that calls the factory. Raises ValueError, as that function does, with what is wrong with the factory."""
    from te_dynamo.lab.estimate import Example
    from te_dynamo.lab.stand_in import StandIns, building

    factory = _factory(name)

    def made(*, fake: bool) -> Any:
        try:
            return factory(**keywords)
        except Exception as error:
            remedy = ". Remedy, if fake tensors are the reason: --real, which calls it with real ones" if fake else ""
            raise ValueError(f"{name} failed: {type(error).__name__}: {error}{remedy}") from error

    def on_fakes() -> Any:
        with building():
            module, args, kwargs = _example(name, made(fake=True))
        stand_ins = StandIns()
        stand_ins.module(module)  # tensors that it made on another device than the default
        return Example(module, stand_ins.tree(args), stand_ins.tree(kwargs))

    return (lambda: _example(name, made(fake=False))) if real else on_fakes


def _factory(name: str) -> Callable[..., Any]:
    module_name, separator, attribute = name.partition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(f"{name!r} is not MODULE:FACTORY, for example bench.models:llama")
    try:
        found: Any = import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{module_name!r} cannot be imported: {error}. Remedy: run this where it is, or set PYTHONPATH") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise ValueError(f"{module_name!r} has no function {attribute!r}")
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}, not a function")
    return found


def _example(name: str, made: Any) -> Any:
    """(module, args, kwargs) from a factory's result."""
    from torch import nn

    if isinstance(made, nn.Module):
        raise ValueError(f"{name} gives no example inputs, only a {type(made).__name__}: it must return (model, args)")
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise ValueError(f"{name} must return (model, args) or (model, args, kwargs), not a {type(made).__name__}")
    module, args, *rest = made
    if isinstance(args, Mapping):
        return module, (), dict(args)
    if not isinstance(args, (tuple, list)):
        args = (args,)
    kwargs = rest[0] if rest else {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"{name} must return keywords as a dict, not a {type(kwargs).__name__}")
    return module, tuple(args), dict(kwargs)
