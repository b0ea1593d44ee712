"""nn.Linear under te_fp8 against NVIDIA's te.Linear under te.autocast: same weights, data and recipe, many steps.

TE runs on a CPU, with a stand-in for its C++ layer (see `tests.te_on_cpu`). Scales and amax histories are bitwise equal at
every step; outputs and gradients are equal up to one rounding to the output's dtype, since both round a float32 sum once.
Where the two differ on purpose, a test says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_dynamo
from te_dynamo.backend import te_fp8
from te_dynamo.state import FORWARD, GRADIENT, STATE, Arena
from tests import te_on_cpu
from tests.slots import CPU, history_of, index_of
from tests.te_on_cpu.extension import check_signature

HISTORY = 12
STEPS = {"delayed": 100, "current": 64}
TOKENS, K, N = 32, 64, 48  # multiples of 16, which TE needs
pytestmark = pytest.mark.usefixtures("no_codegen")


@pytest.fixture(scope="module")
def te() -> Any:
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    return te_on_cpu.install()


@pytest.fixture(autouse=True)
def arena() -> Iterator[Arena]:
    """A separate scale state."""
    torch._dynamo.reset()
    with STATE.set_aside():
        yield STATE.arena(CPU)
    torch._dynamo.reset()


# --- the two sides


class Chain(nn.Module):
    """Two linears, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Siblings(nn.Module):
    """Three linears of one input: one quantization here, three of equal amaxes in TE."""

    def __init__(self, *linears: nn.Module) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)


