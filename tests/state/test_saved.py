"""scale_state(model): names, saving, loading, and that it leaves nothing in the model."""

from __future__ import annotations

import copy
import io
import pickle
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import te_dynamo
from te_dynamo.backend import te_fp8
from te_dynamo.recipe import DelayedScaling
from te_dynamo.state import STATE
from tests import te_on_cpu

SIZE = 16
HISTORY = 4
pytestmark = pytest.mark.usefixtures("no_codegen")
RECIPE = DelayedScaling(amax_history_len=HISTORY)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, SIZE // 2)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield
    torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=te_fp8, options={"recipe": RECIPE, **options})


def train(call: Any, steps: int = 3, shape: tuple[int, ...] = (8, SIZE), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for _ in range(steps):
        y = call(torch.randn(shape, generator=generator))
        y.square().sum().backward()
        outputs.append(y.detach())
    return outputs


def scales(model: Any) -> dict[str, Tensor]:
    return te_dynamo.scale_state(model).state_dict()


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


ENDINGS = ("scale", "amax_history")


def keys(*slots: str) -> set[str]:
    return {f"{slot}.{ending}" for slot in slots for ending in ENDINGS}


def linear_keys(*paths: str) -> set[str]:
    return keys(*(".".join(p for p in (path, role) if p) for path in paths for role in ("input", "weight", "grad_output")))


# --- names


def test_names_are_the_modules_paths():
    model = Net()
    train(compiled(model))
    names = linear_keys("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
    assert set(scales(model)) == names
    assert te_dynamo.scale_state(model).sites() == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert set(scales(model.blocks[1])) == linear_keys("up", "down")


def test_a_root_that_is_a_linear_has_no_path():
    model = nn.Linear(SIZE, SIZE)
    train(compiled(model))
    assert set(scales(model)) == linear_keys("")
    assert "input.scale" in scales(model)


def test_a_parameter_of_another_name_is_part_of_the_path():
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.weight = (nn.Parameter(torch.randn(SIZE, SIZE)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x @ self.w1, self.weight)

    model = nn.ModuleDict({"inner": Raw()})
    train(compiled(model["inner"]))
    assert set(scales(model)) == linear_keys("inner.w1", "inner")


def test_a_weight_that_is_visited_again_in_a_call_has_a_number():
    model = nn.ModuleDict({"linear": nn.Linear(SIZE, SIZE)})

    def twice(x: Tensor) -> Tensor:
        return model["linear"](torch.tanh(model["linear"](x)))

    train(compiled(twice))
    assert set(scales(model)) == linear_keys("linear", "linear.1")
    assert te_dynamo.scale_state(model).sites() == ["linear", "linear.1"]


def test_a_tied_weight_is_named_once():
    model = nn.ModuleDict({"a": nn.Linear(SIZE, SIZE), "b": nn.Linear(SIZE, SIZE)})
    model["b"].weight = model["a"].weight

    train(compiled(lambda x: model["b"](torch.tanh(model["a"](x)))))
    assert set(scales(model)) == linear_keys("a", "a.1")


@pytest.mark.parametrize("per_layer", [False, True])
def test_attention_is_named_after_its_module(per_layer):
    model = nn.Sequential(Attention(), Attention())
    roles = ("q", "k", "v", "s", "o", "do", "dp", "dqkv")
    if per_layer:
        for layer in model:
            layer.compile(backend=te_fp8, options={"recipe": DelayedScaling(amax_history_len=HISTORY, fp8_dpa=True)})
        call: Any = model
    else:
        call = compiled(model, attention="fp8_both")
    train(call, shape=(2, 8, SIZE))
    found = scales(model)
    assert {k for k in found if ".attention." in k} == keys(*(f"{i}.attention.{role}" for i in range(2) for role in roles))
    assert "0.attention" in te_dynamo.scale_state(model).sites()
    assert all(found[f"0.attention.{role}.scale"] > 0 for role in ("q", "k", "v", "s", "do", "dp"))


def test_nn_multihead_attention():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(SIZE, 2, batch_first=True)})
    train(compiled(lambda x: model["attn"](x, x, x, need_weights=False)[0]), shape=(2, 8, SIZE))
    assert set(scales(model)) == linear_keys("attn.in_proj_weight", "attn.out_proj")


def test_wrappers_are_not_part_of_a_path():
    model = Net()
    train(compiled(model))
    expected = scales(model)
    assert_equal(scales(torch.compile(model)), expected)
    wrapped = Net()
    wrapped.blocks[0] = checkpoint_wrapper(wrapped.blocks[0])
    train(compiled(wrapped))
    assert scales(wrapped).keys() == expected.keys()

    class Holder(nn.Module):  # an attribute with the name of a wrapper's attribute is kept
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(SIZE, SIZE)

    holder = Holder()
    train(compiled(holder.module))
    assert set(scales(holder)) == linear_keys("module")


def test_a_function_over_modules_and_raw_parameters():
    module, raw = nn.Linear(SIZE, SIZE), nn.Parameter(torch.randn(SIZE, SIZE))
    train(compiled(lambda x: torch.tanh(module(x)) @ raw))
    assert set(scales({"first": module, "second": raw})) == linear_keys("first", "second")
    with pytest.raises(TypeError, match="a module, or a mapping"):
        te_dynamo.scale_state(train)  # type: ignore[arg-type]


def test_names_do_not_depend_on_fusion():
    merged, apart = Attention(), Attention()
    apart.load_state_dict(merged.state_dict())
    train(compiled(merged), shape=(2, 8, SIZE))
    train(compiled(apart, like_te=True), shape=(2, 8, SIZE))
    assert scales(merged).keys() == scales(apart).keys() == linear_keys(*(f"{n}_proj" for n in "qkvo"))


def test_what_is_one_gemm_has_one_scale_that_of_the_largest_amax():
    model = Attention()
    with torch.no_grad():
        model.k_proj.weight.mul_(8)
    train(compiled(model), shape=(2, 8, SIZE))
    found = scales(model)
    largest = model.k_proj.weight.abs().max()
    for name in ("q_proj", "k_proj", "v_proj"):
        assert found[f"{name}.weight.scale"] == torch.tensor(448.0 / 2) / largest  # a weight's margin is 1
    assert_equal({k[2:]: v for k, v in found.items() if k[:2] == "q_"}, {k[2:]: v for k, v in found.items() if k[:2] == "v_"})
    assert found["o_proj.weight.scale"] != found["q_proj.weight.scale"]


def test_scales_that_were_apart_become_one_where_a_gemm_joins_them():
    """An unmerged checkpoint (such as TE's) in a merged model: the scale of the largest amax, and the largest amax of each step."""
    model = Attention()
    train(compiled(model, like_te=True), shape=(2, 8, SIZE))
    apart = scales(model)
    for name, factor in (("q_proj", 1.0), ("k_proj", 4.0), ("v_proj", 0.5)):
        apart[f"{name}.weight.scale"] = torch.tensor(factor)
        apart[f"{name}.weight.amax_history"] = torch.tensor([0.0, 1.0, 2.0, 3.0]) * factor
    other = Attention()
    te_dynamo.scale_state(other).load_state_dict(apart)
    compiled(other)(torch.randn(2, 8, SIZE))  # a forward without a backward so far
    STATE.visited.clear()
    arena, direction, index = STATE.homes.by_weight[id(other.v_proj.weight)].slots[0, "weight"]
    assert arena.scale[direction, index] == 0.5
    assert arena.ordered_history(direction, index).tolist() == [0.0, 4.0, 8.0, 12.0]


# --- what is saved


def test_tensors_are_plain_and_share_no_memory():
    model = Net()
    train(compiled(model))
    found = scales(model)
    assert all(type(t) is Tensor and t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in found.values())
    assert all(t.shape == (() if key.endswith("scale") else (HISTORY,)) for key, t in found.items())
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == len(found)
    before = {k: t.clone() for k, t in found.items()}
    train(compiled(model), seed=1)
    assert_equal(found, before)


def test_reading_changes_nothing():
    looked, left = Net(), Net()
    left.load_state_dict(looked.state_dict())
    for model, look in ((looked, True), (left, False)):
        call = compiled(model)
        for step in range(4):
            y = call(torch.randn(8, SIZE, generator=torch.Generator().manual_seed(step)))
            if look:
                scales(model)
            y.square().sum().backward()
            if look:
                scales(model)
    assert_equal(scales(looked), scales(left))


@pytest.mark.parametrize("how", ["torch.save", "safetensors", "dcp"])
def test_every_way_of_saving(how, tmp_path):
    model = Net()
    train(compiled(model))
    saved = scales(model)
    if how == "torch.save":
        torch.save(saved, tmp_path / "s.pt")
        loaded = torch.load(tmp_path / "s.pt", weights_only=True)
    elif how == "safetensors":
        save_file(saved, tmp_path / "s.safetensors")
        loaded = load_file(tmp_path / "s.safetensors")
    else:
        dcp.save({"scales": saved}, checkpoint_id=str(tmp_path), no_dist=True)
        other = Net()
        train(compiled(other), seed=1)
        target = {"scales": scales(other)}
        dcp.load(target, checkpoint_id=str(tmp_path), no_dist=True)
        loaded = target["scales"]
    assert_equal(loaded, saved)


def test_nothing_shows_in_the_model(tmp_path):
    model = Net()
    keys_before, under_inductor = list(model.state_dict()), copy.deepcopy(model)
    train(compiled(model))
    train(torch.compile(under_inductor))
    for m in (model, under_inductor):
        m.zero_grad()
    assert list(model.state_dict()) == keys_before
    for m, n in zip(model.modules(), under_inductor.modules(), strict=True):
        assert vars(m).keys() == vars(n).keys()
        for p, q in zip(m._parameters.values(), n._parameters.values(), strict=True):
            assert vars(p).keys() == vars(q).keys()  # Dynamo itself sets an attribute there
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pickle.loads(pickle.dumps(model)).parameters(), strict=True))
    Net().load_state_dict(model.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert scales(again) == {}


def test_hugging_face_saves_what_it_saved(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "before")
    tokens = torch.randint(0, 32, (2, 8))
    compiled(model)(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert "model.layers.0.self_attn.q_proj.input.scale" in scales(model)
    model.save_pretrained(tmp_path / "after")
    files = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert sorted(p.name for p in (tmp_path / "after").iterdir()) == files
    assert load_file(tmp_path / "before/model.safetensors").keys() == load_file(tmp_path / "after/model.safetensors").keys()
    again, report = LlamaForCausalLM.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    te_dynamo.scale_state(again).load_state_dict(scales(model))
    assert_equal(scales(again), scales(model))


# --- what is loaded


@pytest.mark.parametrize("when", ["before the first call", "after it"])
def test_a_loaded_state_goes_on_as_the_saved_one(when):
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    call, other_call = compiled(model), compiled(other)
    train(call)
    if when == "after it":
        train(other_call, seed=5)
    result = te_dynamo.scale_state(other).load_state_dict(scales(model))
    assert result == ([], [])
    assert_equal(scales(other), scales(model))
    for y, z in zip(train(call, seed=1), train(other_call, seed=1), strict=True):
        assert torch.equal(y, z)
    assert_equal(scales(other), scales(model))


@pytest.mark.parametrize("when", ["before the first call", "after it"])
@pytest.mark.parametrize("provider", ["native", "reference"])
def test_a_loaded_state_serves_inference(provider, when):
    """In a graph without gradients, which makes no slots of its own: other models in the process get none."""
    model, other, stranger = Net(), Net(), Net()
    other.load_state_dict(model.state_dict())
    call, other_call, strange_call = (compiled(m, provider=provider) for m in (model, other, stranger))
    train(call)
    x = 100 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = other_call(x) if when == "after it" else None
        te_dynamo.scale_state(other).load_state_dict(scales(model))
        strange_call(x)
        assert not scales(stranger)
        found, expected = other_call.eval()(x), call.eval()(x)
    assert torch.equal(found, expected)
    assert before is None or not torch.equal(before, found)  # the scales are too small for what is 100 times as large


def test_a_deep_copy_starts_fresh_and_can_be_given_the_state():
    model = Net()
    train(compiled(model))
    twin = copy.deepcopy(model)
    assert scales(twin) == {}
    te_dynamo.scale_state(twin).load_state_dict(scales(model))
    for y, z in zip(train(compiled(model), seed=1), train(compiled(twin), seed=1), strict=True):
        assert torch.equal(y, z)


def test_strict_loading_names_what_does_not_fit():
    model = Net()
    train(compiled(model))
    state = te_dynamo.scale_state(model)
    before = state.state_dict()
    bad = state.state_dict()
    del bad["blocks.0.up.input.scale"], bad["blocks.0.up.input.amax_history"], bad["blocks.1.up.weight.scale"]
    bad["blocks.1.down.input.amax_history"] = torch.zeros(HISTORY + 1)
    bad["blocks.1.down.weight.scale"] = torch.zeros(2)
    bad |= {f"blocks.7.up.input.{ending}": before[f"blocks.0.up.input.{ending}"] for ending in ENDINGS}
    bad["nonsense"] = torch.zeros(())
    with pytest.raises(RuntimeError) as error:
        state.load_state_dict(bad)
    for words in (
        "missing: blocks.0.up.input.scale",
        "missing: blocks.1.up.weight.scale, whose counterpart is there",
        f"blocks.1.down.input.amax_history has [{HISTORY + 1}], the site's recipe has amax_history_len={HISTORY}",
        "blocks.1.down.weight.scale has [2]",
        "unexpected: blocks.7.up.input.scale",
        "unexpected: nonsense",
        "Remedy",
    ):
        assert words in str(error.value)
    assert_equal(state.state_dict(), before)


def test_loading_without_strict_leaves_the_rest_alone():
    model = Net()
    train(compiled(model))
    state = te_dynamo.scale_state(model)
    before = state.state_dict()
    part = {k: v + 1 if k.endswith("scale") else v for k, v in before.items() if k.startswith("blocks.0")}
    part |= {f"blocks.7.up.input.{e}": torch.ones(()) for e in ENDINGS}
    result = state.load_state_dict(part, strict=False)
    assert set(result.unexpected_keys) == keys("blocks.7.up.input")
    assert set(result.missing_keys) == linear_keys("blocks.1.up", "blocks.1.down")
    after = state.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("blocks.1"))
    assert all(after[k] == before[k] + 1 for k in before if k.startswith("blocks.0") and k.endswith("scale"))


def test_a_wrong_shape_is_found_when_the_site_appears():
    model, other = Net(), Net()
    train(compiled(model))
    te_dynamo.scale_state(other).load_state_dict(scales(model))
    with pytest.raises(RuntimeError, match=r"blocks.0.up.input.amax_history has \[4\], the site's recipe has amax_history_len=1024"):
        torch.compile(other, backend=te_fp8, options={"recipe": "delayed"})(torch.randn(8, SIZE))
    with pytest.raises(RuntimeError, match="the scale state that was loaded does not fit"):  # and at each call, until it fits
        torch.compile(other, backend=te_fp8, options={"recipe": "delayed"})(torch.randn(8, SIZE))
    train(compiled(other), steps=1)
    assert scales(other)["blocks.0.up.input.amax_history"].count_nonzero() == 3  # one of its own, and the two saved ones that still fit


def test_another_load_replaces_what_waits_and_does_not_fit():
    model, other = Net(), Net()
    train(compiled(model))
    te_dynamo.scale_state(other).load_state_dict(scales(model))
    te_dynamo.scale_state(other).load_state_dict({}, strict=False)
    assert not scales(other)
    torch.compile(other, backend=te_fp8, options={"recipe": "delayed"})(torch.randn(8, SIZE))  # its history is longer


def test_what_waits_for_its_sites_is_saved_and_replaced():
    model, other = Net(), Net()
    train(compiled(model))
    first = scales(model)
    train(compiled(model), seed=1)
    state = te_dynamo.scale_state(other)
    state.load_state_dict(first)
    assert_equal(state.state_dict(), first)
    assert state.sites() == te_dynamo.scale_state(model).sites()
    state.load_state_dict(scales(model))
    train(compiled(other.blocks[0]), steps=1)  # only some of the sites
    mixed = state.state_dict()
    assert mixed.keys() == first.keys()
    assert torch.equal(mixed["blocks.1.up.input.scale"], scales(model)["blocks.1.up.input.scale"])
    state.reset()
    assert not any(v.any() for v in state.state_dict().values())


def test_reset_begins_anew():
    model = Net()
    call = compiled(model)
    train(call)
    te_dynamo.scale_state(model).reset()
    assert not any(v.any() for v in scales(model).values())
    torch.manual_seed(0)
    other = Net()
    other.load_state_dict(model.state_dict())
    for y, z in zip(train(call), train(compiled(other)), strict=True):
        assert torch.equal(y, z)


def test_a_shorter_history_keeps_what_fits():
    model = Net()
    train(compiled(model), steps=6)
    longer = scales(model)["blocks.0.up.input.amax_history"]
    compiled(model, recipe=DelayedScaling(amax_history_len=3))(torch.randn(8, SIZE))
    arena, direction, index = STATE.homes.by_weight[id(model.blocks[0].up.weight)].slots[0, "input"]
    assert arena.ordered_history(direction, index)[1:].tolist() == longer[-2:].tolist()


RESUME = """
    import sys
    import torch
    import te_dynamo, te_dynamo.backend
    from te_dynamo.runtime import compile_without_codegen
    from tests.state.test_saved import Net, compiled

    te_dynamo.runtime.compile_inductor = compile_without_codegen
    torch.use_deterministic_algorithms(True)
    folder, *parts = sys.argv[1:]
    for part in parts:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        start, stop = {"whole": (0, 8), "first": (0, 4), "second": (4, 8)}[part]
        if part == "second":
            saved = torch.load(f"{folder}/half.pt")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            te_dynamo.scale_state(model).load_state_dict(saved["scales"])
        call, losses = compiled(model), []
        for step in range(start, stop):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            loss = (call(x) - x.flip(0)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        scales = te_dynamo.scale_state(model).state_dict()
        everything = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scales": scales, "losses": losses}
        torch.save(everything, f"{folder}/{'half' if part == 'first' else part}.pt")
"""


def test_resuming_in_another_process_is_bit_identical(forks, tmp_path):
    root = Path(__file__).resolve().parents[2]
    for parts in (("whole", "first"), ("second",)):
        forks.run(textwrap.dedent(RESUME), str(tmp_path), *parts, path=[str(root)])
    whole, half, second = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "half", "second"))
    assert whole["losses"] == half["losses"] + second["losses"]
    assert_equal(whole["model"], second["model"])
    assert_equal(whole["scales"], second["scales"])


