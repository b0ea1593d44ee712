"""`padding="skip"`: rows of padding give 0, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_dynamo
from te_dynamo.backend import te_fp8

transformers = pytest.importorskip("transformers")

MASK = torch.ones(3, 24, dtype=torch.int64)
MASK[0, 15:] = 0
MASK[1, :9] = 0
MASK[2, 4] = MASK[2, 20:] = 0
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
DECODER = SIZES | {"num_key_value_heads": 2, "use_cache": False, "attn_implementation": "sdpa"}


def llama(**more: Any) -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**DECODER, **more))


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa")
    return transformers.BertModel(config)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": "rowwise", **options})


def attentions(model: nn.Module, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
    report = te_dynamo.explain(model, *args, options={"padding": "skip", "strict": True} | (options or {}), **kwargs)
    return [site for site in report.sites if site.kind == "attention"]


@pytest.mark.parametrize("make", [llama, bert])
def test_tokens_that_are_no_padding_stay_as_they_are(make, no_codegen):
    """Row-wise scales, so that no token's scale depends on another's. Weights' gradients too, as the loss reads no padding."""
    torch.manual_seed(0)
    model = make()
    ids, real = torch.randint(0, 99, MASK.shape), MASK.bool()

    def step(padding: str) -> tuple[Tensor, list[Tensor]]:
        hidden = compiled(model, padding=padding)(input_ids=ids, attention_mask=MASK).last_hidden_state
        used = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(hidden[real].square().sum(), used, allow_unused=True)
        return hidden, [g for g in grads if g is not None]

    (exact, expected), (skipped, found) = step("exact"), step("skip")
    torch.testing.assert_close(skipped[real], exact[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(skipped[~real], exact[~real], atol=1e-2)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-3 * e.norm()
    for site in attentions(model, input_ids=ids, attention_mask=MASK):
        assert site.detail["padding"] == "skipped: its rows give 0", site.detail


class Attention(nn.Module):
    """q, k and v from linears; the mask from a function of the module's other inputs."""

    def __init__(self, mask: Callable[..., Tensor], crosses: bool = False) -> None:
        super().__init__()
        self.mask, self.crosses = mask, crosses
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        context = x.roll(1, 0) if self.crosses else x
        q, k, v = (f(t).unflatten(-1, (4, 16)).transpose(1, 2) for f, t in ((self.q, x), (self.k, context), (self.v, context)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x, *given)).transpose(1, 2).flatten(2)


class AttentionOfOthers(nn.Module):
    """q of some tokens, k and v of others, all by the same linear."""

    def __init__(self, others: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.others = nn.Linear(64, 192, bias=False), others

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.others(*self.qkv(x).chunk(3, -1)))
        s = q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, -s:]).transpose(1, 2).flatten(2)


