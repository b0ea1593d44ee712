"""What the ranks of `test_ranks.py` run: `torchrun --nproc-per-node 2 -m tests.integrations.ranks FOLDER CASE ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from safetensors.torch import load_file

import te_dynamo
from te_dynamo.integrations.accelerate import TEFP8Plugin
from tests.integrations.accelerate_program import batches, train
from tests.integrations.trainer_program import SAVED, STEPS, model

SHARDED = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "SHARDED_STATE_DICT"}


def everything(trained: Any) -> dict[str, torch.Tensor]:
    """All weights, whole, and all scales."""
    weights = {name: getattr(p, "full_tensor", lambda p=p: p)().clone() for name, p in trained.state_dict().items()}
    return weights | te_dynamo.scale_state(trained).state_dict()


def saved_and_resumed(folder: Path, accelerator: Accelerator) -> None:
    """In one process: goes back to a checkpoint and trains on; the end is bitwise the same as before."""
    set_seed(0)
    made = model()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    trained, optimizer = accelerator.prepare(made, optimizer)
    data = list(batches(1, STEPS * accelerator.num_processes))[accelerator.process_index :: accelerator.num_processes]
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    train(accelerator, trained, optimizer, schedule, data, **{f"step_{SAVED}": lambda: accelerator.save_state(str(folder))})
    seen = everything(made)
    scales = te_dynamo.scale_state(made).state_dict()
    assert len([name for name in scales if name.endswith("grad_output.scale")]) == 7, sorted(scales)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, scales)
    assert all(torch.equal(found[0][name], scales[name]) for name in scales)  # each rank's scales are those of all ranks' batches

    te_dynamo.scale_state(made).reset()
    accelerator.load_state(str(folder))
    assert sorted(load_file(folder / "scale_state.safetensors")) == sorted(scales)
    train(accelerator, trained, optimizer, schedule, data[SAVED:])
    again = everything(made)
    assert [name for name in seen if not torch.equal(seen[name], again[name])] == []


def ddp(folder: Path) -> None:
    saved_and_resumed(folder / "ddp", Accelerator(cpu=True, dynamo_plugin=TEFP8Plugin()))


def fsdp2(folder: Path) -> None:
    """Accelerate only shards on accelerators, so on a CPU it is made to believe that there are some."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(**SHARDED)
    regional = TEFP8Plugin(use_regional_compilation=True)
    saved_and_resumed(folder / "fsdp2", Accelerator(cpu=True, fsdp_plugin=plugin, dynamo_plugin=regional))


def main(folder: Path, cases: list[str]) -> None:
    from te_dynamo import runtime

    runtime.compile_inductor = runtime.compile_without_codegen
    for case in cases:
        torch._dynamo.reset()
        globals()[case](folder)
        AcceleratorState._reset_state(reset_partial_state=True)
        print(f"{case}: right", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    dist.destroy_process_group()
