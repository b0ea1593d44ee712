"""The graphs that Inductor gets for a GPU: after AOTAutograd's partition, made and run on a CPU."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from te_dynamo.backend import te_fp8
from te_dynamo.ir import op_named
from te_dynamo.lowering import registry
from te_dynamo.lowering.fp8 import E4M3, E5M2
from te_dynamo.lowering.graph_passes import OneMeasurement
from te_dynamo.lowering.registry import Case
from te_dynamo.recipe import DelayedScaling
from te_dynamo.state import FORWARD, STATE
from tests.numerics import sqnr
from tests.partitioned import calls, casts, interpreted, saved_for_backward

aten, ours = torch.ops.aten, torch.ops.te_dynamo
TOKENS, HIDDEN, INNER, BLOCKS = 32, 64, 128, 2
GROUPS = 2 * BLOCKS  # gate and up share their input


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@pytest.fixture
def graphs():
    with interpreted() as given:
        yield given


@pytest.fixture(scope="module")
def steady():
    """Forward and backward graphs of the model below, with delayed scaling: read-only."""
    with interpreted() as given:
        train(*model_and_input(), memory="speed")
    return tuple(given)


def train(model, x, **options):
    """Two steps: the first computes its own scales and is not compiled, the second is the steady graph's."""
    compiled = torch.compile(model, backend=te_fp8, fullgraph=True, options=options)
    for _ in range(2):
        compiled(x).sum().backward()


def model_and_input(tokens=TOKENS):
    return nn.Sequential(*[Block() for _ in range(BLOCKS)]).bfloat16(), torch.randn(1, tokens, HIDDEN).bfloat16().requires_grad_()


def reaches(start: Node, goals: set[Node]) -> bool:
    seen, queue = set(), [start]
    while queue:
        node = queue.pop()
        if node in goals:
            return True
        if node not in seen:
            seen.add(node)
            queue += node.users
    return False


def test_the_steady_graph_has_no_cast_that_waits_for_an_amax(steady):
    for gm in steady:
        goals = {*casts(gm, E4M3, E5M2), *calls(gm, ours.cast_transpose.default)}
        assert goals
        assert not any(reaches(amax, goals) for amax in [*calls(gm, aten.amax.default), *calls(gm, ours.largest.default)])


def test_under_current_scaling_every_cast_waits_for_its_amax(graphs):
    """The control of the test above."""
    model, x = model_and_input()
    train(model, x, recipe="current", memory="speed")
    for gm in graphs[:2]:
        goals = {*casts(gm, E4M3, E5M2), *calls(gm, ours.cast_transpose.default)}
        assert goals and all(any(reaches(amax, {goal}) for amax in calls(gm, aten.amax.default)) for goal in goals)


def test_scales_are_taken_apart_once_and_never_selected(steady):
    """A kernel that reads a scale at an offset would be a different kernel for every layer."""
    for gm, count in zip(steady, (1, 2), strict=True):
        unpacks = calls(gm, ours.unpack.default)
        assert len(unpacks) == count  # backward: the weights' and the gradients'
        for unpack in unpacks:
            readers = [u for u in unpack.args[0].users if u.op != "output"]
            assert readers == [unpack]
        assert not calls(gm, aten.reciprocal.default)


def test_amaxes_are_measured_once_a_graph(steady):
    forward, backward = steady
    (one,), (other,) = calls(forward, ours.largest.default), calls(backward, ours.largest.default)
    assert len(one.args[1]) == 2 * 3 * BLOCKS and len(other.args[1]) == 3 * BLOCKS
    assert len(one.args[0]) <= GROUPS + 3 * BLOCKS  # an input's amax once, although three slots may hold it