class Pair:
    """The same model twice: with nn.Linear, compiled by te_fp8, and with te.Linear."""

    def __init__(self, te: Any, recipe: str, provider: str, dtype: torch.dtype, bias: bool = True, kind: str = "linear") -> None:
        from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

        self.te, self.dtype = te, dtype
        # The history is short enough to wrap around.
        self.recipe = DelayedScaling(amax_history_len=HISTORY) if recipe == "delayed" else Float8CurrentScaling()
        torch.manual_seed(0)

        def build(linear: Any) -> nn.Module:
            if kind == "linear":
                return linear(K, N)
            return Chain(linear(K, 2 * N), linear(2 * N, N)) if kind == "chain" else Siblings(linear(K, N), linear(K, N), linear(K, 16))

        self.ours = build(lambda k, n: nn.Linear(k, n, bias=bias, dtype=dtype))
        with te_on_cpu.cuda_is_cpu():
            self.theirs = build(lambda k, n: te.Linear(k, n, bias=bias, params_dtype=dtype, device="cpu"))
        with torch.no_grad():
            for mine, other in self.parameters():
                if mine.dim() == 1:  # TE passes the bias to an FP8 GEMM in bf16
                    mine.copy_(mine.bfloat16())
                other.copy_(mine)
        options = {"like_te": True, "recipe": self.recipe, "provider": provider}
        self.compiled = torch.compile(self.ours, backend=te_fp8, fullgraph=True, options=options)

    def parameters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        theirs = dict(self.theirs.named_parameters())
        return [(p, theirs[name]) for name, p in self.ours.named_parameters()]

    def their_forward(self, x: Tensor) -> Tensor:
        with te_on_cpu.cuda_is_cpu(), self.te.autocast(enabled=True, recipe=self.recipe):
            return self.theirs(x)

    def step(self, x: Tensor, dy: Tensor, accumulate: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """Runs forward and backward of both: (ours, TE's) for the output and each gradient, by name."""
        if not accumulate:
            self.ours.zero_grad()
            self.theirs.zero_grad()
        mine, other = (x.clone().requires_grad_() for _ in range(2))
        y = self.compiled(mine)
        y.backward(dy)
        z = self.their_forward(other)
        with te_on_cpu.cuda_is_cpu():
            z.backward(dy)
        names = [name for name, _ in self.ours.named_parameters()]
        results = {name: (p.grad, q.grad) for name, (p, q) in zip(names, self.parameters(), strict=True)}
        return results | {"y": (y.detach(), z.detach()), "dx": (mine.grad, other.grad)}

    def move_weights(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for mine, other in self.parameters():
                if mine.dim() == 2:
                    change = torch.randn(mine.shape, generator=generator).to(self.dtype) * 0.01
                    mine.add_(change)
                    other.add_(change)


@dataclass(frozen=True)
class Slot:
    """One tensor's scale and its amax history; the first entry is being written."""

    scale: Tensor
    history: Tensor


def our_slots(arena: Arena, weight: Tensor) -> list[Slot]:
    """The slots of the input, the weight and the output's gradient."""
    roles = ((FORWARD, "input"), (FORWARD, "weight"), (GRADIENT, "grad_output"))
    where = [(direction, index_of(weight, role)) for direction, role in roles]
    return [Slot(arena.scale[at], history_of(arena, *at)) for at in where]


def their_slots(linear: Any) -> list[Slot]:
    forward, backward = linear.fp8_meta["scaling_fwd"], linear.fp8_meta["scaling_bwd"]
    return [Slot(state.scale[i], state.amax_history[:, i]) for state, i in ((forward, 0), (forward, 1), (backward, 0))]


def linears(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]


def assert_same_state(arena: Arena, pair: Pair, step: Any) -> None:
    STATE.roll()  # TE's roll at the end of a forward and of a backward, ours at the next forward
    for mine, other in zip(linears(pair.ours), linears(pair.theirs), strict=True):
        for role, a, b in zip(("input", "weight", "grad_output"), our_slots(arena, mine.weight), their_slots(other), strict=True):
            assert torch.equal(a.scale, b.scale), f"step {step}: scale of {role}: {a.scale} and {b.scale}"
            assert torch.equal(a.history, b.history), f"step {step}: history of {role}: {a.history} and {b.history}"


def assert_one_rounding(results: dict[str, tuple[Tensor, Tensor]], step: Any, flips: float = 0.0) -> None:
    """Equal up to one rounding to the dtype, and the order of float32 sums; matrix units flush subnormal numbers to zero.

    flips: the fraction of elements that may differ by more: if a quantized value crosses a rounding boundary, so does everything that it
    is multiplied into.
    """
    for name, (mine, other) in results.items():
        assert mine.dtype == other.dtype
        finite = other[other.isfinite()].abs()
        largest, float32 = finite.max().item() if finite.numel() else 0.0, torch.finfo(torch.float32)
        sums = max(16 * TOKENS * float32.eps * largest, float32.tiny)  # terms may be larger than what they add up to
        near = torch.isclose(mine, other, rtol=torch.finfo(mine.dtype).eps, atol=sums, equal_nan=True)
        far = (~near).float().mean().item()
        assert far <= flips, f"step {step}, {name}: {far:.2%} differ, the first {mine[~near][:3].tolist()} and {other[~near][:3].tolist()}"
        if mine.dtype == torch.bfloat16:  # a sum in another order sometimes crosses a rounding boundary
            different = ((mine != other) & ~(mine.isnan() & other.isnan())).float().mean().item()
            assert different <= 0.01 + flips + 1 / mine.numel(), f"step {step}, {name}: {different:.2%} differ"


def batch(step: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, torch.Generator]:
    """x [TOKENS, K] and dy [TOKENS, n] over six orders of magnitude; by turns all zero, with NaN, infinite, huge and tiny."""
    generator = torch.Generator().manual_seed(step)

    def random(width: int) -> Tensor:
        return torch.randn(TOKENS, width, generator=generator) * 10 ** torch.empty(1).uniform_(-3, 3, generator=generator)

    x, dy = random(K), random(n)
    if step % 11 == 3:
        x.zero_()
    if step % 13 == 4:
        dy.zero_()
    if step % 17 == 5:
        x[0, 0] = torch.nan
    if step % 17 == 6:
        dy[3, 0] = torch.nan
    if step == 20:
        x[1, 1] = torch.inf
    if step == 40:
        dy[1, 1] = -torch.inf
    if step in (55, 56):
        x, dy = x * 1e-42, dy * 1e-42
    if step == 58:
        x = x * 1e30
    return x.to(dtype), dy.to(dtype), generator


# --- numbers and state, step by step


# Inductor compiles each value of each parameter once; the other cases run without generated code.
GENERATED = {("native", "delayed", torch.bfloat16, True), ("native", "current", torch.float32, False)}
PROVIDERS, DTYPES = ("native", "reference", "te"), (torch.bfloat16, torch.float32)


def marks_of(provider: str, recipe: str, dtype: torch.dtype, bias: bool) -> Any:
    if (provider, recipe, dtype, bias) in GENERATED:
        return pytest.mark.inductor
    # A bias that is added in bf16 is rounded; without one, less can go wrong.
    return () if provider == "te" or bias == (dtype == torch.bfloat16) else pytest.mark.slow


@pytest.mark.parametrize(
    ("provider", "recipe", "dtype", "bias"),
    [
        pytest.param(*how, marks=marks_of(*how), id="-".join(map(str, how)))
        for how in itertools.product(PROVIDERS, ("delayed", "current"), DTYPES, (True, False))
    ],
)
def test_a_linear_is_te_s(te, arena, provider, recipe, dtype, bias):
    pair = Pair(te, recipe, provider, dtype, bias)
    for step in range(STEPS[recipe]):
        x, dy, generator = batch(step, N, dtype)
        assert_one_rounding(pair.step(x, dy), step)
        if recipe == "delayed":
            assert_same_state(arena, pair, step)
        pair.move_weights(generator)


@pytest.mark.inductor
@pytest.mark.parametrize(("kind", "n"), [("chain", N), ("siblings", 2 * N + 16)])
def test_linears_in_one_graph_are_te_s(te, arena, kind, n):
    pair = Pair(te, "delayed", "native", torch.bfloat16, kind=kind)
    for step in range(64):
        x, dy, generator = batch(step, n, torch.bfloat16)
        results = pair.step(x, dy)
        if kind == "siblings":  # the sum of three gradients is one rounding here, three in TE
            del results["dx"]
        assert_one_rounding(results, step, flips=0.02 if kind == "chain" else 0.0)
        assert_same_state(arena, pair, step)
        pair.move_weights(generator)


def test_microbatches_and_forwards_without_backward(te, arena):
    """Every forward with grad updates the forward scales, every backward those of gradients."""
    pair = Pair(te, "delayed", "native", torch.bfloat16)
    for step in range(20):
        x, dy, generator = batch(step, N, torch.bfloat16)
        pair.step(x[:16], dy[:16])
        if step % 3 == 0:
            pair.compiled(2 * x)
            pair.their_forward(2 * x)
        assert_one_rounding(pair.step(x[16:], dy[16:], accumulate=True), step, flips=0.001)  # a sum of two rounded gradients
        assert_same_state(arena, pair, step)
        pair.move_weights(generator)


def test_two_calls_before_one_backward(te, arena):
    """Each backward uses the scales of its own forward; TE's would use the current ones when it runs. The state is the same as TE's."""
    pair = Pair(te, "delayed", "native", torch.bfloat16)
    for step in range(3):
        pair.step(*batch(step, N, torch.bfloat16)[:2])
    calls = []
    for step in (7, 8):
        x, dy, _ = batch(step, N, torch.bfloat16)
        mine, other = (x.clone().requires_grad_() for _ in range(2))
        calls.append((mine, pair.compiled(mine), other, pair.their_forward(other), dy))
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    scale_of_the_forward = our_slots(arena, pair.ours.weight)[2].scale.clone()
    for mine, y, other, z, dy in reversed(calls):
        y.backward(dy)
        with te_on_cpu.cuda_is_cpu():
            pair.theirs.fp8_meta["scaling_bwd"].scale.copy_(scale_of_the_forward)
            z.backward(dy)
        assert_one_rounding({"y": (y.detach(), z.detach()), "dx": (mine.grad, other.grad)}, "two calls")
    assert_same_state(arena, pair, "two calls")


# --- where we are not TE


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_eval_step_gives_te_s_output_and_moves_nothing(te, arena, grad):
    """TE records in eval as well: without grad its amax waits for the next training step, with grad it even rolls."""
    pair = Pair(te, "delayed", "native", torch.bfloat16)
    for step in range(6):
        pair.step(*batch(step, N, torch.bfloat16)[:2])
    STATE.roll()
    before = [(slot.scale.clone(), slot.history.clone()) for slot in our_slots(arena, pair.ours.weight)]
    pair.ours.eval()
    pair.theirs.eval()
    with torch.set_grad_enabled(grad):
        x = 1e4 * batch(0, N, torch.bfloat16)[0]
        assert_one_rounding({"y": (pair.compiled(x).detach(), pair.their_forward(x).detach())}, "eval")
    STATE.roll()
    for slot, (scale, history) in zip(our_slots(arena, pair.ours.weight), before, strict=True):
        assert torch.equal(slot.scale, scale) and torch.equal(slot.history, history)
    assert not torch.equal(their_slots(pair.theirs)[0].history, before[0][1])


def test_without_like_te_the_first_step_is_not_spoilt(te):
    """TE's first scale is 1: small gradients vanish. Ours comes from the batch."""
    pair = Pair(te, "delayed", "native", torch.bfloat16)
    x, dy, _ = batch(1, N, torch.bfloat16)
    tiny = 1e-6 * dy / dy.abs().max()
    assert pair.step(x, tiny)["dx"][1].count_nonzero() == 0
    ours = torch.compile(nn.Linear(K, N, dtype=torch.bfloat16), backend=te_fp8, options={"recipe": "delayed"})
    leaf = x.clone().requires_grad_()
    ours(leaf).backward(tiny)
    exact = tiny.float() @ ours.weight.float()
    assert (leaf.grad.float() - exact).norm() < 0.1 * exact.norm()


def test_without_like_te_an_infinite_amax_freezes_nothing(te, arena):
    pair = Pair(te, "delayed", "native", torch.bfloat16)
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    ours = torch.compile(linear, backend=te_fp8, options={"recipe": "delayed"})
    x, dy, _ = batch(1, N, torch.bfloat16)
    for factor in (1.0, torch.inf, 8.0):
        scaled = x.clone()
        scaled[0, 0] *= factor
        scaled = scaled * 8 if factor == 8.0 else scaled
        pair.step(scaled, dy)
        ours(scaled).backward(dy)
    STATE.roll()
    ours_now, te_now = our_slots(arena, linear.weight)[0], their_slots(pair.theirs)[0]
    assert te_now.history.isinf().any() and ours_now.history.isfinite().all()
    # A margin of 2, and as the last step saturated, up to 16 times the growth that it showed.
    assert 448 / 4 / 16 <= ours_now.scale * ours_now.history.max() <= 448 / 4 and te_now.scale > ours_now.scale


# --- the instrument refuses what a Hopper refuses


def fp8_operand(shape: tuple[int, int], dtype: int, transposed: bool = True) -> Any:
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    data = torch.zeros(shape, dtype=torch.uint8)
    transpose = data.t().contiguous() if transposed else None
    return Float8TensorStorage(data=data, data_transpose=transpose, fp8_scale_inv=torch.ones(1), fp8_dtype=dtype)


def gemm(te: Any, a: Any, b: Any, layout: str = "TN", **changes: Any) -> Any:
    import transformer_engine_torch as tex

    arguments = {"bias": None, "grad": False, **changes}
    return tex.generic_gemm(
        a, layout[0] == "T", b, layout[1] == "T", None, None, tex.DType.kFloat32, arguments["bias"], tex.DType.kBFloat16,
        False, None, arguments["grad"], torch.empty(1), 1, False, True,
    )  # fmt: skip


def test_the_stand_in_refuses_what_the_hardware_refuses(te):
    e4m3, e5m2 = 7, 8
    weight, x = fp8_operand((48, 64), e4m3), fp8_operand((32, 64), e4m3)
    assert gemm(te, weight, x)[0].shape == (32, 48)
    with pytest.raises(RuntimeError, match="TN only"):
        gemm(te, fp8_operand((48, 64), e4m3, transposed=False), fp8_operand((32, 48), e5m2), "NN")
    with pytest.raises(RuntimeError, match="multiple of 16"):
        gemm(te, fp8_operand((48, 24), e4m3), fp8_operand((32, 24), e4m3))
    with pytest.raises(RuntimeError, match="multiple of 16"):  # wgrad sums over the tokens
        gemm(te, fp8_operand((24, 64), e4m3), fp8_operand((24, 48), e5m2), "NT")
    with pytest.raises(RuntimeError, match="E5M2 x E5M2"):
        gemm(te, fp8_operand((48, 64), e5m2), fp8_operand((32, 64), e5m2))
    with pytest.raises(RuntimeError, match="float32 bias"):
        gemm(te, weight, x, bias=torch.zeros(48))
    with pytest.raises(RuntimeError, match="the other is not"):
        gemm(te, weight, torch.zeros(32, 64))


def test_te_itself_refuses_what_it_cannot_align(te):
    with te_on_cpu.cuda_is_cpu(), te.autocast(enabled=True), pytest.raises(ValueError, match="divisible"):
        te.Linear(24, 48, params_dtype=torch.bfloat16, device="cpu")(torch.zeros(32, 24, dtype=torch.bfloat16))


def test_what_has_no_stand_in_says_its_name(te):
    import transformer_engine_torch as tex

    with pytest.raises(NotImplementedError, match="tex.multi_tensor_adam"):
        tex.multi_tensor_adam(None)


def test_a_stand_in_with_another_signature_is_refused():
    def quantize(tensor: Any, quantizer: Any, output: Any = None) -> Any: ...

    built = "quantize(tensor: torch.Tensor, quantizer: object, output: object = None, noop: torch.Tensor | None = None) -> object"
    with pytest.raises(TypeError, match="the stand-in quantize"):
        check_signature(quantize, built)


def test_the_history_of_a_process_has_te_s_length(te):
    from transformer_engine.common.recipe import DelayedScaling

    assert te_dynamo.recipe.DelayedScaling().amax_history_len == DelayedScaling().amax_history_len
