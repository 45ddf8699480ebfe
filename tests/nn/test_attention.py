from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertLMHeadModel, PreTrainedModel

from sparsebert.nn import BlockSparseAttention, BlockSparseSelfAttention, register_attention, use_attention
from sparsebert.nn.attention import PatternBlocks
from sparsebert.nn.attention_patterns import from_head_mask, random, sliding_window, strided
from sparsebert.ops import BlockLists

WINDOW = {"pattern": "sliding_window", "window": 5, "global_tokens": 1, "block": (16, 16)}
KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_attention()


def batch(length: int = 18) -> dict[str, Tensor]:
    """Three sequences, two of them padded."""
    ids = torch.randint(5, 20, (3, length), generator=torch.Generator().manual_seed(1))
    kept = torch.arange(length) < torch.tensor([[length], [length // 2], [1]])
    return {"input_ids": ids, "attention_mask": kept.long()}


def hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the model says of the tokens there are."""
    kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    out: Tensor = model(**inputs).last_hidden_state[kept]
    return out


def with_bias(
    forward: Callable[..., Any], bias: Tensor, states: Tensor, mask: Tensor | None = None, **more: Any
) -> Any:
    mask = more.pop("attention_mask", mask)
    return forward(states, bias if mask is None else mask + bias, **more)


def masked_eager(kind: str, mask: Tensor | list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The same model with `mask`, bool `[S, S]` (or one a layer), forced on eager attention."""
    model = tiny.base(kind)
    model.set_attn_implementation("eager")
    layers = [m for m in model.modules() if type(m).__name__.endswith("SelfAttention")]
    masks = mask if isinstance(mask, list) else [mask] * len(layers)
    for layer, own in zip(layers, masks, strict=True):
        bias = torch.zeros(own.shape).masked_fill(~own, -1e9)
        before = layer.forward

        def forward(
            states: Any, attention_mask: Any = None, *rest: Any, _go: Any = before, _b: Any = bias, **more: Any
        ) -> Any:
            return _go(states, _b if attention_mask is None else attention_mask + _b, *rest, **more)

        layer.forward = forward  # type: ignore[method-assign]
    return hidden(model, inputs)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("padded", [True, False])
def test_by_the_name_alone_it_is_sdpa(kind: str, padded: bool) -> None:
    inputs = batch()
    if not padded:
        del inputs["attention_mask"]
    model = tiny.base(kind)
    expected = hidden(model, inputs)
    model.set_attn_implementation("sparsebert")
    close(hidden(model, inputs), expected)


@KINDS
def test_loaded_by_name(kind: str, tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "model", kind)
    model = AutoModel.from_pretrained(folder, attn_implementation="sparsebert").eval()
    assert model.config._attn_implementation == "sparsebert"
    close(hidden(model, batch()), hidden(tiny.base(kind), batch()))


@KINDS
def test_a_pattern_is_what_is_attended(kind: str) -> None:
    model = use_attention(tiny.base(kind), WINDOW)
    mask = sliding_window(18, 5, 1, block=(16, 16)).to_mask()[0, 0]
    close(hidden(model, batch()), masked_eager(kind, mask, batch()))


@KINDS
def test_each_layer_its_own(kind: str) -> None:
    one = functools.partial(sliding_window, window=3, block=(16, 16))
    model = use_attention(tiny.base(kind), [one, None])
    masks = [one(18).to_mask()[0, 0], torch.ones(18, 18, dtype=torch.bool)]
    close(hidden(model, batch()), masked_eager(kind, masks, batch()))


@pytest.mark.parametrize("length", [20, 17, 5, 1])
def test_lists_for_the_longest_serve_shorter_ones(length: int) -> None:
    lists = sliding_window(20, 5, 1, block=(16, 16))
    model = use_attention(tiny.base(), lists)
    mask = lists.to_mask()[0, 0, :length, :length]
    close(hidden(model, batch(length)), masked_eager("bert", mask, batch(length)))


def test_heads_of_their_own_and_pruned_ones() -> None:
    lists = from_head_mask(torch.tensor([True, False, True, True]), 18, block=(16, 16))
    model = use_attention(tiny.base(), lists)
    seen = {}
    layer = model.encoder.layer[0].attention.self
    layer.register_forward_hook(lambda *parts: seen.update(out=parts[2][0]))
    hidden(model, batch())
    assert bool((seen["out"].unflatten(-1, (4, 4))[:, :, 1] == 0).all())
    assert bool((seen["out"].unflatten(-1, (4, 4))[:, :, 0] != 0).any())


@KINDS
def test_it_is_saved_with_the_model(kind: str, tmp_path: Path) -> None:
    model = use_attention(tiny.base(kind), WINDOW)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, attn_implementation="sparsebert").eval()
    assert torch.equal(hidden(again, batch()), hidden(model, batch()))
    use_attention(again)
    assert not hasattr(again.config, "sparsebert_attention")
    close(hidden(again, batch()), hidden(tiny.base(kind), batch()))


@KINDS
def test_training_with_dropout_of_maps_is_refused(kind: str) -> None:
    model = use_attention(tiny.base(kind), WINDOW).train()
    with pytest.raises(ValueError, match=r"dropout \(0\.1\).*attention_probs_dropout_prob.*attention_dropout"):
        model(**batch())
    use_attention(model, WINDOW, attention_dropout=0.0)
    model(**batch()).last_hidden_state.sum().backward()
    config = model.config
    assert getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", None)) == 0.0


@KINDS
def test_gradients_are_sdpas(kind: str) -> None:
    models = [tiny.base(kind), tiny.base(kind)]
    models[1].set_attn_implementation("sparsebert")
    for model in models:
        hidden(model, batch()).square().sum().backward()
    for one, other in zip(*(m.named_parameters() for m in models), strict=True):
        if one[1].grad is not None:
            torch.testing.assert_close(other[1].grad, one[1].grad, rtol=1e-3, atol=1e-3)


@KINDS
def test_no_maps(kind: str) -> None:
    model = use_attention(tiny.base(kind))
    with pytest.raises(ValueError, match=r"output_attentions is not supported.*eager"):
        model(**batch(), output_attentions=True)


def test_a_mask_of_pairs() -> None:
    inputs = batch()
    allowed = torch.rand(3, 1, 18, 18, generator=torch.Generator().manual_seed(2)) < 0.6
    allowed = allowed | torch.eye(18, dtype=torch.bool)
    model = tiny.base()
    whole = {"input_ids": inputs["input_ids"], "attention_mask": allowed}
    expected = model(**whole).last_hidden_state
    model.set_attn_implementation("sparsebert")
    close(model(**whole).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"attention_mask: .*takes \[B, S\].* got torch.float32"):
        model(input_ids=inputs["input_ids"], attention_mask=allowed.float())


def test_a_decoder_is_causal_still() -> None:
    config = tiny.config()
    config.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertLMHeadModel._from_config(config, attn_implementation="sdpa").eval()
    expected = model(**batch()).logits
    model.set_attn_implementation("sparsebert")
    kept = batch()["attention_mask"].bool()
    close(model(**batch()).logits[kept], expected[kept])
    with pytest.raises(ValueError, match="1 queries and"):
        use_attention(model, WINDOW).generate(input_ids=batch()["input_ids"][:, :3], max_new_tokens=2, do_sample=False)


def test_evaluating_before_training_and_copies() -> None:
    model = use_attention(tiny.base(), WINDOW, attention_dropout=0.0)
    with torch.inference_mode():
        hidden(model, batch())
    other = copy.deepcopy(model)
    other.train()
    other(**batch()).last_hidden_state.sum().backward()


def test_whole_models_with_a_head(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = model(**batch()).logits
    close(use_attention(model)(**batch()).logits, expected)


def test_compiled_in_one_graph() -> None:
    layer = use_attention(tiny.base(), WINDOW).encoder.layer[0].attention.self
    x, mask = torch.randn(3, 18, 16), batch()["attention_mask"].bool()[:, None, None]
    expected = layer(x, mask)[0]
    close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, mask)[0], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: use_attention(nn.Linear(4, 4)), "model: found no self-attention of transformers in Linear"),
        (lambda m: use_attention(m, [None]), "pattern: expected one, or one for each of 2 layers, got 1"),
        (lambda m: use_attention(m, attention_dropout=0.1), "attention_dropout: expected 0.0 or None, got 0.1"),
        (lambda m: use_attention(m, {"pattern": "slidng_window"}), "slidng_window.*did you mean 'sliding_window'"),
        (lambda m: use_attention(m, {"window": 3}), "unknown attention pattern None"),
        (lambda m: use_attention(m, {**WINDOW, "widow": 3})(**batch()), "attention pattern 'sliding_window'.*widow"),
        (lambda m: use_attention(m, 7), "pattern: expected BlockLists, a function"),
        (lambda m: use_attention(m, lambda n: n)(**batch()), "pattern: expected it to give BlockLists, got int"),
        (lambda m: use_attention(m, lambda n: strided(9, 2))(**batch()), "pattern: expected lists for 18 tokens"),
        (
            lambda m: use_attention(m, sliding_window(9, 3))(**batch()),
            "pattern: the lists are for 9 tokens at most, got 18",
        ),
        (
            lambda m: use_attention(m, functools.partial(random, density=0.5, heads=3))(**batch()),
            "for 1 or 4 heads, got 3",
        ),
    ],
)
def test_what_cannot_be_is_named(call: Callable[[PreTrainedModel], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny.base())


def test_lists_are_made_once_for_a_length() -> None:
    made = []

    def pattern(length: int) -> BlockLists:
        made.append(length)
        return sliding_window(length, 3, block=(16, 16))

    model = use_attention(tiny.base(), pattern)
    for length in (9, 18, 9):
        hidden(model, batch(length))
    assert made == [9, 18]
    blocks = PatternBlocks(pattern)
    assert blocks.get(5, 5) is blocks.get(5, 5)


def qkv(length: int = 40, width: int = 64) -> tuple[Tensor, ...]:
    return torch.randn(3, 2, length, width, generator=torch.Generator().manual_seed(0)).unbind(0)


def test_the_module_is_attention_of_every_head() -> None:
    q, k, v = qkv()
    kept = torch.arange(40) < torch.tensor([[40], [25]])
    module = BlockSparseAttention(functools.partial(sliding_window, window=9, block=(16, 16)), heads=2)
    mask = sliding_window(40, 9).to_mask() & kept[:, None, None]
    mask = mask | ~kept[:, None, :, None]  # rows of padding: anything
    cut = [x.unflatten(-1, (2, 32)).transpose(1, 2) for x in (q, k, v)]
    expected = nn.functional.scaled_dot_product_attention(*cut, attn_mask=mask).transpose(1, 2).flatten(2)
    close(module(q, k, v, kept)[kept], expected[kept])
    starts = torch.tensor([0, 40, 65], dtype=torch.int32)
    close(module(*(x[kept] for x in (q, k, v)), cu_seqlens=starts), expected[kept])
    assert "heads=2" in repr(module) and "sliding_window" in repr(module)


def test_the_module_refuses_by_name() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"query: expected \[B, S, width\] and a width that 3 heads divide"):
        BlockSparseAttention(None, 3)(q, k, v)
    with pytest.raises(ValueError, match="heads: expected at least 1"):
        BlockSparseAttention(None, 0)
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 64, got 3"):
        BlockSparseSelfAttention(64, 3)
    with pytest.raises(ValueError, match=r"layer.dropout: expected 0"):
        BlockSparseSelfAttention.from_multihead(nn.MultiheadAttention(64, 2, dropout=0.1))
    with pytest.raises(ValueError, match="layer: expected self-attention"):
        BlockSparseSelfAttention.from_multihead(nn.MultiheadAttention(64, 2, kdim=32))


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_of_a_torch_layer(bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 2, bias=bias, batch_first=True)
    x, kept = qkv()[0], torch.arange(40) < torch.tensor([[40], [25]])
    mask = sliding_window(40, 9).to_mask()[0, 0]
    expected, _ = theirs(x, x, x, key_padding_mask=~kept, attn_mask=~mask, need_weights=False)
    ours = BlockSparseSelfAttention.from_multihead(theirs, sliding_window(40, 9))
    close(ours(x, kept)[kept], expected[kept])
    ours(x, kept).sum().backward()
    assert all(part.grad is not None for part in ours.parameters())
    assert set(ours.state_dict()) == {
        f"{part}.{kind}" for part in ("query", "key", "value", "output") for kind in ("weight", "bias")[: 1 + bias]
    }