def test_inputs_and_transposed_weights_are_kept_in_fp8_once(steady):
    saved = saved_for_backward(steady[0], results=2)
    kept = [tuple(t.shape) for t in saved if t.dtype == E4M3]
    inputs = [(TOKENS, HIDDEN), (TOKENS, INNER)] * BLOCKS
    weights = [tuple(n.meta["val"][1].shape) for n in calls(steady[0], ours.cast_transpose.default)]
    assert sorted(map(sorted, kept)) == sorted(map(sorted, inputs + weights)) and len(weights) == GROUPS  # some as transposed views
    # in high precision: what the activation and the residual need, but not the linears' inputs
    rest = [t for t in saved if t.dtype == torch.bfloat16 and t.numel() >= TOKENS * HIDDEN]
    assert sum(t.numel() for t in rest) <= BLOCKS * TOKENS * (2 * INNER + HIDDEN)


def test_backward_writes_each_transposed_copy_once(steady):
    forward, backward = steady
    assert not calls(forward, ours.transpose.default)
    gemms = len(calls(forward, aten.mm.default))  # the CPU's substitute for torch's FP8 GEMM
    # the operand of `down` is transposed in forward and the gradient of gate and up in backward, each by the kernel that computes it; the
    # gradient of the last `down`, which is backward's input, by the kernel that casts it
    assert len(calls(backward, ours.cast_both.default)) == 1
    assert gemms and len(calls(backward, ours.transpose.default)) == GROUPS + gemms - 2 * BLOCKS - 1
    # a weight is read once in a step, by the kernel that also writes its transposed copy
    assert len(calls(forward, ours.cast_transpose.default)) == gemms
    assert not casts(backward, E4M3) and not calls(backward, ours.cast_transpose.default)
    assert len(casts(backward, E5M2)) == gemms - BLOCKS - 1


def test_numerics_and_the_first_step(graphs):
    model, x = model_and_input(tokens=24)  # not a multiple of 16
    compiled = torch.compile(model, backend=te_fp8, fullgraph=True)
    for _ in range(3):  # the first with its own scales, then delayed
        y = compiled(x)
        (y - x).square().sum().backward()
        found = x.grad, model[0].down.weight.grad, model[1].gate.weight.grad, model[0].down.bias.grad
        x.grad = None
        model.zero_grad()
        exact = model(x)
        (exact - x).square().sum().backward()
        assert sqnr((exact - x).detach(), (y - x).detach()) > 17
        for value, parameter in zip(found, (x, model[0].down.weight, model[1].gate.weight, model[0].down.bias), strict=True):
            assert sqnr(parameter.grad, value) > 12
        x.grad = None
        model.zero_grad()


