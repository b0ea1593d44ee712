"""cuDNN's fused attention as TE calls it, one sample and all its heads at a time, in float32.

FP8 (per-tensor scales) follows the graph that TE builds (C/fused_attn/fused_attn_fp8.cu) and TE's own emulation of it: the
softmax's result is cast by `s_quantizer` before it multiplies V, the scores' gradient by `dp_quantizer` before it multiplies
K and Q. A fused kernel may cast before it divides by the softmax's sum, which it computes last: not modeled here. No dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu import device
from tests.te_on_cpu.layout import Layout, in_format
from tests.te_on_cpu.quantize import create_empty_quantized_tensor, format_of, is_delayed, quantize, store
from tests.te_on_cpu.rounding import FP8, amax_of, cast, write
from tests.te_on_cpu.scores import Problem, probabilities


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    dropout: float,
    set_zero: bool,
    qkv_layout: Any,
    o_format: Any,
    qkv_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window_size: Sequence[int],
    bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Any,
    k: Any,
    v: Any,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    page_table_k: Tensor | None,
    page_table_v: Tensor | None,
    s_quantizer: Any,
    o_quantizer: Any,
    bias: Tensor | None,
    softmax_offset: Tensor | None,
    rng_gen: torch.Generator | None,
    rng_elts_per_thread: int,
    return_max_logit: bool,
    cuda_graph: bool,
) -> list[Any]:
    """[O, the softmax's log-sum-exp, (the largest scores,) the random state int64 [2], (the bias,) (the softmax's offset)].

    O: like q with v's head size, in `o_format`; FP8 only if `o_quantizer` is delayed. Log-sum-exp and largest scores:
    float32 [b, h, max_seqlen_q, 1] or, for thd, [t, h, 1]. Rows of padding are zero. P/csrc/extensions/attention.cpp:118.
    """
    _refuse(dropout, bias_type, page_table_k)
    layout = Layout.of(qkv_layout)
    q, k, v = _operands(layout, q, k, v)
    problem = Problem.of(
        layout, mask_type, window_size, bottom_right_diagonal, q.shape[-2], attn_scale,
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded,
    )  # fmt: skip
    problem.queries.check(q)
    problem.keys.check(k)
    out = torch.zeros([*q.shape[:-1], v.shape[-1]])
    stats, largest = problem.empty_per_row(out), problem.empty_per_row(out)
    amax = torch.zeros(1)
    for sample in range(problem.samples):
        scores, sink = problem.scores(q, k, sample, bias, _sink(softmax_type, softmax_offset, q.shape[-2]))
        log_sum = torch.logsumexp(scores if sink is None else torch.cat([scores, sink], -1), -1)
        p = probabilities(scores, log_sum)
        amax = torch.maximum(amax, amax_of(p))
        problem.queries.rows(out, sample).copy_((_through_fp8(p, s_quantizer) @ problem.heads_of_keys(v, sample)).movedim(0, 1))
        problem.rows_of(stats, sample).copy_(log_sum)
        problem.rows_of(largest, sample).copy_(scores.amax(-1))
    _record(s_quantizer, amax)
    out = in_format(out, layout.q_format, _name(o_format)).contiguous()
    results = [store(out, fake_dtype, o_quantizer if o_quantizer is not None and is_delayed(o_quantizer) else None), stats]
    if return_max_logit:
        results.append(largest)
    return [*results, torch.zeros(2, dtype=torch.int64), *(t for t in (bias, softmax_offset) if t is not None)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    dropout: float,
    set_zero: bool,
    qkv_layout: Any,
    o_format: Any,
    do_format: Any,
    dqkv_layout: Any,
    qkv_scale_inv_format: Any,
    do_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window_size: Sequence[int],
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    d_o: Any,
    fake_dtype: torch.dtype,
    aux: Sequence[Tensor],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    s_quantizer: Any,
    dp_quantizer: Any,
    dqkv_quantizer: Any,
    cuda_graph: bool,
) -> list[Any]:
    """[dq, dk, dv, the bias's gradient or None, the offset's or None]: the first three views of the buffers of `dqkv_layout`.

    They are FP8 if `dqkv_quantizer` is delayed, with one scale. The probabilities are recomputed from the scores and the
    saved log-sum-exp, the rows' dot products from O and dO, as in cuDNN. aux: what the forward returned after O.
    P/csrc/extensions/attention.cpp:318.
    """
    _refuse(dropout, bias_type, None)
    device.hear("deterministic", deterministic)
    layout = Layout.of(qkv_layout)
    q, k, v = _operands(layout, q, k, v)
    problem = Problem.of(
        layout, mask_type, window_size, bottom_right_diagonal, q.shape[-2], attn_scale,
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded,
    )  # fmt: skip
    problem.queries.check(q)
    problem.keys.check(k)
    o = in_format(_values(o), _name(o_format), layout.q_format)
    d_o = in_format(_values(d_o), _name(do_format), layout.q_format)
    stats, _, *rest = aux
    if stats.shape != problem.empty_per_row(q).shape or stats.dtype != torch.float32:
        raise RuntimeError(f"the softmax's statistics are {stats.dtype} {list(stats.shape)}")
    bias = rest.pop(0) if "BIAS" in bias_type.name and "NO_BIAS" not in bias_type.name else None
    offset = rest.pop(0) if rest and "VANILLA" not in softmax_type.name else None

    gradients = [torch.zeros(t.shape) for t in (q, k, v)]
    bias_grad = None if bias is None else torch.zeros(bias.shape)
    offset_grad = torch.zeros(1, q.shape[-2], 1, 1)
    amax = torch.zeros(1)
    for sample in range(problem.samples):
        scores, sink = problem.scores(q, k, sample, bias, _sink(softmax_type, offset, q.shape[-2]))
        log_sum = problem.rows_of(stats, sample)
        p = probabilities(scores, log_sum)
        dy = problem.heads_of_queries(d_o, sample)
        dots = (dy * problem.heads_of_queries(o, sample)).sum(-1, keepdim=True)
        ds = p * (dy @ problem.heads_of_keys(v, sample).transpose(-1, -2) - dots)
        amax = torch.maximum(amax, amax_of(ds))
        if bias_grad is not None:
            problem.add_to_bias(bias_grad, ds, sample)
        if sink is not None:
            offset_grad -= (probabilities(sink, log_sum) * dots).sum(1)[None, :, :, None]
        ds, p = _through_fp8(ds, dp_quantizer), _through_fp8(p, s_quantizer)
        parts = (
            ds @ problem.heads_of_keys(k, sample) * attn_scale,
            ds.transpose(-1, -2) @ problem.heads_of_queries(q, sample) * attn_scale,
            p.transpose(-1, -2) @ dy,
        )
        for gradient, part in zip(gradients, parts, strict=True):
            problem.write(gradient, part, sample, of_queries=gradient is gradients[0])
    _record(dp_quantizer, amax)
    return [
        *_packed(gradients, layout, Layout.of(dqkv_layout), fake_dtype, dqkv_quantizer),
        None if bias_grad is None else bias_grad.to(fake_dtype),
        None if "VANILLA" in softmax_type.name else offset_grad,
    ]


def _refuse(dropout: float, bias_type: Any, page_table: Tensor | None) -> None:
    if dropout:
        raise NotImplementedError("attention with dropout has no stand-in: its random numbers are cuDNN's")
    if bias_type.name in ("NVTE_ALIBI", "NVTE_PRE_SCALE_BIAS"):
        raise NotImplementedError(f"attention with {bias_type.name} has no stand-in")
    if page_table is not None:
        raise NotImplementedError("attention over pages has no stand-in")


def _operands(layout: Layout, *qkv: Any) -> list[Tensor]:
    """q, k, v in float32. Raises RuntimeError if they do not have the layout."""
    layout.check(*(t._data if format_of(t) is not None else t for t in qkv))
    return [_values(t) for t in qkv]


def _values(t: Any) -> Tensor:
    format = format_of(t)
    if format is None:
        if t.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"fused attention takes FP8, float16 and bfloat16, not {t.dtype}")
        return t.detach().float()
    if not hasattr(t, "_data"):
        raise NotImplementedError(f"attention of {type(t).__name__} has no stand-in")
    return format.dequantize(t)


def _sink(softmax_type: Any, offset: Tensor | None, heads: int) -> Tensor | None:
    """[h]: the score of an extra key without a value, whose probability is dropped; None for a plain softmax."""
    if "VANILLA" in softmax_type.name:
        return None
    return torch.zeros(heads) if offset is None else offset.detach().float().reshape(heads)


def _through_fp8(values: Tensor, quantizer: Any) -> Tensor:
    """`values` rounded to FP8 with a quantizer's scale; `_record` records their amax."""
    if quantizer is None:
        return values
    fp8 = FP8[int(quantizer.dtype)]
    return cast(values * quantizer.scale, fp8).view(fp8).float() / quantizer.scale


def _record(quantizer: Any, amax: Tensor) -> None:
    if quantizer is not None:
        write(quantizer.amax, torch.maximum(quantizer.amax, amax))


def _packed(gradients: Sequence[Tensor], source: Layout, target: Layout, dtype: torch.dtype, quantizer: Any) -> list[Any]:
    formats = ((source.q_format, target.q_format), *((source.kv_format, target.kv_format),) * 2)
    ready = [in_format(t, *pair) for t, pair in zip(gradients, formats, strict=True)]
    in_fp8 = quantizer is not None and is_delayed(quantizer)
    views = target.empty([t.shape for t in ready], torch.uint8 if in_fp8 else dtype)
    if not in_fp8:
        return [view.copy_(t) for view, t in zip(views, ready, strict=True)]
    results = []
    for view, t in zip(views, ready, strict=True):
        result = create_empty_quantized_tensor(quantizer, t.shape, dtype, t.device, False)
        result._data = view
        results.append(quantize(t, quantizer, result))
    return results


def _name(format: Any) -> str:
    """tex.NVTE_QKV_Format as "bshd"."""
    return format.name.removeprefix("NVTE_").lower()