# --- Transformer Engine's checkpoints


@pytest.fixture(scope="module")
def te() -> Any:
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    return te_on_cpu.install()


def te_checkpoint(te: Any) -> tuple[dict[str, Any], Any]:
    from transformer_engine.common.recipe import DelayedScaling as Theirs

    with te_on_cpu.cuda_is_cpu():
        model = nn.Sequential(te.Linear(32, 32, device="cpu"), te.Linear(32, 32, device="cpu"))
        for step in range(3):
            with te.autocast(enabled=True, recipe=Theirs(amax_history_len=HISTORY)):
                y = model(torch.randn(16, 32) * (step + 1))
            y.square().sum().backward()
        return model.state_dict(), model


def test_a_te_checkpoint_comes_in(te):
    checkpoint, theirs = te_checkpoint(te)
    assert checkpoint["0._extra_state"].dtype == torch.uint8
    ours = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    result = te_dynamo.scale_state(ours).load_te(checkpoint)
    assert result == ([], [])
    found = scales(ours)
    for i in range(2):
        meta = theirs[i].fp8_meta
        for role, which, place in (("input", "scaling_fwd", 0), ("weight", "scaling_fwd", 1), ("grad_output", "scaling_bwd", 0)):
            assert found[f"{i}.{role}.scale"] == meta[which].scale[place]
            assert torch.equal(found[f"{i}.{role}.amax_history"], meta[which].amax_history[:, place])
    compiled(ours)(torch.randn(16, 32)).sum().backward()
    assert scales(ours)["0.weight.amax_history"][1:].count_nonzero() == HISTORY - 1


