"""Whether an attention may skip the padding that its mask hides: what `ir.attention.unpadded_attention` needs to be true."""

from __future__ import annotations

import torch
from torch.fx import Node

from te_dynamo.ir.graph import fake, same_size
from te_dynamo.ir.meta import SAME_TOKENS
from te_dynamo.passes.masks.attends import Attends
from te_dynamo.passes.masks.proof import Proof


def keeps_padding(attention: Node, proof: Proof) -> str | None:
    """Why an attention computes its padding too, as a clause; None if it may be skipped. proof: of its mask."""
    q, k = (fake(x) for x in attention.args[:2])
    if proof.kind != "padded":
        return "its mask is not proved to be padding"
    if proof.within not in ("causal", "all"):
        return f"its mask hides more than padding{' (a window)' if proof.within == 'window' else ''}"
    if proof.attends is None and fake(attention.args[3]).dtype != torch.bool:
        return "its mask is added to the scores, and a row may see nothing"
    if proof.attends is None or not concerns_keys(proof.attends):
        return "what its mask hides is not the same for all rows and heads"
    if not same_size(q.shape[2], k.shape[2]):
        return "it has more keys than rows"
    if not attention.meta.get(SAME_TOKENS):
        return "its rows may be other tokens than its keys"
    return None


def concerns_keys(attends: Attends) -> bool:
    """Whether data is compared with nothing that differs between rows or heads, so that the last row shows which tokens are valid."""
    inequalities = [dict(total) for sums in attends.alternatives for total in sums]
    with_data = [total for total in inequalities if any(name.startswith("datum") for name in total)]
    read_at = [dict(index) for _, position in attends.elements for index, _ in position]
    return not any({"row", "head"} & names.keys() for names in (*with_data, *read_at))