def test_what_each_setting_of_memory_keeps(graphs):
    """FP8 inputs and copies of weights that backward recomputes are bitwise equal to kept ones."""
    saved, gradients = {}, {}
    for memory in ("speed", "balanced", "saving"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        graphs.clear()
        model, x = model_and_input()
        train(model, x, memory=memory)
        saved[memory] = [t for t in saved_for_backward(graphs[0], results=2) if t.numel() > HIDDEN]
        gradients[memory] = {name: p.grad for name, p in model.named_parameters()}

    def kept(memory, *shapes, dtype=E4M3):
        return sum(t.numel() for t in saved[memory] if t.dtype == dtype and sorted(t.shape) in map(sorted, shapes))

    inputs, results = ((TOKENS, HIDDEN), (TOKENS, INNER)), ((2, TOKENS, INNER),)  # gate and up
    copies = (
        2 * INNER * HIDDEN,
        INNER * HIDDEN,
    )  # gate and up together have more than twice as many rows as there are tokens, down has not
    assert kept("speed", *inputs) == kept("balanced", *inputs) == BLOCKS * TOKENS * (HIDDEN + INNER)
    assert kept("speed", *results) == 0 and kept("balanced", *results) == kept("saving", *results) == BLOCKS * 2 * TOKENS * INNER
    weights = ((2 * INNER, HIDDEN), (INNER, HIDDEN))
    assert [kept(memory, *weights) for memory in saved] == [BLOCKS * sum(copies), BLOCKS * copies[1], 0]
    assert kept("saving", *inputs) == 0
    assert not any(t.dtype == torch.bfloat16 and t.shape[-1] in (INNER, 2 * INNER) for m in ("balanced", "saving") for t in saved[m])
    for name, gradient in gradients["speed"].items():
        same = torch.equal(gradient, gradients["balanced"][name])
        assert same == name.startswith("1.down."), name  # its gradients did not pass an activation
        assert sqnr(gradient, gradients["saving"][name]) > 20


# Operators in which the host waits for the GPU, which a CUDA graph cannot capture: reads of numbers, and sizes that depend on values.
WAITS = {
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
}


@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
def test_nothing_waits_for_the_gpu(graphs, recipe, trains):
    """Neither do opaque operators: their computation is run on fake tensors, which have no values."""
    model, x = model_and_input()
    with torch.set_grad_enabled(trains):
        compiled = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": recipe})
        for _ in range(2):
            y = compiled(x)
            if trains:
                y.sum().backward()
    nodes = [n for gm in graphs for n in gm.graph.nodes]
    assert len(graphs) >= 1 + trains and any("mm" in str(n.target) or "site_fwd" in str(n.target) for n in nodes)
    assert not [n for n in nodes if waits(n)]


def waits(node: Node) -> bool:
    name = getattr(node.target, "__name__", "").split(".")[0]
    return name in WAITS or name == "device_put" or node.kwargs.get("device") not in (None, torch.device("cpu"))


@pytest.mark.parametrize("wait", [lambda x: x[x.nonzero()], lambda x: x.masked_select(x > 0), lambda x: x.to("meta")])
def test_a_wait_is_seen(wait):
    assert any(map(waits, make_fx(wait, tracing_mode="real")(torch.randn(4)).graph.nodes))


def test_token_counts_of_any_size_share_one_graph(graphs):
    model, _ = model_and_input()
    compiled = torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=True)
    for tokens in (24, 33, 48, 17):
        x = torch.randn(1, tokens, HIDDEN).bfloat16().requires_grad_()
        compiled(x).sum().backward()
        assert x.grad.shape == x.shape
    assert len(graphs) == 2
    assert not any(calls(gm, aten.select.int) for gm in graphs)