OTHERS = {
    "the second half of a sequence": lambda q, k, v: (q[:, :12], k[:, 12:], v[:, 12:]),
    "a rolled sequence": lambda q, *kv: (q, *(torch.cat([t[:, 6:], t[:, :6]], 1) for t in kv)),
    "another sequence": lambda q, *kv: (q, *(t[[2, 0, 1]] for t in kv)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_rows_of_other_tokens_than_their_keys(case, no_codegen):
    (site,) = attentions(AttentionOfOthers(OTHERS[case]), torch.randn(3, 24, 64), MASK.bool())
    assert site.detail["padding"] == "not skipped: its rows may be other tokens than its keys"


def test_tokens_of_all_sequences_one_after_another(no_codegen):
    class Flat(Attention):
        def forward(self, x: Tensor, *given: Tensor) -> Tensor:
            tokens = x.flatten(0, 1)
            q, k, v = (f(tokens).view(3, 24, 4, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x, *given)).transpose(1, 2).flatten(2)

    (site,) = attentions(Flat(lambda x, valid: valid[:, None, None, :]), torch.randn(3, 24, 64), MASK.bool())
    assert site.detail["padding"] == "skipped: its rows give 0"


class LowRank(nn.Module):
    """q and k from different tensors, which are made from the same one; k has a LoRA, and v its features from the middle of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.q, self.k, self.v = (nn.Linear(64, n, bias=False) for n in (64, 64, 64, 192))
        self.a, self.b = nn.Linear(64, 16, bias=False), nn.Linear(16, 64, bias=False)
        self.norm = nn.RMSNorm(64)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.norm(x)
        made = (self.q(self.norm(self.down(x))), self.k(x) + 2 * self.b(self.a(x)), self.v(x)[..., 64:128])
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in made)
        k = torch.cat([k.new_empty(3, 4, 0, 16), k], 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :]).transpose(1, 2).flatten(2)


def test_rows_and_keys_of_the_same_tokens_on_different_ways(no_codegen):
    (site,) = attentions(LowRank(), torch.randn(3, 24, 64), MASK.bool())
    assert site.detail["padding"] == "skipped: its rows give 0"


def tril(x: Tensor) -> Tensor:
    place = torch.arange(x.shape[1], device=x.device)
    return place <= place[:, None]


def windowed(x: Tensor, valid: Tensor) -> Tensor:
    place = torch.arange(x.shape[1], device=x.device)
    return tril(x) & (place > place[:, None] - 5) & valid[:, None, None, :]


def rows_too(x: Tensor, valid: Tensor) -> Tensor:
    """Rows are compared with lengths: the last row shows nothing."""
    lengths, place = valid.sum(1)[:, None, None, None], torch.arange(x.shape[1], device=x.device)
    return (place[:, None] < lengths) & (place < lengths)


def same_number(of_sequence: Tensor) -> Tensor:
    return of_sequence[:, None, :, None] == of_sequence[:, None, None, :]


REFUSED = {
    "a window": (windowed, False, "a window"),
    "packed": (lambda x, valid: tril(x) & same_number(valid.cumsum(1)), False, None),
    "rows are hidden too": (rows_too, False, "not the same for all rows and heads"),
    "other tokens": (lambda x, valid: valid[:, None, None, :].expand(-1, 1, x.shape[1], -1), True, "its rows may be other tokens"),
    "other tokens, causal": (lambda x, valid: tril(x) & valid[:, None, None, :], True, "its rows may be other tokens"),
    "numbers": (lambda x, valid: torch.zeros(x.shape[0], 1, 1, x.shape[1]).masked_fill(~valid[:, None, None, :], -1e9), False, "its mask"),
    "lowest": (lambda x, valid: (~valid[:, None, None, :]).float() * torch.finfo(torch.float32).min, False, "added to the scores"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_computed_as_in_eager_mode(case, no_codegen):
    mask, crosses, reason = REFUSED[case]
    torch.manual_seed(0)
    model, x, valid = Attention(mask, crosses), torch.randn(3, 24, 64), MASK.bool()
    (site,) = attentions(model, x, valid)
    if reason is None:
        assert "padding" not in site.detail
    else:
        assert reason in site.detail["padding"] and site.detail["padding"].startswith("not skipped: ")
    exact, skipped = (compiled(model, padding=padding)(x, valid) for padding in ("exact", "skip"))
    assert torch.equal(exact, skipped)


SKIPPED = {
    "causal": lambda x, valid: tril(x) & valid[:, None, None, :],
    "all": lambda x, valid: valid[:, None, None, :].expand(-1, 1, x.shape[1], -1),
    "all, of one row": lambda x, valid: valid[:, None, None, :],
    "lengths": lambda x, valid: torch.arange(x.shape[1], device=x.device) < valid.sum(1)[:, None, None, None],
}


@pytest.mark.parametrize("case", SKIPPED)
def test_rows_of_padding_are_zero(case, no_codegen):
    torch.manual_seed(0)
    model, x, valid = Attention(SKIPPED[case]), torch.randn(3, 24, 64), MASK.bool()
    valid = valid if case != "lengths" else torch.arange(24) < torch.tensor([[24], [7], [1]])
    (site,) = attentions(model, x, valid)
    assert site.detail["padding"] == "skipped: its rows give 0"
    exact, skipped = (compiled(model, padding=padding)(x, valid) for padding in ("exact", "skip"))
    torch.testing.assert_close(skipped[valid], exact[valid])
    assert (skipped[~valid] == 0).all() and (exact[~valid] != 0).any()


def test_without_padding_nothing_is_said(no_codegen):
    model, x = Attention(lambda x: tril(x)), torch.randn(3, 24, 64)
    (site,) = attentions(model, x)
    assert "padding" not in site.detail


def test_fp8_attention_gives_way(no_codegen):
    model, x, valid = Attention(SKIPPED["causal"]), torch.randn(3, 24, 64), MASK.bool()
    options = {"attention": "fp8", "recipe": "current"}
    (site,) = attentions(model, x, valid, options=options)
    assert site.detail["precision"] == "high" and site.detail["padding"].startswith("skipped")
    (exact,) = attentions(model, x, valid, options=options | {"padding": "exact"})
    assert exact.detail["precision"] == "fp8"


def test_verify_is_refused():
    with pytest.raises(ValueError, match="set padding='exact' to verify"):
        te_dynamo.Options(padding="skip", verify=True)
