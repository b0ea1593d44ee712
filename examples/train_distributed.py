"""Data-parallel training in FP8, with DDP or FSDP2; checkpoints (torch.distributed.checkpoint) resume on another number of ranks.

    torchrun --nproc-per-node 2 examples/train_distributed.py --shard --steps 6 --save-at 3
    torchrun --nproc-per-node 1 examples/train_distributed.py --shard --steps 6 --resume

A small Llama with random weights learns Python's help as bytes, on GPUs with NCCL, else on CPUs with gloo.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from help_topics import passages
from small_models import small_llama
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import te_dynamo

BATCH, LENGTH = 8, 64  # of all ranks together


def main() -> None:
    arguments = parse_arguments()
    device = start()
    torch.manual_seed(0)
    model = wrapped(small_llama().to(device), shard=arguments.shard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = load(model, optimizer, arguments.out) if arguments.resume else 0

    tokens = torch.tensor(passages(LENGTH))
    while step < arguments.steps:
        step += 1
        rows = torch.randint(len(tokens), (BATCH,), generator=torch.Generator().manual_seed(step))  # the same on each rank
        ids = tokens[rows.chunk(dist.get_world_size())[dist.get_rank()]].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.4f}", flush=True)
        if step == arguments.save_at:
            save(model, optimizer, step, arguments.out)
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="FSDP2; else DDP")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--save-at", type=int, default=0, help="save after this step")
    parser.add_argument("--resume", action="store_true", help="go on from what was saved")
    parser.add_argument("--out", type=Path, default=Path("distributed_out"), help="folder of the checkpoint (default: %(default)s)")
    return parser.parse_args()


def start() -> torch.device:
    """Joins the process group, and returns this rank's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def wrapped(model: nn.Module, *, shard: bool) -> nn.Module:
    """Compiles the model layer by layer, with one graph for all, then shards or replicates it."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.compile(backend="te_fp8")
        if shard:
            fully_shard(layer)
    return fully_shard(model) if shard else DistributedDataParallel(model)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """The contents of a checkpoint. The scales are complete and equal on every rank."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "scales": te_dynamo.scale_state(model).state_dict()}


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    dcp.save({**state_of(model, optimizer), "step": torch.tensor(step)}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Loads a checkpoint, and returns its step. The names of the scales come from the checkpoint: before its first call, the model has
    no scales."""
    names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {**state_of(model, optimizer), "step": torch.tensor(0)}
    state["scales"] = {
        name.removeprefix("scales."): torch.empty(entry.size)  # type: ignore[union-attr]
        for name, entry in names.items()
        if name.startswith("scales.")
    }
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])  # type: ignore[arg-type]
    te_dynamo.scale_state(model).load_state_dict(state["scales"])  # type: ignore[arg-type]
    return int(state["step"])  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