@pytest.mark.parametrize("by_option", [False, True])
def test_a_joint_pass_of_the_user_still_runs(graphs, by_option):
    seen: list[Graph] = []

    class Mine(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            seen.append(graph)

        def uuid(self):
            return "mine"

    model, x = model_and_input()
    options = {"inductor": {"joint_custom_pre_pass": Mine()}} if by_option else {}
    with torch._inductor.config.patch(joint_custom_pre_pass=None if by_option else Mine()):
        train(model, x, **options)
    assert seen and len(calls(graphs[0], ours.largest.default)) == 1


def test_one_measurement():
    def separate(a, b, c):
        first, second = ours.largest([a, b], [0, 1, 0]), ours.largest([b, c], [1, 0])
        return torch.cat([first, second.detach(), c, ours.largest([c], [0])])

    inputs = torch.rand(3), torch.rand(4), torch.rand(5)
    gm = make_fx(separate, tracing_mode="fake")(*inputs)
    OneMeasurement("test")(gm.graph)
    gm.recompile()
    assert torch.equal(gm(*inputs), separate(*inputs))
    gm.graph.eliminate_dead_code()
    assert [len(n.args[1]) for n in calls(gm, ours.largest.default)] == [5, 1]
    assert [tuple(n.meta["val"].shape) for n in calls(gm, ours.largest.default)] == [(5,), (1,)]


def test_one_measurement_leaves_other_concatenations_alone():
    gm = make_fx(lambda a, b: torch.cat([a, b, ours.largest([a], [0])]))(torch.rand(3), torch.rand(4))
    before = str(gm.graph)
    OneMeasurement("test")(gm.graph)
    assert str(gm.graph) == before


@pytest.mark.parametrize(
    ("k", "n", "dtype", "reason"),
    [
        (64, 32, torch.bfloat16, None),
        (40, 32, torch.bfloat16, "in_features 40 is not a multiple of 16"),
        (64, 24, torch.bfloat16, "out_features 24 is not a multiple of 16"),
        (64, 32, torch.float64, "dtype float64 has no FP8 path"),
    ],
)
def test_what_a_gpu_supports(k, n, dtype, reason):
    linears, recipe, device = op_named("linears"), DelayedScaling(), torch.device("cuda")
    case = Case(linears, {"weights": [torch.empty(n, k)]}, {"out_dtype": dtype}, recipe, device, trains=True)
    answer = registry.find(linears, "native", recipe, device).unsupported(case)
    assert answer is None if reason is None else answer.startswith(reason)


def test_a_cpu_is_not_a_gpu():
    """A CPU gets opaque operators instead of the code that is generated for a GPU."""
    found = [registry.find(op_named("linears"), "native", DelayedScaling(), torch.device(d)) for d in ("cpu", "cuda")]
    assert [implementation.opaque for implementation in found] == [True, False]


@pytest.mark.parametrize("op", ["attention", "fp8_forward_attention"])
def test_fp8_attention_on_a_gpu_is_te_s_or_none(op):
    """Its definition computes the scores in blocks, many times slower than the high-precision kernel."""
    on_a_cpu, on_a_gpu = (registry.why_not(op_named(op), DelayedScaling(), "native", torch.device(d)) for d in ("cpu", "cuda"))
    assert on_a_cpu is None and on_a_gpu == "on a GPU only Transformer Engine has kernels for FP8 attention"


def test_the_transposing_kernel(interpreter):
    interpreter("""
import torch
from te_dynamo.lowering.kernels.transpose import launch
for rows, columns in ((128, 128), (100, 37), (16, 400), (1, 5), (0, 3)):
    x = torch.randint(0, 255, (rows, columns), dtype=torch.uint8).view(torch.float8_e5m2)
    assert torch.equal(launch(x).view(torch.uint8), x.view(torch.uint8).t())
""")


class Pooled(nn.Module):
    """Like a sentence encoder: the pooler's output is returned, but the loss does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.pooler = Block(), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        h = self.block(x)
        return h, torch.tanh(self.pooler(h))


@pytest.fixture
def own_state():
    with STATE.set_aside():
        yield


def test_a_layer_that_the_loss_does_not_reach_calibrates_alone(graphs, own_state):
    """Its gradient's scale is never set: it is computed from the gradient, if one comes, and the other layers do not wait for an amax."""
    torch.manual_seed(0)
    model, x = Pooled().bfloat16(), torch.randn(1, TOKENS, HIDDEN).bfloat16().requires_grad_()
    compiled, forms = torch.compile(model, backend=te_fp8, fullgraph=True), []
    for _ in range(7):
        before = len(graphs)
        compiled(x)[0].sum().backward()
        forms.append(graphs[before:])
    assert [len(form) for form in forms[1:]] == [0, 0, 2, 0, 0, 0]  # after three calls there is one more variant, which stays in use
    # The activation's kernel needs its scale in advance; while sites calibrate, there is none.
    assert [len(calls(gm, ours.activation.default)) for gm in (graphs[0], forms[3][0])] == [1, 1]
    # The pooler can still be trained, correctly from the first gradient on.
    exact = Pooled().double()
    exact.load_state_dict(model.state_dict())
    exact_x = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(exact(exact_x)[1].square().sum(), [exact.pooler.weight, exact_x])
    found = torch.autograd.grad(compiled(x)[1].square().sum(), [model.pooler.weight, x])
    assert all(sqnr(e, f) > 17 for e, f in zip(expected, found, strict=True))
    # A lost scale is noticed at once.
    arena = STATE.arenas[torch.device("cpu")]
    arena.clear(FORWARD, range(1, arena.used[FORWARD]))
    expected = exact(exact_x)[0]
    assert sqnr(expected, compiled(x)[0]) > 20
    # Then all are set, which is checked from time to time.
    for _ in range(40):
        before = len(graphs)
        sum(y.square().sum() for y in compiled(x)).backward()
    assert len(graphs) == 2 + 2 + 2  # one variant for the lost ones, and no more
