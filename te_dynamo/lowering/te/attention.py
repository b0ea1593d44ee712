"""TE's fused attention (cuDNN), in 16 bits and in FP8: four operators, and the implementations that call them.

The calls are those of TE 2.20 (pytorch/cpp_extensions/fused_attn.py). A `layout`, in TE's spelling, says how tensors are laid out: each of
q, k and v is [B, S, H, D] or [S, B, H, D], contiguous or a view of one buffer that holds all three; or, for sequences of different lengths
(`thd_thd_thd`), [T, H, D].

FP8 follows TE's delayed scaling: q, k and v share one scale; S, O, dO and dP have one each; the three gradients share one. O and the
gradients leave the kernels in FP8. Inductor's kernels that compute the inputs also quantize them; the kernels that read the outputs
dequantize them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from te_dynamo.ir.layout import ORDER, Layout, as_bhsd
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import E4M3, amax, dequantize
from te_dynamo.lowering.kernels import cast_rotated  # noqa: F401  its operator
from te_dynamo.lowering.native.unpadded import UnpaddedAttention, is_causal
from te_dynamo.lowering.quantized import Quantized, Scales
from te_dynamo.lowering.reference.attention import modified, no_gradients, softmax_scale
from te_dynamo.lowering.registry import HIGH_PRECISION, Backward, Case, Forward, Implementation, Needs, Substitute, implements, instead
from te_dynamo.lowering.rotation import center_of, centered, prepares, rotated_amax
from te_dynamo.lowering.te.attention_limits import AttentionCase, refused
from te_dynamo.lowering.te.library import api, capability, cudnn_version, running
from te_dynamo.lowering.te.linear import quantizer
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling

EXACT = (torch.Tag.needs_exact_strides,)  # a layout describes memory; before torch 2.12 tags must be a sequence, even a single one


def _lengths(batch: int, length: int, device: torch.device) -> Tensor:
    """The offset at which each sequence begins, and the end of the last: int32 [batch + 1]."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _common(
    q: Tensor,
    k: Tensor,
    layout: str,
    causal: bool,
    softmax_scale: float,
    window: int = -1,
    ends: Tensor | None = None,
    longest: int = 0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first four arguments of both calls (forward and backward), and the keywords that they share."""
    form = _form(layout)
    if ends is not None:
        first, mask = (longest, longest, ends, ends), "padding_causal" if causal else "padding"
        more: dict[str, Any] = {"cu_seqlens_q_padded": ends, "cu_seqlens_kv_padded": ends}
    else:
        b, s, s_kv = q.shape[form.index("b")], q.shape[form.index("s")], k.shape[form.index("s")]
        first, mask = (s, s_kv, _lengths(b, s, q.device), _lengths(b, s_kv, q.device)), "causal" if causal else "no_mask"
        more = {}
    keywords = more | {
        "attn_scale": softmax_scale,
        "qkv_layout": layout,
        "o_format": form,
        "attn_mask_type": mask,
        "window_size": (window, 0) if causal else (-1, -1),
        "cuda_graph": q.is_cuda and torch.cuda.is_current_stream_capturing(),
    }
    return first, keywords


def _form(layout: str) -> str:
    """The layout of q, which o gets too: "bshd", "sbhd" or "thd"."""
    return layout[:2] + "hd" if packed(layout) else layout.split("_")[0]


def packed(layout: str) -> bool:
    """Whether q, k and v share one buffer in a layout."""
    return "3" in layout


def _buffers(gradients: Sequence[Tensor], written: str, layout: str) -> list[Tensor]:
    """The memory of gradients that TE wrote in the layout `written`, rearranged to `layout`: one tensor [.., 3, H, D] or [.., H, 3, D] if
    packed, else three."""
    if not packed(layout):
        return list(gradients)
    if written != layout:
        return [torch.stack(list(gradients), -2 if layout.endswith("h3d") else -3)]
    dq = gradients[0]
    shape = _packed_shape(dq.shape, layout)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return [dq.as_strided(shape, strides, dq.storage_offset())]


def as_claimed(q: Tensor, k: Tensor, v: Tensor, layout: str) -> tuple[list[Tensor], str]:
    """q, k and v, and their actual layout: copied to separate buffers if they are not the parts of one buffer that `layout` says they are.

    The compiler of the graph may have given them separate memory.
    """
    if not packed(layout):
        return [q, k, v], layout
    step = q.element_size() * (q.shape[3] if layout.endswith("h3d") else q.shape[2] * q.shape[3])
    addresses = [t.data_ptr() for t in (q, k, v)]
    if lies(q, k, v, layout) and addresses == [addresses[0] + i * step for i in range(3)]:
        return [q, k, v], layout
    return [t.contiguous() for t in (q, k, v)], "_".join([_form(layout)] * 3)


def lies(q: Tensor, k: Tensor, v: Tensor, layout: str) -> bool:
    """Whether the shapes and strides are those of the parts of a packed layout."""
    _, b, h, d = q.shape
    rows = (3 * d, 1) if layout.endswith("h3d") else (d, 1)
    return q.shape == k.shape == v.shape and all(t.stride() == (b * 3 * h * d, 3 * h * d, *rows) for t in (q, k, v))


def _packed_shape(shape: Sequence[int], layout: str) -> list[int]:
    a, b, h, d = shape
    return [a, b, h, 3, d] if layout.endswith("h3d") else [a, b, 3, h, d]


def parts(buffers: Sequence[Tensor], layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, taken from the buffers of a layout."""
    if not packed(layout):
        dq, dk, dv = buffers
        return dq, dk, dv
    dq, dk, dv = buffers[0].unbind(-2 if layout.endswith("h3d") else -3)
    return dq, dk, dv


