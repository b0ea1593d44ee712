"""What is recorded for a launch, against counts by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from te_dynamo.lab.accesses import Accesses
from te_dynamo.lab.flex import density, flops_of
from te_dynamo.lab.launches import Launch, Recorder, nbytes, short
from te_dynamo.lab.roofline import by_group, microseconds
from te_dynamo.lab.stand_in import StandIns
from te_dynamo.lab.step import saved_for_backward
from te_dynamo.lowering.devices import H100
from te_dynamo.lowering.kernels.cast_transpose import cast_transpose
from te_dynamo.lowering.kernels.transpose import transpose

BF16 = torch.bfloat16


@pytest.fixture
def fakes():
    with FakeTensorMode():
        yield


def noted(run, *tensors, weights=()):
    with Recorder(weights) as recorder:
        run(*tensors)
    return recorder.launches


def test_gemms(fakes):
    a, b, bias = torch.empty(8, 16, dtype=BF16), torch.empty(16, 32, dtype=BF16), torch.empty(32, dtype=BF16)
    (product,) = noted(torch.mm, a, b)
    assert (product.kind, product.math, product.flops, product.bytes) == ("gemm", "bf16", 2 * 8 * 16 * 32, 2 * (8 * 16 + 16 * 32 + 8 * 32))
    (added,) = noted(torch.addmm, bias, a, b)
    assert added.flops == product.flops and added.bytes == product.bytes + 2 * 32
    (batched,) = noted(torch.bmm, torch.empty(3, 8, 16), torch.empty(3, 16, 32))
    assert batched.flops == 3 * product.flops and batched.math == "f32"
    assert [x.kind for x in noted(lambda: torch.mm(a.float(), b.float().t().contiguous().t()))] == ["operator"] * 3 + ["gemm"]


def test_grouped_gemms(fakes):
    x, w = torch.empty(64, 16, dtype=BF16, device="cuda"), torch.empty(4, 16, 32, dtype=BF16, device="cuda")
    offsets = torch.empty(4, dtype=torch.int32, device="cuda")
    (found,) = noted(lambda: torch._grouped_mm(x, w, offs=offsets))
    assert found.flops == 2 * 64 * 16 * 32
    (wgrad,) = noted(lambda: torch._grouped_mm(x.t(), torch.empty(64, 32, dtype=BF16, device="cuda"), offs=offsets))
    assert wgrad.flops == found.flops  # each token is in one group


def test_attention_counts_the_causal_half(fakes):
    q = torch.empty(2, 4, 128, 64, dtype=BF16, device="cuda")
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    (whole,), (half,) = (noted(lambda causal=causal: flash(q, q, q, 0.0, causal, False)) for causal in (False, True))
    assert whole.kind == "attention" and whole.flops == 2 * 2 * 2 * 4 * 128 * 128 * 64 == 2 * half.flops
    assert half.detail.endswith(" causal") and whole.detail.endswith("not causal")


def test_views_and_allocations_are_no_kernels(fakes):
    x = torch.empty(8, 16)
    assert noted(lambda: torch.empty_like(x.t().reshape(16, 8).detach())[0].expand(3, 8)) == []
    assert [launch.name for launch in noted(lambda: x.t().reshape(-1).add_(1))] == ["clone", "add_"]


def test_roles(fakes):
    weight, x, one = torch.empty(64, 32, dtype=BF16), torch.empty(64, 32, dtype=BF16), torch.ones(())

    def cast(t):
        return cast_transpose([t], one, torch.float8_e4m3fn, 0, True, True)

    assert [launch.role for launch in noted(cast, weight, weights=[weight])] == ["weight"]
    assert [launch.role for launch in noted(cast, x, weights=[weight])] == ["cast"]
    assert [launch.role for launch in noted(transpose, x.to(torch.float8_e4m3fn))] == ["transpose"]
    assert [launch.role for launch in noted(lambda: x.abs().amax())] == ["math", "amax"]
    (moved,) = noted(cast, x)
    assert moved.bytes == 4 * 64 * 32 + 4 + 4  # read once, written twice, a scale and a block's amax


def test_bytes():
    x = torch.empty(4, 8)
    assert nbytes([x, x, x[:2]]) == 4 * (32 + 16)
    assert nbytes([x[:, :1].expand(4, 8)]) == 4 * 4
    assert short(x) == "f32[4x8]"


def test_times_by_hand():
    gemm = Launch("forward", "gemm", "mm", bytes=0, flops=10**12, math="fp8")
    assert microseconds(gemm, H100) == pytest.approx(1.5 + 1e12 / (0.70 * 1979e12) * 1e6)
    moved = Launch("forward", "triton", "k", bytes=10**9)
    assert microseconds(moved, H100) == pytest.approx(1.5 + 1e9 / (0.85 * 3350e9) * 1e6)
    scattered = Launch("forward", "triton", "k", bytes=10**6, scattered_bytes=10**9)
    assert microseconds(scattered, H100) > 100
    forward, backward = (Launch(phase, "attention", "sdpa", 0, flops=10**12, math="bf16") for phase in ("forward", "backward"))
    assert microseconds(forward, H100) < microseconds(backward, H100)
    for launch in (gemm, moved):
        launch.us = microseconds(launch, H100)
    groups = by_group([gemm, moved, Launch("forward", "triton", "k", 0, us=2.0)])
    assert groups["GEMMs"] == gemm.us and groups["norms, activations, sums"] == moved.us
    assert groups["scales and other small kernels"] == 2.0 and sum(groups.values()) == gemm.us + moved.us + 2.0


KERNEL = """
import triton
@triton.jit
def k(in_ptr0, out_ptr0, out_ptr1, ynumel, xnumel, YBLOCK : tl.constexpr, XBLOCK : tl.constexpr):
    y0 = yindex
    x1 = xindex
    tmp0 = tl.load(in_ptr0 + (x1 + 64*y0), xmask & ymask)
    tl.store(out_ptr0 + ({}), tmp0, xmask & ymask)
    tl.store(out_ptr1 + ({}), tmp0, xmask & ymask)
