"""What the ranks of `test_distributed.py` run."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.recipe import DelayedScaling
from te_dynamo.state import STATE

SIZE, SAMPLES, STEPS = 256, 8, 4  # a layer is 1 MB: the smallest bucket of Dynamo's DDP optimizer


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def batches(steps: int = STEPS) -> list[Tensor]:
    """The same on every rank; the two halves of a batch have very different amaxes, each the larger one in turn."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        x = torch.randn(SAMPLES, SIZE, generator=generator)
        x[(slice(0, SAMPLES // 2), slice(SAMPLES // 2, SAMPLES))[step % 2]] *= 8
        found.append(x)
    return found


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def train(model: nn.Module, steps: list[Tensor], each: Callable[[Tensor], Tensor] = mine, optimizer: Any = None) -> list[Tensor]:
    """The outputs. The loss is a sum over the samples, and DDP's mean over the ranks is undone, so that a sample's gradient is the same as
    in one process."""
    outputs = []
    for x in steps:
        y = model(each(x))
        y.square().sum().backward()
        outputs.append(y.detach())
        if optimizer is not None:
            for p in model.parameters():
                p.grad.mul_(dist.get_world_size())
            optimizer.step()
            optimizer.zero_grad()
    return outputs


def scales(model: nn.Module) -> dict[str, Tensor]:
    return te_dynamo.scale_state(model).state_dict()


def same_on_all_ranks(values: dict[str, Tensor]) -> bool:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return all(v.keys() == everyone[0].keys() and all(torch.equal(v[k], everyone[0][k]) for k in v) for v in everyone)


@functools.cache
def one_process() -> tuple[dict[str, Tensor], list[Tensor]]:
    """The scale state and the outputs of one process that sees all of each batch."""
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend=te_fp8, options={"recipe": DelayedScaling(reduce_amax=False)})
    outputs = []
    for x in batches():
        y = compiled(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        model.zero_grad()
    return scales(model), outputs


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], rounding: float = 0.0) -> None:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    torch.testing.assert_close(a, b, rtol=rounding, atol=0.0)


def ddp(folder: Path) -> None:
    """Buckets of one layer, so Dynamo's DDP optimizer splits the graph."""
    model = Net()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    compiled = torch.compile(wrapped, backend="te_fp8")
    graphs: list[Any] = []
    with observing(lambda gm, sites, options: graphs.append(gm)):
        outputs = train(compiled, batches())
    assert len(graphs) > 1, "the DDP optimizer did not split the graph"
    found = scales(wrapped)
    assert found.keys() == scales(model).keys() and "layers.0.up.input.scale" in found
    assert same_on_all_ranks(found)
    everything, all_outputs = one_process()
    assert_same(found, everything, rounding=1e-6)  # the graph was split: fusion, and so rounding, differ slightly
    for y, z in zip(outputs, all_outputs, strict=True):  # the first too: its scale is the group's
        torch.testing.assert_close(y, mine(z), rtol=1e-5, atol=1e-5)


def collectives(folder: Path) -> None:
    """One collective per step, whatever the number of sites."""
    for layers in (1, 2):
        torch._dynamo.reset()
        model = Net(layers)
        compiled = torch.compile(model, backend="te_fp8")
        train(compiled, batches(2))
        counted = []
        original = dist.all_reduce

        @functools.wraps(original)
        def counting(*args: Any, original: Any = original, counted: list[Any] = counted, **kwargs: Any) -> Any:
            counted.append(args)
            return original(*args, **kwargs)

        dist.all_reduce = counting
        try:
            train(compiled, batches(3))
        finally:
            dist.all_reduce = original
        assert len(counted) == 3, len(counted)


def apart(folder: Path) -> None:
    """With reduce_amax=False, or a group of one rank, each rank has its own scales, and saves alone."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    for options in ({"recipe": DelayedScaling(reduce_amax=False)}, {"amax_group": alone}):
        torch._dynamo.reset()
        model = Net()
        train(torch.compile(model, backend="te_fp8", options=options), batches())
        assert not same_on_all_ranks({k: v for k, v in scales(model).items() if "input" in k})
    model = Net()
    train(torch.compile(model, backend="te_fp8", options={"amax_group": dist.group.WORLD}), batches())
    assert same_on_all_ranks(scales(model))
    if dist.get_rank() == 0:
        assert scales(model)  # no other rank takes part
    dist.barrier()


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    """FSDP2, activation checkpointing and per-layer compile."""
    model = Net()
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)
        model.layers[i].compile(backend="te_fp8")
        fully_shard(model.layers[i])
    fully_shard(model)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def fsdp(folder: Path) -> None:
    model, _ = sharded()
    train(model, batches())
    found = scales(model)
    assert {k.rsplit(".", 2)[0] for k in found} == {f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")}
    assert same_on_all_ranks(found)
    everything, _ = one_process()
    assert_same(found, everything, rounding=0.02)  # a single process computes linears in C++, which sums in another order
    assert not any("scale" in key or "amax" in key for key in model.state_dict())


def fsdp_inference(folder: Path) -> None:
    """Weights that changed between two calls without gradients: FSDP gathers them into the same memory, unnoticed."""
    model, x = sharded()[0].eval(), batches(1)[0]
    with torch.no_grad():
        before = model(x)
        for p in model.parameters():
            p.mul_(2.0)
        after = model(x)
    torch._dynamo.reset()
    fresh = sharded()[0].eval()
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(2.0)
        torch.testing.assert_close(after, fresh(x))
    assert not torch.equal(before, after)


def fsdp_save(folder: Path) -> None:
    """Sharded weights and scales go into one checkpoint; the outputs after it are kept to compare a resumed run with."""
    model, optimizer = sharded()
    train(model, batches(3), optimizer=optimizer)
    dcp.save({"model": model.state_dict(), "scales": scales(model)}, checkpoint_id=str(folder / "checkpoint"))
    outputs = train(model, batches(5)[3:], optimizer=optimizer)
    torch.save(outputs, folder / f"outputs{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        torch.save(scales(model), folder / "scales.pt")


def fsdp_resume(folder: Path) -> None:
    """On any number of ranks."""
    model, optimizer = sharded()
    saved: dict[str, Any] = {"model": model.state_dict()}
    metadata = dcp.FileSystemReader(str(folder / "checkpoint")).read_metadata().state_dict_metadata
    saved["scales"] = {k.removeprefix("scales."): torch.empty(m.size) for k, m in metadata.items() if k.startswith("scales.")}
    dcp.load(saved, checkpoint_id=str(folder / "checkpoint"))
    model.load_state_dict(saved["model"])
    te_dynamo.scale_state(model).load_state_dict(saved["scales"])
    outputs = train(model, batches(5)[3:], optimizer=optimizer)
    expected = [torch.load(folder / f"outputs{rank}.pt") for rank in range(2)]
    for step, y in enumerate(outputs):
        whole = torch.cat([e[step] for e in expected])
        torch.testing.assert_close(y, mine(whole), rtol=1e-5, atol=1e-5)
        assert step > 0 or torch.equal(y, mine(whole))
    then = torch.load(folder / "scales.pt")
    assert then.keys() == scales(model).keys()
    torch.testing.assert_close(scales(model), then, rtol=1e-4, atol=1e-6)


def tensor_parallel(folder: Path) -> None:
    """Linears with DTensor weights are left to Inductor, with the reason; the rest of the graph is taken."""
    model, reference = Net(1), Net(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"layers.0.up": ColwiseParallel(), "layers.0.down": RowwiseParallel()})
    head = nn.Linear(SIZE, SIZE)
    found: list[Any] = []
    with observing(lambda gm, sites, options: found.extend(sites)):
        y = torch.compile(lambda x: head(model(x)), backend="te_fp8")(batches(1)[0])
    linears = [s for s in found if "linear" in s.kind]
    left = [s for s in linears if s.provider is None]
    assert len(linears) == 3 and len(left) == 2 and all("DTensor" in s.reason for s in left)
    expected = head(reference(batches(1)[0]))
    assert (y - expected).norm() < 0.1 * expected.norm()
    y.sum().backward()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(64, 3 * 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def fp8_attention(folder: Path) -> None:
    """Equal to one process that sees the whole batch, from the first step on, which scales by the batch's own amaxes."""
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 8.0])[:, None, None]
    results = []
    for each, recipe in ((mine, DelayedScaling()), (lambda x: x, DelayedScaling(reduce_amax=False))):
        torch._dynamo.reset()
        model = Attention()
        # If ranks share scales, linears on a CPU do not use the C++ that they use otherwise, which sums in another order.
        compiled = torch.compile(model, backend="te_fp8", options={"attention": "fp8", "recipe": recipe, "provider": "reference"})
        leaf = x.clone().requires_grad_()
        y = compiled(each(leaf))
        y.square().sum().backward()
        results.append((y.detach(), mine(leaf.grad), scales(model)))
    (y, dx, found), (whole_y, whole_dx, whole) = results
    assert same_on_all_ranks(found) and any("attention" in name for name in found)
    assert torch.equal(y, mine(whole_y)) and torch.equal(dx, whole_dx)
    assert_same(found, whole)


CASES = {f.__name__: f for f in (fp8_attention, ddp, collectives, apart, fsdp, fsdp_inference, fsdp_save, fsdp_resume, tensor_parallel)}

GENERATED = ("ddp",)  # by Inductor; the other cases test the state and the collectives


def run(case: str, folder: Path) -> None:
    """Runs a case with a separate scale state."""
    from te_dynamo.runtime import compile_without_codegen

    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(STATE.set_aside())
        if case not in GENERATED:
            stack.enter_context(mock.patch("te_dynamo.runtime.compile_inductor", compile_without_codegen))
        CASES[case](folder)


def main(rank: int, size: int, folder: str, cases: Sequence[str]) -> None:
    """One case after the other, up to the first that fails."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting_of_{size}", rank=rank, world_size=size)
    for case in cases:
        print("case", case, file=sys.stderr, flush=True)
        run(case, Path(folder))
    dist.destroy_process_group()
