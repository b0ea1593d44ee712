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
from te_dynamo.lowering.limits import DTYPES
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


@implements("unpadded_attention", provider=("native", "te"), recipes=(HIGH_PRECISION,), devices=("cuda",))
class UnpaddedAttention(Implementation):
    layout = Layout("thd").name

    def unsupported(self, case: Case) -> str | None:
        q, _k, v, mask = (case.inputs[name] for name in ("q", "k", "v", "mask"))
        if (reason := modified(case)) is not None:
            return reason
        if q.dtype not in DTYPES or q.dtype == torch.float32:
            return f"flash attention takes bfloat16 and float16, not {q.dtype}"
        if case.attributes["dropout_p"]:
            return "its random numbers for dropout are not torch's"
        if not (same_size(q.shape[3], v.shape[3]) and q.shape[3] % HEAD_MULTIPLE == 0 and q.shape[3] <= LARGEST_HEAD):
            wanted = f"multiples of {HEAD_MULTIPLE} up to {LARGEST_HEAD}"
            return f"flash attention takes equal head sizes, {wanted}, not {q.shape[3]} and {v.shape[3]}"
        return None if not mask.requires_grad else "its mask has a gradient"

    def kernel(self, case: Case) -> str:
        return "flash attention of the tokens that are no padding"

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        q, k, v, mask = inputs[:4]
        tokens = Tokens.of(_valid(mask, q))
        packed = [tokens.packed(t) for t in (q, k, v)]
        out, *aux = flash(packed, tokens.ends, q.shape[2], _causal(call), softmax_scale(call, q))
        saved = [*packed, out, *aux, *tokens] if any(needs[:3]) else []
        return Forward([tokens.put_back(out, q, call["form"])], [Quantized(t) for t in saved], [])

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ()

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (q, k, v, out, lse, rng, unused, *where), (grad,) = [t.data for t in saved], grads
        tokens = Tokens(*where)
        given = (tokens.packed(grad), [q, k, v], out, (lse, rng, unused), tokens.ends, grad.shape[2], _causal(call))
        made = flash_gradient(*given, softmax_scale(call, grad))
        return Backward([*(tokens.put_back(t, grad, call["form"]) for t in made), *no_gradients(call)], [])


def _valid(mask: Tensor, q: Tensor) -> Tensor:
    """bool [B, S]; mask: as broadcastable to [B, 1, S, S]."""
    return valid_tokens(mask).expand(q.shape[0], 1, q.shape[2])[:, 0]


def _causal(call: Call) -> bool:
    return call["causal"] or call["padded"] == "causal"


def flash(qkv: Sequence[Tensor], ends: Tensor, longest: Any, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [T, H, D], k and v [T, H_kv, D] -> (out, the log of the sum of exponentials f32 [H, T], two tensors about random numbers)."""
    made = aten._flash_attention_forward(*qkv, ends, ends, longest, longest, 0.0, causal, False, scale=scale)
    return made[0], made[1], made[2], made[3]


def flash_gradient(
    grad: Tensor, qkv: Sequence[Tensor], out: Tensor, aux: Sequence[Tensor], ends: Tensor, longest: Any, causal: bool, scale: float
) -> Sequence[Tensor]:
    """The gradients of q, k and v; out, aux: what `flash` gave."""
    lse, *rng = aux
    made: Sequence[Tensor] = aten._flash_attention_backward(
        grad, *qkv, out, lse, ends, ends, longest, longest, 0.0, causal, *rng, scale=scale
    )
    return made