"""


class Config:
    def __init__(self, y, x):
        self.kwargs = {"YBLOCK": y, "XBLOCK": x}


def test_sectors_that_are_not_filled():
    across, along = Accesses(KERNEL.format("y0 + 128*x1", "y0 + 128*x1")), Accesses(KERNEL.format("x1 + 64*y0", "x1 + 64*y0"))
    signature = {"in_ptr0": "*bf16", "out_ptr0": "*fp8e4nv", "out_ptr1": "*fp8e4nv"}
    wide, narrow = Config(64, 64), Config(1, 64)  # a program's tile: 64 rows fill sectors in both directions, one row does not
    assert along.scattered_bytes([128, 64], False, signature, [narrow]) == 0
    assert across.scattered_bytes([128, 64], False, signature, [wide]) == 0
    assert across.scattered_bytes([128, 64], False, signature, [narrow]) == 2 * 128 * 64 * 32
    assert across.scattered_bytes([128, 64], False, signature, [narrow, wide]) == 0  # autotuning finds it
    assert across.copies() == 2 and Accesses(KERNEL.format("x1 + 64*y0", "y0 + 128*x1")).copies() == 1


def test_neighbors_at_a_stride_share_sectors():
    # Every second element of a row, as RoPE reads interleaved pairs: half of each sector, and the other half through the same pointer.
    strided = Accesses(KERNEL.format("2*x1 + 128*y0", "1 + 2*x1 + 128*y0").replace("out_ptr1", "out_ptr0"))
    signature = {"in_ptr0": "*bf16", "out_ptr0": "*bf16"}
    assert strided.scattered_bytes([128, 64], False, signature, [Config(1, 64)]) == 128 * 64 * 4


def test_an_index_that_wraps_where_a_mask_hides_it_is_no_stride():
    found = Accesses(KERNEL.format("(-1 + x1) // 128 % 45 + 45*y0", "(x1 - 1) % 64 + 64*y0"))
    assert [found.strides(a.index)["xindex"] for a in found.all] == [1, 0, 1]


def test_an_index_that_is_loaded_has_no_strides():
    found = Accesses(KERNEL.format("tmp0 + x1", "x1"))
    assert [found.strides(a.index) is None for a in found.all] == [False, True, False]


def test_what_backward_holds():
    x, w = torch.randn(32, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    known = {t.untyped_storage()._cdata for t in (x, w)}
    y = F.linear(torch.sin(x), w).exp()  # sin keeps x; linear sin's result; exp its own
    assert saved_for_backward([y], set(known)) == 4 * (32 * 16 + 32 * 8)
    assert saved_for_backward([y, y.clone()], set(known)) == 4 * (32 * 16 + 32 * 8)


def test_stand_ins_share_what_was_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.register_buffer("mask", torch.ones(3))
            self.tables = {"cos": torch.ones(2, 3).t()}

    model, x = Tied(), torch.ones(2, 4, requires_grad=True)
    model.b.bias.requires_grad_(False)
    with FakeTensorMode():
        stand_ins = StandIns()
        stand_ins.module(model)
        y, z = stand_ins.tree([x, {"x": x}])
        assert y is z["x"] and y.requires_grad and y.is_leaf
        assert model.a.weight is model.b.weight and isinstance(model.a.weight, nn.Parameter)
        assert not model.b.bias.requires_grad and model.mask.device.type == "cuda"
        assert model.tables["cos"].stride() == (1, 3) and model.tables["cos"].device.type == "cuda"


FLEX = """
    QK_HEAD_DIM : tl.constexpr = 64
    V_HEAD_DIM : tl.constexpr = 32
    ZQ = 2
    HQ = 4
    Q_LEN = 1024
    ZKV = 2
    KV_LEN = 1024
    if not IS_FULL_BLOCKS:
        tmp1 = (m)
        tmp2 = (n)
{}
        mask_mod_output = tmp9
