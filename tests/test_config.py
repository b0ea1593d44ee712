"""Options: what is accepted, what is rejected and with which message, and which setting takes precedence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch._inductor

import te_dynamo
from te_dynamo.config import KEYS, Options, set_options


@pytest.fixture(autouse=True)
def factory_defaults():
    with set_options(Options()):
        yield


def test_defaults():
    options = Options.from_user()
    assert options == Options()
    assert (options.recipe, options.provider, options.attention, options.short_sequence) == ("auto", "auto", "auto", 512)
    assert not (options.include_logits or options.like_te or options.verify or options.strict)
    assert options.skip == () and options.debug_dir is None and options.mode is None and options.inductor == {}


def test_every_key_is_documented():
    for key in KEYS:
        assert f"\n        {key}: " in Options.__doc__, key


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("recipe", "delayd", "Did you mean 'delayed'?"),
        ("recipe", 3, "'delayed', 'current'"),
        ("provider", "triton", "'auto', 'te', 'native', 'reference'"),
        ("attention", True, "'auto', 'fp8', 'fp8_both', 'high_precision', 'off'"),
        ("skip", "lm_head", "skip=('lm_head',)"),
        ("skip", [1], "each a str"),
        ("skip", 3, "sequence of fnmatch patterns"),
        ("short_sequence", -1, "0 or more"),
        ("short_sequence", True, "0 or more"),
        ("short_sequence", 1.5, "0 or more"),
        ("include_logits", 1, "True or False"),
        ("like_te", "yes", "True or False"),
        ("verify", None, "True or False"),
        ("strict", 0, "True or False"),
        ("debug_dir", 3, "path of a folder"),
        ("debug_dir", "", "path of a folder"),
        ("memory", "balancd", "Did you mean 'balanced'?"),
        ("mode", "max-autotun", "Did you mean 'max-autotune'?"),
        ("inductor", ["max_autotune"], "a dict"),
        ("inductor", {1: True}, "a dict"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(key, value, words):
    with pytest.raises(ValueError) as error:
        Options.from_user({key: value})
    message = str(error.value)
    assert words in message
    assert key in message
    if not isinstance(value, list):
        assert repr(value) in message


@pytest.mark.parametrize(("key", "near"), [("recipie", "recipe"), ("skips", "skip"), ("include_logit", "include_logits")])
def test_an_unknown_key_suggests_the_near_one(key, near):
    for attempt in (lambda: Options.from_user({key: 1}), lambda: set_options(**{key: 1})):
        with pytest.raises(ValueError, match=f"unknown option '{key}'.*Did you mean '{near}'"):
            attempt()
    assert Options.from_user() == Options()


def test_an_unknown_key_like_nothing_lists_all():
    with pytest.raises(ValueError, match="unknown option 'zzzz'. The options are: recipe, provider"):
        Options.from_user({"zzzz": 1})


def test_an_option_that_was_replaced_names_what_is_in_its_place():
    for give in (Options.from_user, set_options):
        with pytest.raises(ValueError, match="the option 'recompute_inputs' is now memory='saving'"):
            give({"recompute_inputs": True})


def test_options_of_a_wrong_type():
    with pytest.raises(ValueError, match="must be a dict or te_dynamo.Options, not list"):
        Options.from_user(["recipe"])


def test_values_are_normalized_and_copied():
    skip, inductor = ["lm_head"], {"max_autotune": True}
    options = Options(skip=skip, debug_dir=Path("dump") / "here", inductor=inductor)
    skip.append("*")
    inductor["max_autotune"] = False
    assert options.skip == ("lm_head",)
    assert options.debug_dir == os.path.join("dump", "here")
    assert options.inductor == {"max_autotune": True}
    assert Options(skip={"b", "a", "c"}).skip == ("a", "b", "c")


def test_mode_argument_and_option():
    assert Options.from_user(mode="max-autotune").mode == "max-autotune"
    assert Options.from_user({"mode": "max-autotune"}, mode="max-autotune").mode == "max-autotune"
    assert Options.from_user({"mode": None}, mode="default").mode == "default"
    with pytest.raises(ValueError, match=r"mode='default' contradicts options\['mode'\]='max-autotune'"):
        Options.from_user({"mode": "max-autotune"}, mode="default")
    set_options(mode="max-autotune")
    assert Options.from_user(mode="default").mode == "default", "the argument wins over a process-wide default"


def test_call_wins_over_process_defaults():
    set_options(recipe="current", skip=("lm_head",))
    set_options(strict=True)
    assert Options.from_user() == Options(recipe="current", skip=("lm_head",), strict=True)
    assert Options.from_user({"recipe": "delayed"}) == Options(recipe="delayed", skip=("lm_head",), strict=True)
    assert Options.from_user(Options(verify=True)) == Options(verify=True), "an Options states every key"


def test_set_options_returns_the_previous_ones():
    set_options(recipe="current")
    previous = set_options(Options(strict=True))
    assert previous == Options(recipe="current")
    assert Options.from_user() == Options(strict=True)
    set_options(previous)
    assert Options.from_user() == Options(recipe="current")


def test_set_options_as_a_context_manager():
    set_options(recipe="current")
    with set_options(verify=True) as now:
        assert now == Options.from_user() == Options(recipe="current", verify=True)
        with set_options({"verify": False}):
            assert Options.from_user() == Options(recipe="current")
    assert Options.from_user() == Options(recipe="current")
    with pytest.raises(RuntimeError, match="user's own"), set_options(strict=True):
        raise RuntimeError("user's own")
    assert Options.from_user() == Options(recipe="current")


def test_inductor_config():
    assert Options().inductor_config() == {}
    assert Options(mode="default").inductor_config() == {}
    assert Options(mode="max-autotune").inductor_config() == torch._inductor.list_mode_options("max-autotune")
    both = Options(mode="max-autotune", inductor={"max_autotune": False, "triton.cudagraphs": False, "epilogue-fusion": False})
    config = both.inductor_config()
    assert config["max_autotune"] is False and config["triton.cudagraphs"] is False and config["epilogue_fusion"] is False
    with pytest.raises(ValueError, match="unknown key 'max_autotun'. Did you mean 'max_autotune'"):
        Options(inductor={"max_autotun": True}).inductor_config()


def test_equality_and_cache_key():
    assert Options(inductor={"a": 1, "b": 2}).cache_key() == Options(inductor={"b": 2, "a": 1}).cache_key()
    assert hash(Options(skip=["a"])) == hash(Options(skip=("a",)))
    assert Options(recipe="current").cache_key() != Options().cache_key()
    assert Options(debug_dir="a").cache_key() == Options().cache_key()
    assert Options(debug_dir="a") != Options()
    assert Options(inductor={"f": test_defaults}).cache_key().count("test_defaults") == 1
    assert " at 0x" not in Options(inductor={"f": test_defaults}).cache_key()


def test_cache_key_is_the_same_in_another_process():
    code = "from te_dynamo.config import Options; print(Options(skip={'b', 'a'}, inductor={'x': 1}).cache_key(), end='')"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert other == Options(skip={"a", "b"}, inductor={"x": 1}).cache_key()


def test_public_names():
    assert set(te_dynamo.__all__) == {
        "Options",
        "set_options",
        "compile_config",
        "estimate",
        "explain",
        "recipe",
        "release_high_precision",
        "scale_state",
        "weights_changed",
        "__version__",
    }
    for name in te_dynamo.__all__:
        getattr(te_dynamo, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        te_dynamo.nothing  # noqa: B018
