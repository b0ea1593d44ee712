"""Attention of sequences with padding on a GPU: the other tokens are packed one after another (thd), attended to by torch's
flash attention for sequences of different lengths, and put back. The host reads no length.

Any token may be padding: on the left, on the right or in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from te_dynamo.ir.attention import valid_tokens
from te_dynamo.ir.graph import same_size
from te_dynamo.ir.layout import ORDER, Form, Layout, as_bhsd
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.limits import SIXTEEN_BITS
from te_dynamo.lowering.quantized import Quantized, Scales
from te_dynamo.lowering.reference.attention import modified, no_gradients, softmax_scale
from te_dynamo.lowering.registry import HIGH_PRECISION, Backward, Case, Forward, Implementation, Needs, implements

LARGEST_HEAD, HEAD_MULTIPLE = 256, 8
aten = torch.ops.aten


class Tokens(NamedTuple):
    """Which of T tokens are no padding, and where they are when they are packed.

    valid: bool [T]. place: int64 [T], where a token goes, if it is valid. source: int64 [T], the token at each place; of those after the
    last valid token, any. ends: int32 [B + 1], where each sequence begins, and the end of the last.
    """

    valid: Tensor
    place: Tensor
    source: Tensor
    ends: Tensor

    @classmethod
    def of(cls, valid: Tensor) -> Tokens:
        """valid: bool [B, S]."""
        flat, every = valid.reshape(-1), torch.arange(valid.numel(), device=valid.device)
        place = flat.cumsum(0) - 1
        source = torch.zeros_like(F.pad(every, (0, 1))).scatter(0, torch.where(flat, place, valid.numel()), every)[:-1]
        return cls(flat, place, source, F.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32))

    def packed(self, t: Tensor) -> Tensor:
        """[B, H, S, D] -> [T, H, D]."""
        return t.transpose(1, 2).flatten(0, 1).index_select(0, self.source)

    def put_back(self, t: Tensor, like: Tensor, form: Form) -> Tensor:
        """[T, H, D] -> [B, H, S, D], in memory as `form` says, with zeros where there is padding."""
        rows = torch.where(
            self.valid[:, None, None], t.index_select(0, self.place.clamp(min=0)), torch.zeros((), dtype=t.dtype, device=t.device)
        )
        made = rows.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
        return as_bhsd(made.permute(ORDER[form]).contiguous(), form)


@implements("unpadded_attention", provider="native", recipes=(HIGH_PRECISION,), devices=("cuda",))
class UnpaddedAttention(Implementation):
    """`attend` and `gradients` are the kernels, for others to replace."""

    layout = Layout("thd").name

    def unsupported(self, case: Case) -> str | None:
        q, v = case.inputs["q"], case.inputs["v"]
        if (reason := modified(case)) is not None:
            return reason
        if q.dtype not in SIXTEEN_BITS:
            return f"flash attention takes bfloat16 and float16, not {q.dtype}"
        if case.attributes["dropout_p"]:
            return "its random numbers for dropout are not torch's"
        if not bool(q.shape[2] > 1):
            return "for one row, its mask is read"
        if not (same_size(q.shape[3], v.shape[3]) and q.shape[3] % HEAD_MULTIPLE == 0 and q.shape[3] <= LARGEST_HEAD):
            wanted = f"multiples of {HEAD_MULTIPLE} up to {LARGEST_HEAD}"
            return f"flash attention takes equal head sizes, {wanted}, not {q.shape[3]} and {v.shape[3]}"
        return None

    def kernel(self, case: Case) -> str:
        return "flash attention of the tokens that are no padding"

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        q, k, v, mask = inputs[:4]
        tokens, trains = Tokens.of(_valid(mask, q)), any(needs[:3])
        packed = [tokens.packed(t) for t in (q, k, v)]
        out, *aux = self.attend(call, packed, tokens.ends, q.shape[2], trains)
        saved = [*tokens, *packed, out, *aux] if trains else []
        return Forward([tokens.put_back(out, q, call["form"])], [Quantized(t) for t in saved], [])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        kept, (grad,) = [t.data for t in saved], grads
        tokens, packed, made = Tokens(*kept[:4]), kept[4:7], kept[7:]
        found = self.gradients(call, tokens.packed(grad), packed, made, tokens.ends, grad.shape[2])
        return Backward([*(tokens.put_back(t, grad, call["form"]) for t in found), *no_gradients(call)], [])

    def attend(self, call: Call, qkv: Sequence[Tensor], ends: Tensor, longest: Any, training: bool) -> list[Tensor]:
        """q [T, H, D], k and v [T, H_kv, D] -> the result [T, H, D], and what else `gradients` needs. longest: the length that no sequence
        exceeds."""
        made = aten._flash_attention_forward(
            *qkv, ends, ends, longest, longest, 0.0, is_causal(call), False, scale=softmax_scale(call, qkv[0])
        )
        return list(made[:4])

    def gradients(
        self, call: Call, grad: Tensor, qkv: Sequence[Tensor], made: Sequence[Tensor], ends: Tensor, longest: Any
    ) -> Sequence[Tensor]:
        """Of q, k and v. made: what `attend` returned."""
        out, lse, *rng = made
        found: Sequence[Tensor] = aten._flash_attention_backward(
            grad, *qkv, out, lse, ends, ends, longest, longest, 0.0, is_causal(call), *rng, scale=softmax_scale(call, qkv[0])
        )
        return found


def _valid(mask: Tensor, q: Tensor) -> Tensor:
    """bool [B, S]; mask: as broadcastable to [B, H, S, S], the same for all heads."""
    return valid_tokens(mask).expand(q.shape[:3])[:, 0]


def is_causal(call: Call) -> bool:
    return call["causal"] or call["padded"] == "causal"