def _fp8(t: Tensor, inverse: Tensor, dtype: torch.dtype) -> Any:
    te = api()
    return te.Storage(
        data=t.view(torch.uint8), fp8_scale_inv=inverse.reshape(1), fp8_dtype=te.dtype[t.dtype], fake_dtype=dtype, data_transpose=None
    )


# --- in 16 bits


@torch.library.custom_op("te_dynamo::te_attention_fwd", mutates_args=(), tags=EXACT)
def te_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    causal: bool,
    softmax_scale: float,
    training: bool,
    window: int = -1,
    ends: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: 16 bits, laid out as `layout` says -> (o, laid out as q, [.., D_v], contiguous; for backward, empty without `training`: the
    log of the sum of exponentials f32 [B, H, S, 1] or [T, H, 1], the random state int64 [2]).

    window: with `causal`, how many columns before its own a row attends to, -1 for all. ends, longest: in `thd_thd_thd`, the offset at
    which each sequence begins, and the end of the last, int32 [B + 1]; and the length that none exceeds.
    Runs cuDNN's kernel, and one or two that write the sequence lengths.
    """
    te = api()
    with running():
        (q, k, v), layout = as_claimed(q, k, v, layout)
        first, keywords = _common(q, k, layout, causal, softmax_scale, window, ends, longest)
        backend = te.AttnBackend["F16_arbitrary_seqlen"]
        o, aux, *_ = te.fused_attn_fwd(training, *first, q, k, v, q.dtype, backend, **keywords)
    lse, rng = aux if training else (o.new_empty(0, dtype=torch.float32), o.new_empty(0, dtype=torch.int64))
    return o, lse, rng


@te_attention_fwd.register_fake
def _(q, k, v, layout, causal, softmax_scale, training, window=-1, ends=None, longest=0):
    return q.new_empty(*q.shape[:-1], v.shape[-1]), *_aux_fake(q, layout, training)


def _aux_fake(q: Tensor, layout: str, training: bool) -> tuple[Tensor, Tensor]:
    form = _form(layout)
    rows = (*q.shape[:2], 1) if form == "thd" else (q.shape[form.index("b")], q.shape[2], q.shape[form.index("s")], 1)
    return q.new_empty(rows if training else (0,), dtype=torch.float32), q.new_empty(2 if training else 0, dtype=torch.int64)


@torch.library.custom_op("te_dynamo::te_attention_bwd", mutates_args=(), tags=EXACT)
def te_attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rng: Tensor,
    layout: str,
    causal: bool,
    softmax_scale: float,
    window: int = -1,
    ends: Tensor | None = None,
    longest: int = 0,
) -> list[Tensor]:
    """Forward's inputs and outputs, and do, laid out as o -> the gradients of q, k and v, in the buffers of `layout` (see `parts`)."""
    te = api()
    with running():
        (q, k, v), lying = as_claimed(q, k, v, layout)
        first, keywords = _common(q, k, lying, causal, softmax_scale, window, ends, longest)
        backend = te.AttnBackend["F16_arbitrary_seqlen"]
        deterministic = torch.are_deterministic_algorithms_enabled()
        gradients = te.fused_attn_bwd(
            *first, q, k, v, o, do, q.dtype, [lse, rng], backend, **_of_backward(keywords), deterministic=deterministic
        )
    return _buffers(gradients[:3], lying, layout)