def test_te_names_are_mapped(te):
    checkpoint, _ = te_checkpoint(te)
    ours = nn.ModuleDict({"encoder": nn.Linear(32, 32), "head": nn.Linear(32, 32)})
    state = te_dynamo.scale_state(ours)
    result = state.load_te(checkpoint, names={"0": "encoder", "1": None})
    assert result == ([], []) and state.sites() == ["encoder"]
    assert state.load_te(checkpoint).unexpected_keys  # this model has nothing under TE's names
    assert state.load_te(checkpoint, names=lambda path: {"0": "encoder", "1": "head"}[path]) == ([], [])
    with pytest.raises(ValueError, match="GEMM 1 .'head'. would need 6"):
        state.load_te(checkpoint, names={"0": ("encoder", "head")})


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("this code must not run",))


@pytest.mark.parametrize("form", ["pickle", "torch.save", "BytesIO"])
def test_an_entry_that_would_run_code_is_refused(form, capsys):
    harmful = {"scale_fwd": torch.ones(3), "recipe": Harmful()}
    buffer = io.BytesIO()
    if form == "pickle":
        buffer.write(pickle.dumps(harmful))
    else:
        torch.save(harmful, buffer)
    entry: Any = buffer if form == "BytesIO" else torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="print, which is no tensor"):
        te_dynamo.scale_state(nn.Linear(4, 4)).load_te({"_extra_state": entry})
    assert "must not run" not in capsys.readouterr().out


