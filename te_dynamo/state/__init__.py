"""The scale state: one slot for each FP8 tensor of each site of each module instance.

A slot is found by the weight that a call passes in, never by the graph: one compiled graph serves many instances.

    arena.py           where scales and histories live, and the update that moves them
    homes.py           which slots belong to a weight
    group.py           the slots of one graph for one set of weights
    registry.py        how a call finds its slots, and when they roll
    reduce.py          data parallel: amaxes of all ranks
    sharded.py         weights that FSDP gathers
    names.py           what a slot is called
    saved.py           scale_state(model): saving and loading
    te_checkpoint.py   reading Transformer Engine's checkpoints
"""

from te_dynamo.state.arena import FORWARD, GRADIENT, Arena
from te_dynamo.state.group import FakeGroup, Group
from te_dynamo.state.registry import STATE, ScaleState, SlotKey, checkpoint_around, is_fake

__all__ = ["FORWARD", "GRADIENT", "STATE", "Arena", "FakeGroup", "Group", "ScaleState", "SlotKey", "checkpoint_around", "is_fake"]
