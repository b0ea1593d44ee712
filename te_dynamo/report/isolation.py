"""Runs a model once without side effects: afterwards the model and this process are as they were before."""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, eval_frame, pgo
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.utils import _compilation_metrics, clear_compilation_metrics, counters, get_compilation_metrics
from torch.utils._pytree import tree_map_only

from te_dynamo.state import STATE

TABLES = ("_parameters", "_buffers", "_modules")


class Memory:
    """Keeps copies of tensors, made only when a tensor is about to be written."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.originals = {_storage(tensor): tensor for tensor in tensors}
        self.copies: dict[int, Tensor] = {}

    def about_to_write(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key in self.originals and key not in self.copies:
            self.copies[key] = self.originals[key].detach().clone()

    def restore(self) -> None:
        for key, copy in self.copies.items():
            self.originals[key].data.copy_(copy)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a wrapper subclass without storage
        return id(tensor)


def detached(inputs: Any) -> Any:
    """`inputs` with every tensor that requires grad replaced by a leaf with the same memory and its own gradient."""
    return tree_map_only(Tensor, lambda t: t.detach().requires_grad_() if t.requires_grad else t, inputs)


@contextmanager
def untouched(model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[Memory]:
    """Inside, `model` may be compiled and run, forward and backward; on exit everything is as it was on entry.

    That is: parameters and their gradients, buffers, attributes of modules; `inputs`; the random states of torch, Python
    and NumPy; the scale state; Dynamo's records. Inside, the modules hold other tensors: parameters with the same memory
    but their own gradients, and copies of the buffers. Before a write to a parameter or an input, the caller must call
    `about_to_write` of the `Memory` that is yielded.
    """
    with ExitStack() as stack:
        stack.enter_context(_random_states())
        stack.enter_context(STATE.set_aside())
        stack.enter_context(_own_dynamo_records())
        stack.enter_context(_own_tensors(model))
        memory = Memory([*model.parameters(), *inputs])
        stack.callback(memory.restore)
        yield memory


@contextmanager
def _random_states() -> Iterator[None]:
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


@contextmanager
def _own_tensors(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    before = [(vars(m), dict(vars(m)), {name: dict(vars(m)[name]) for name in TABLES}) for m in modules]
    # The original parameters' gradients are set aside too: these parameters are still reachable, as in an RNN's list of weights.
    gradients = [(p, p.grad) for p in model.parameters()]
    made: dict[int, Tensor] = {}  # tied tensors stay tied
    for attributes, _, _ in before:
        for table, make in (("_parameters", _alias), ("_buffers", _copy)):
            for name, tensor in attributes[table].items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = make(tensor)
                    attributes[table][name] = made[id(tensor)]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for attributes, attributes_before, tables in before:
            _restore(attributes, attributes_before)
            for kind, entries in tables.items():
                _restore(attributes[kind], entries)


def _alias(parameter: Tensor) -> Tensor:
    alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    alias.__dict__.update(parameter.__dict__)
    return alias


def _copy(buffer: Tensor) -> Tensor:
    return buffer.detach().clone().requires_grad_(buffer.requires_grad)


def _restore(current: dict[str, Any], before: dict[str, Any]) -> None:
    for key in current.keys() - before.keys():
        del current[key]
    for key, value in before.items():
        if key not in current or current[key] is not value:
            current[key] = value


@contextmanager
def _own_dynamo_records() -> Iterator[None]:
    """Inside, Dynamo's counters start from zero, it knows no shapes of earlier calls, and the user's compiler stance is off."""
    counted = {kind: Counter(values) for kind, values in counters.items()}
    metrics = get_compilation_metrics()
    shapes = (pgo._CODE_STATE, pgo._INIT_CODE_STATE)
    counters.clear()
    clear_compilation_metrics()
    pgo._CODE_STATE = pgo._INIT_CODE_STATE = defaultdict(pgo.CodeState)  # equal, so nothing is cached
    try:
        with torch.compiler.set_stance("default"), dynamo_config.patch(error_on_recompile=False):
            yield
    finally:
        pgo._CODE_STATE, pgo._INIT_CODE_STATE = shapes
        counters.clear()
        counters.update(counted)
        clear_compilation_metrics()
        _compilation_metrics.extend(metrics)


def graph_breaks() -> Counter[str]:
    """Why, and how often, Dynamo broke a graph or gave up on a function since its records were set aside."""
    breaks = Counter({reason: count for reason, count in counters["graph_break"].items() if count > 0})
    for metrics in get_compilation_metrics():
        if metrics.fail_type == "Unsupported":
            breaks[metrics.fail_reason or ""] += 1
    return breaks


def discard_code(backend: Callable[..., Any]) -> None:
    """Frees the code that Dynamo compiled with `backend`, so that it does not count toward the recompile limit."""
    discarded = DeletedGuardManagerWrapper("te_dynamo.explain is done with it")
    discarded.id_matched_objs = {"": lambda: True}  # type: ignore[dict-item]  # matches no frame; Dynamo would count it for one
    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        for entry in eval_frame._debug_get_cache_entry_list(code) if code is not None else ():
            if entry.backend == backend:
                state = entry.guard_manager.extra_state
                if state is not None:
                    state.invalidate(entry, discarded)
    for key, known in list(eval_frame.cached_backends.items()):
        if known == backend:
            del eval_frame.cached_backends[key]