def test_older_forms_of_te_s_entries_are_read():
    state = {
        "scale_fwd": torch.tensor([1.0, 2.0, 3.0]),
        "amax_history_fwd": torch.arange(12.0).reshape(4, 3),
        "scale_bwd": torch.tensor([4.0, 5.0]),
        "amax_history_bwd": torch.arange(8.0).reshape(4, 2),
    }
    saved, pickled = io.BytesIO(), pickle.dumps(state)
    torch.save(state, saved)
    for entry in (saved, torch.frombuffer(bytearray(pickled), dtype=torch.uint8), io.BytesIO(pickled)):
        model = nn.Linear(4, 4)
        assert te_dynamo.scale_state(model).load_te({"_extra_state": entry, "weight": torch.zeros(4, 4)}) == ([], [])
        assert [scales(model)[f"{role}.scale"].item() for role in ("input", "weight", "grad_output")] == [1.0, 2.0, 4.0]
        assert scales(model)["weight.amax_history"].tolist() == [1.0, 4.0, 7.0, 10.0]
    empty = {"_extra_state": torch.empty(0, dtype=torch.uint8)}
    assert te_dynamo.scale_state(nn.Linear(4, 4)).load_te(empty) == ([], [])
    with pytest.raises(ValueError, match="is a str"):
        te_dynamo.scale_state(nn.Linear(4, 4)).load_te({"_extra_state": "x"})