def _of_backward(keywords: dict[str, Any]) -> dict[str, Any]:
    return keywords | {"do_format": keywords["o_format"], "dqkv_layout": keywords["qkv_layout"]}


@te_attention_bwd.register_fake
def _(do, q, k, v, o, lse, rng, layout, causal, softmax_scale, window=-1, ends=None, longest=0):
    return _buffers_fake(q, k, v, layout, do.dtype)


def _buffers_fake(q: Tensor, k: Tensor, v: Tensor, layout: str, dtype: torch.dtype) -> list[Tensor]:
    if packed(layout):
        return [q.new_empty(_packed_shape(q.shape, layout), dtype=dtype)]
    return [t.new_empty(t.shape, dtype=dtype) for t in (q, k, v)]


# --- in FP8


@torch.library.custom_op("te_dynamo::te_fp8_attention_fwd", mutates_args=(), tags=EXACT)
def te_fp8_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inverses: Sequence[Tensor],
    s_scale: Tensor,
    o_scale: Tensor,
    layout: str,
    causal: bool,
    softmax_scale: float,
    dtype: torch.dtype,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v: E4M3, laid out as `layout` says; inverses: the scale_inv of each; scales f32, 0-d; dtype: their high-precision dtype ->
    (o in E4M3, scaled by `o_scale`, the log of the sum of exponentials and the random state as in `te_attention_fwd`, the amaxes of S and o
    f32 [2])."""
    te = api()
    amaxes = s_scale.new_zeros(2)
    with running():
        first, keywords = _common(q, k, layout, causal, softmax_scale)
        s8, o8 = (quantizer(scale, amaxes[i : i + 1], E4M3, True, False) for i, scale in enumerate((s_scale, o_scale)))
        operands = [_fp8(t, inverse, dtype) for t, inverse in zip((q, k, v), inverses, strict=True)]
        o, aux, *_ = te.fused_attn_fwd(
            training, *first, *operands, dtype, te.AttnBackend["FP8"], s_quantizer=s8, o_quantizer=o8, **keywords
        )
    lse, rng = aux if training else (amaxes.new_empty(0), amaxes.new_empty(0, dtype=torch.int64))
    return o._data.view(E4M3), lse, rng, amaxes


@te_fp8_attention_fwd.register_fake
def _(q, k, v, inverses, s_scale, o_scale, layout, causal, softmax_scale, dtype, training):
    return q.new_empty(*q.shape[:-1], v.shape[-1]), *_aux_fake(q, layout, training), s_scale.new_empty(2)


@torch.library.custom_op("te_dynamo::te_fp8_attention_bwd", mutates_args=(), tags=EXACT)
def te_fp8_attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rng: Tensor,
    qkv_inv: Tensor,
    s_scale: Tensor,
    o_inv: Tensor,
    do_inv: Tensor,
    dp_scale: Tensor,
    dqkv_scale: Tensor,
    layout: str,
    causal: bool,
    softmax_scale: float,
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    """do: FP8, laid out as o; the rest: forward's inputs and outputs -> (the gradients of q, k and v in do's format, scaled by
    `dqkv_scale`, as TE laid them out; the amaxes of dP and of the three f32 [2])."""
    te = api()
    amaxes = qkv_inv.new_zeros(2)
    with running():
        first, keywords = _common(q, k, layout, causal, softmax_scale)
        s8 = quantizer(s_scale, qkv_inv.new_zeros(1), E4M3, True, False)
        dp8, dqkv8 = (quantizer(scale, amaxes[i : i + 1], do.dtype, True, False) for i, scale in enumerate((dp_scale, dqkv_scale)))
        operands = [*(_fp8(t, qkv_inv, dtype) for t in (q, k, v)), _fp8(o, o_inv, dtype), _fp8(do, do_inv, dtype)]
        quantizers = {"s_quantizer": s8, "dp_quantizer": dp8, "dqkv_quantizer": dqkv8}
        deterministic = torch.are_deterministic_algorithms_enabled()
        gradients = te.fused_attn_bwd(
            *first, *operands, dtype, [lse, rng], te.AttnBackend["FP8"], **quantizers, **_of_backward(keywords), deterministic=deterministic
        )
    return [t._data.view(do.dtype) for t in gradients[:3]], amaxes


@te_fp8_attention_bwd.register_fake
def _(do, q, k, v, o, lse, rng, qkv_inv, s_scale, o_inv, do_inv, dp_scale, dqkv_scale, layout, causal, softmax_scale, dtype):
    return _buffers_fake(q, k, v, layout, do.dtype), qkv_inv.new_empty(2)


def _products(q: Sequence[int], k: Sequence[int], layout: str, longest: int = 0) -> int:
    """2 x batches x heads x queries x keys; of sequences of different lengths, as if each had `longest` keys."""
    form = _form(layout)
    if form == "thd":
        return 2 * q[0] * q[1] * longest
    return 2 * q[form.index("b")] * q[2] * q[form.index("s")] * k[form.index("s")]


@register_flop_formula([torch.ops.te_dynamo.te_attention_fwd])
def _(q, k, v, layout, causal, scale, training, window=-1, ends=None, longest=0, *, out_shape=None, **kwargs) -> int:
    return _products(q, k, layout, longest) * (q[-1] + v[-1])


@register_flop_formula([torch.ops.te_dynamo.te_fp8_attention_fwd])
def _(q, k, v, inverses, s_scale, o_scale, layout, *args, out_shape=None, **kwargs) -> int:
    return _products(q, k, layout) * (q[3] + v[3])


@register_flop_formula([torch.ops.te_dynamo.te_attention_bwd])
def _(do, q, k, v, o, lse, rng, layout, causal, scale, window=-1, ends=None, longest=0, *, out_shape=None, **kwargs) -> int:
    return _products(q, k, layout, longest) * (3 * q[-1] + 2 * v[-1])


@register_flop_formula([torch.ops.te_dynamo.te_fp8_attention_bwd])
def _(do, q, k, v, o, lse, rng, qkv_inv, s_scale, o_inv, do_inv, dp_scale, dqkv_scale, layout, *args, out_shape=None, **kwargs) -> int:
    return _products(q, k, layout) * (3 * q[3] + 2 * v[3])


# --- as implementations


def _unsupported(case: Case) -> str | None:
    q, k, v, mask = (case.inputs[name] for name in ("q", "k", "v", "mask"))
    skips = case.op.name == "unpadded_attention"
    return modified(case) or refused(
        AttentionCase(
            dtype=q.dtype,
            head_qk=int(q.shape[3]),
            head_v=int(v.shape[3]),
            s_q=q.shape[2],
            s_kv=k.shape[2],
            causal=case.attributes["causal"] or case.attributes["window"] >= 0,
            mask=mask is not None and case.attributes["window"] < 0 and not skips,
            window=case.attributes["window"],
            dropout=case.attributes["dropout_p"],
            trains=case.trains,
            in_fp8=case.recipe is not None,
            fp8_backward=case.op.name == "attention",
            capability=capability(case.device),
            cudnn=cudnn_version(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            thd=skips,
        )
    )


def _common_attributes(call: Call, q: Tensor, layout: str) -> tuple[str, bool, float]:
    return layout, call["causal"] or call["window"] >= 0, softmax_scale(call, q)


IN_ADVANCE = "backward's kernels need the scales of dP and the gradients in advance"
instead("attention", "te", {Float8CurrentScaling: Substitute(lambda recipe: recipe.delayed, IN_ADVANCE)})


@implements("attention", provider="te", recipes=(HIGH_PRECISION,))
class TEAttention(Implementation):
    """`scaled_dot_product_attention` by TE's 16-bit kernels, used where q, k and v share a buffer (torch's gain nothing from that) or the
    mask is a sliding window (torch's would read the full mask)."""

    def unsupported(self, case: Case) -> str | None:
        if not packed(case.attributes["qkv_layout"]) and case.attributes["window"] < 0:
            return "q, k and v are in separate buffers, which torch's attention reads without a copy"
        return _unsupported(case)

    def kernel(self, case: Case) -> str:
        layout, window = case.attributes["qkv_layout"], case.attributes["window"]
        return f"TE's fused attention, {layout}" + (f", a window of {window + 1}" if window >= 0 else "")

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        order, layout = ORDER[call["form"]], call["qkv_layout"]
        q, k, v = (t.permute(order) for t in inputs[:3])
        if not lies(q, k, v, layout):
            q, k, v, layout = q.contiguous(), k.contiguous(), v.contiguous(), _apart(call["form"])
        o, lse, rng = torch.ops.te_dynamo.te_attention_fwd(q, k, v, *_common_attributes(call, q, layout), any(needs[:3]), call["window"])
        return Forward([as_bhsd(o, call["form"])], [Quantized(t) for t in (q, k, v, o, lse, rng)], [])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        order, layout = ORDER[call["form"]], call["qkv_layout"]
        forward = [t.data for t in saved]
        q, k, v = forward[:3]
        if not lies(q, k, v, layout):
            layout = _apart(call["form"])
        do = grads[0].permute(order).contiguous()
        buffers = torch.ops.te_dynamo.te_attention_bwd(
            do, *forward, *_common_attributes(call, do if q is None else q, layout), call["window"]
        )
        return Backward([*(as_bhsd(t, call["form"]) for t in parts(buffers, layout)), *no_gradients(call)], [])


@implements("unpadded_attention", provider="te", recipes=(HIGH_PRECISION,))
class TEUnpaddedAttention(UnpaddedAttention):
    """Attention of the tokens that are no padding, by TE's 16-bit kernels."""

    def unsupported(self, case: Case) -> str | None:
        return _unsupported(case)

    def kernel(self, case: Case) -> str:
        return "TE's fused attention of the tokens that are no padding"

    def attend(self, call: Call, qkv: Sequence[Tensor], ends: Tensor, longest: Any, training: bool) -> list[Tensor]:
        common = (is_causal(call), softmax_scale(call, qkv[0]))
        return list(torch.ops.te_dynamo.te_attention_fwd(*qkv, self.layout, *common, training, -1, ends, longest))

    def gradients(
        self, call: Call, grad: Tensor, qkv: Sequence[Tensor], made: Sequence[Tensor], ends: Tensor, longest: Any
    ) -> Sequence[Tensor]:
        common = (is_causal(call), softmax_scale(call, qkv[0]))
        return torch.ops.te_dynamo.te_attention_bwd(grad, *qkv, *made, self.layout, *common, -1, ends, longest)


class Operands(NamedTuple):
    """scales: by role; tensors: q, k and v in FP8, contiguous; peaks: f32, the amaxes of each, the largest is the tensor's."""

    scales: dict[str, Any]
    tensors: Sequence[Tensor]
    peaks: Sequence[Tensor]


@implements("attention", provider="te", recipes=(DelayedScaling,))
class TEFP8Attention(Implementation):
    """The same in FP8: q, k and v share one scale; S, O, dO and dP have one each; the three gradients share one."""

    calibrates = False  # its kernels cannot handle a scale that was never set
    shared: tuple[tuple[str, ...], ...] = (("q", "k", "v"),)

    def unsupported(self, case: Case) -> str | None:
        return _unsupported(case)

    def kernel(self, case: Case) -> str:
        return f"TE's fused attention, {_apart(case.attributes['form'])}"

    def forward_scales(self, scales: Scales, largest: Sequence[Tensor]) -> dict[str, Any]:
        """By role. largest: upper bounds of q, k and v, 0-d."""
        return {role: scales.at(role).known for role in scales.roles.forward}

    def operands(self, call: Call, scales: Scales, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        three = [t.contiguous() for t in (q, k, v)]
        peaks = [amax(t) for t in three]
        known = self.forward_scales(scales, peaks)
        cast = [scales.casting.saturated(t, known[role].value, E4M3).to(E4M3) for t, role in zip(three, "qkv", strict=True)]
        return Operands(known, cast, peaks)

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        order, dtype = ORDER[call["form"]], call.inputs[0]
        known, (q8, k8, v8), peaks = self.operands(call, scales, *(t.permute(order) for t in inputs[:3]))
        common = (*_common_attributes(call, q8, _apart(call["form"])), dtype)
        o8, lse, rng, amaxes = torch.ops.te_dynamo.te_fp8_attention_fwd(
            q8, k8, v8, [known[role].inverse for role in "qkv"], known["s"].value, known["o"].value, *common, any(needs[:3])
        )
        saved = [Quantized(q8, known["q"].inverse), Quantized(k8), Quantized(v8), Quantized(o8, known["o"].inverse)]
        saved += [Quantized(lse), Quantized(rng), Quantized(scale=known["s"].value)]
        return Forward([as_bhsd(dequantize(o8, known["o"].inverse, dtype), call["form"])], saved, [*peaks, amaxes[:1], amaxes[1:]])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        order, casting = ORDER[call["form"]], scales.casting
        q8, k8, v8, o8, lse, rng, s8 = saved
        known = {role: scales.at(role).known for role in scales.roles.gradient}
        do = grads[0].permute(order).contiguous()
        do8 = casting.saturated(do, known["do"].value, casting.gradient).to(casting.gradient)
        tensors = [t.data for t in (q8, k8, v8, o8, lse, rng)]
        common = (*_common_attributes(call, q8.data, _apart(call["form"])), call.inputs[0])
        gradients, amaxes = torch.ops.te_dynamo.te_fp8_attention_bwd(
            do8, *tensors, q8.scale_inv, s8.scale, o8.scale_inv, known["do"].inverse, known["dp"].value, known["dqkv"].value, *common
        )
        made = [as_bhsd(dequantize(t, known["dqkv"].inverse, do.dtype), call["form"]) for t in gradients]
        return Backward([*made, *no_gradients(call)], [amax(do), amaxes[:1], amaxes[1:]])


@implements("fp8_forward_attention", provider="te", recipes=(DelayedScaling,))
class TEFP8ForwardAttention(TEFP8Attention):
    """Forward in FP8; backward in 16 bits, from q, k, v and o in high precision and the forward's softmax statistics, as TE does with
    NVTE_FP8_DPA_BWD=0."""

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ("q", "k", "v", "outputs")

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        done = super().forward(call, inputs, scales, needs)
        return done._replace(saved=done.saved[4:6])  # lse, rng

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        order = ORDER[call["form"]]
        do, q, k, v, o = (t.permute(order).contiguous() for t in (grads[0], *inputs[:3], *inputs[-1]))
        k = centered(k, _keys(call)) if prepares(call) else k  # forward's softmax statistics are those of the centered k
        lse, rng = (t.data for t in saved)
        common = _common_attributes(call, q, _apart(call["form"]))
        made = torch.ops.te_dynamo.te_attention_bwd(do, q, k, v, o, lse, rng, *common, call["window"])
        return Backward([*(as_bhsd(t, call["form"]) for t in made), *no_gradients(call)], [])


@implements("fp8_forward_attention", provider="te", recipes=(Float8CurrentScaling,))
class TECurrentForwardAttention(TEFP8ForwardAttention):
    """Stateless scales, set before S and O exist: a softmax is at most 1, and O, an average of V, is at most V's amax. q and k are prepared
    (see `lowering.rotation`)."""

    calibrates = True
    shared: tuple[tuple[str, ...], ...] = ()

    def operands(self, call: Call, scales: Scales, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        if not prepares(call):
            return super().operands(call, scales, q, k, v)
        v, center = v.contiguous(), center_of(k, _keys(call))
        known = self.forward_scales(scales, [rotated_amax(q, None), rotated_amax(k, center), amax(v)])
        v8 = scales.casting.saturated(v, known["v"].value, E4M3).to(E4M3)
        q8, peak_q = torch.ops.te_dynamo.cast_rotated(q, None, known["q"].value, E4M3)
        k8, peak_k = torch.ops.te_dynamo.cast_rotated(k, center, known["k"].value, E4M3)
        return Operands(known, [q8, k8, v8], [peak_q, peak_k, amax(v)])

    def forward_scales(self, scales: Scales, largest: Sequence[Tensor]) -> dict[str, Any]:
        of = dict(zip("qkv", largest, strict=True)) | {"s": largest[2].new_ones(()), "o": largest[2]}
        return {role: scales.at(role).of(amaxes) for role, amaxes in of.items()}


def _keys(call: Call) -> int:
    """The dimension of k, in its memory layout, that indexes the keys."""
    return ORDER[call["form"]].index(2)


def _apart(form: str) -> str:
    """The layout in which q, k and v have separate buffers."""
    return Layout(form).name