"""
CAUSAL = "        tmp9 = tmp2 <= tmp1"
WINDOW = """        tmp3 = tl.full([1], 255, tl.int32)
        tmp4 = tmp2 + tmp3
        tmp9 = (tmp1 <= tmp4) & (tmp2 <= tmp1)"""
PADDED = """        tmp3 = tl.load(in_ptr8 + (tmp2 + 1024*off_zq)).to(tl.int1)
        tmp9 = tmp3 & (tmp2 <= tmp1)"""

OF_LENGTHS = """        tmp3 = tl.load(in_ptr8 + (off_z))
        tmp4 = tmp2 + tl.full([1], 1, tl.int32)
        tmp9 = (tmp4.to(tl.int64) <= tmp3) & (tmp2 <= tmp1)"""
PREFIX = """        tmp3 = tl.load(in_ptr8 + (off_z))
        tmp9 = (tmp2 < tmp3) | (tmp2 <= tmp1)"""
PACKED = """        tmp3 = tl.load(in_ptr8 + (tmp1))
        tmp4 = tl.load(in_ptr8 + (tmp2))
        tmp9 = (tmp3 == tmp4) & (tmp2 <= tmp1)"""
KIND = """        tmp3 = tl.load(in_ptr8 + (tmp2))
        tmp4 = tl.full([1], 5, tl.int64)
        tmp9 = ~(tmp3 != tmp4) & (tmp2 <= tmp1)"""
NEAR = """        tmp3 = tl_math.abs(tmp2 - tmp1)
        tmp9 = tmp3 <= tl.full([1], 128, tl.int64)"""
CHUNK = """        tmp3 = tl.full([1], 256, tl.int64)
        tmp4 = tl.where(tmp3 < tl.full([1], 0, tl.int32), tmp1, tmp2)
        tmp9 = (tmp4 // tmp3 == tmp1 // tmp3) & (tmp2 <= tmp1)"""
ELSEWHERE = """        tmp9 = tmp0 <= tmp1"""


@pytest.mark.parametrize(
    ("mask", "blocks"),
    [(OF_LENGTHS, 36), (PREFIX, 64), (PACKED, 36), (KIND, 36), (NEAR, 22), (CHUNK, 12), (ELSEWHERE, 64)],
    ids=["lengths", "prefix", "packed", "kind", "near", "chunk", "elsewhere"],
)
def test_what_a_mask_reads_may_be_anything(mask, blocks, fakes):
    assert density(FLEX.format(mask), 1024, 1024) == blocks / 64


@pytest.mark.parametrize(
    ("mask", "blocks"),
    [(CAUSAL, 36), (WINDOW, 8 + 7 + 6), (PADDED, 36), ("        tmp9 = unknown(tmp1)", 64), ("        tmp9 = tmp1 < 130", 16)],
    ids=["causal", "window", "padded", "unknown", "rows"],
)
def test_blocks_of_a_generated_attention(fakes, mask, blocks):
    """Of 8 x 8."""
    source = FLEX.format(mask)
    assert density(source, 1024, 1024) == blocks / 64
    products = 2 * 2 * 4 * 1024 * 1024 * blocks // 64
    assert flops_of("triton_tem_fused_flex_attention_3", source) == products * (64 + 32)
    assert flops_of("triton_tem_fused_flex_attention_backward_3", source) == products * (3 * 64 + 2 * 32)


def test_other_kernels_are_no_attention():
    assert flops_of("triton_poi_fused_flex_attention_3", FLEX.format(CAUSAL)) is None
    assert flops_of("triton_tem_fused_mm_3", FLEX.format(CAUSAL)) is None
    assert flops_of("triton_tem_fused_flex_attention_3", FLEX.format(CAUSAL).replace("Q_LEN = 1024", "Q_LEN = ks0")) is None
