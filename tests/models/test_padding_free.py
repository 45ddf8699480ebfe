from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel, PreTrainedModel

from sparsebert.errors import UserError
from sparsebert.models.padding_free import is_padding_free, padding_free
from sparsebert.models.task_model import TaskModel

KINDS = pytest.mark.parametrize("kind", tiny.KINDS)
MODELS = {kind: tiny.base(kind) for kind in tiny.KINDS}


def masks() -> st.SearchStrategy[Tensor]:
    """Any pattern of real tokens, rows without any included."""

    def shaped(size: tuple[int, int]) -> st.SearchStrategy[Tensor]:
        row = st.lists(st.integers(0, 1), min_size=size[1], max_size=size[1])
        return st.lists(row, min_size=size[0], max_size=size[0]).map(torch.tensor)

    return st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(shaped)


def ragged() -> Tensor:
    """Right, left and inner padding, a full row and an empty one."""
    mask = torch.ones(5, 9, dtype=torch.int64)
    mask[0, 4:] = mask[1, :3] = mask[2, 3:6] = mask[4] = 0
    return mask


def tokens(shape: torch.Size, seed: int = 0) -> Tensor:
    return torch.randint(5, 24, tuple(shape), generator=torch.Generator().manual_seed(seed))


def both(model: nn.Module, **inputs: Any) -> tuple[Any, Any]:
    """The output of the ordinary and of the padding-free model."""
    with torch.inference_mode():
        padding_free(model, enabled=False)
        ordinary = model(**inputs)
        return ordinary, padding_free(model)(**inputs)


def same(ordinary: Tensor, skipped: Tensor, mask: Tensor, tolerance: float = 1e-5) -> None:
    """Equal at real tokens, 0 at the others."""
    real = mask.bool()
    assert ordinary.shape == skipped.shape and ordinary.dtype == skipped.dtype
    torch.testing.assert_close(skipped[real], ordinary[real], rtol=tolerance, atol=tolerance)
    assert (skipped[~real] == 0).all()


@KINDS
@given(mask=masks(), seed=st.integers(0, 99))
def test_equals_the_ordinary_model_at_real_tokens(kind: str, mask: Tensor, seed: int) -> None:
    ordinary, skipped = both(MODELS[kind], input_ids=tokens(mask.shape, seed), attention_mask=mask)
    same(ordinary.last_hidden_state, skipped.last_hidden_state, mask)
    if kind != "distilbert" and bool(mask[:, 0].all()):
        torch.testing.assert_close(skipped.pooler_output, ordinary.pooler_output, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masks_of_any_dtype_and_none(kind: str, dtype: torch.dtype) -> None:
    model, mask = MODELS[kind], ragged()
    for given_mask in (mask.to(dtype), torch.ones_like(mask).to(dtype), None):
        real = torch.ones_like(mask) if given_mask is None else given_mask
        ordinary, skipped = both(model, input_ids=tokens(mask.shape), attention_mask=given_mask)
        same(ordinary.last_hidden_state, skipped.last_hidden_state, real)


@KINDS
def test_hidden_states(kind: str) -> None:
    mask = ragged()
    inputs: dict[str, Any] = {"input_ids": tokens(mask.shape), "attention_mask": mask}
    ordinary, skipped = both(MODELS[kind], **inputs, output_hidden_states=True)
    assert len(ordinary.hidden_states) == len(skipped.hidden_states) == 3
    for a, b in zip(ordinary.hidden_states, skipped.hidden_states, strict=True):
        same(a, b, mask)
    assert skipped.hidden_states[-1] is skipped.last_hidden_state
    assert both(MODELS[kind], **inputs)[1].hidden_states is None
    some = padding_free(MODELS[kind])(**inputs, output_hidden_states=[0, -1]).hidden_states
    assert some[1] is None
    torch.testing.assert_close(some[2], skipped.hidden_states[2])
    torch.testing.assert_close(some[0], skipped.hidden_states[0])


@KINDS
def test_the_configuration_may_ask_for_states_and_tuples(kind: str) -> None:
    model, mask = tiny.base(kind), ragged()
    inputs = {"input_ids": tokens(mask.shape), "attention_mask": mask}
    model.config.output_hidden_states = True
    ordinary, skipped = both(model, **inputs, return_dict=False)
    assert isinstance(skipped, tuple) and len(skipped) == len(ordinary)
    same(ordinary[0], skipped[0], mask)
    same(ordinary[-1][1], skipped[-1][1], mask)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_token_types_positions_and_embeddings(kind: str) -> None:
    model, mask = MODELS[kind], ragged()
    ids = tokens(mask.shape)
    extra = {"token_type_ids": torch.arange(9).expand(5, 9) // 5, "position_ids": torch.arange(9).flip(0)[None]}
    ordinary, skipped = both(model, input_ids=ids, attention_mask=mask, **extra)
    same(ordinary.last_hidden_state, skipped.last_hidden_state, mask)
    plain, _ = both(model, input_ids=ids, attention_mask=mask)
    assert not torch.allclose(plain.last_hidden_state, ordinary.last_hidden_state)


@KINDS
def test_embeddings_instead_of_tokens(kind: str) -> None:
    model, mask = MODELS[kind], ragged()
    embeds = torch.randn(5, 9, 16)
    ordinary, skipped = both(model, inputs_embeds=embeds, attention_mask=mask)
    same(ordinary.last_hidden_state, skipped.last_hidden_state, mask)
    with torch.inference_mode():
        words = model(tokens(mask.shape), mask).last_hidden_state
        assert torch.equal(words, model(input_ids=tokens(mask.shape), attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize("head", ["mlp", "linear"])
@KINDS
def test_task_models(kind: str, head: str) -> None:
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 3:] = mask[1, 6:] = 0
    for task, pooling in (("classification", "cls"), ("regression", "mean"), ("span", "cls")):
        model = TaskModel(tiny.base(kind), task, 3, head=head, pooling=pooling, head_width=8, seed=0).eval()
        ordinary, skipped = both(model, input_ids=tokens(mask.shape), attention_mask=mask)
        for name, value in ordinary.items():
            torch.testing.assert_close(skipped[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [BertForSequenceClassification, BertForTokenClassification])
def test_models_of_transformers_that_hold_one(whole: type[PreTrainedModel]) -> None:
    model, mask = whole(tiny.config("bert")).eval(), ragged()[:4]
    mask[:, 0] = 1
    inputs = {"input_ids": tokens(mask.shape), "attention_mask": mask, "output_hidden_states": True}
    ordinary, skipped = both(model, **inputs)
    real = mask.bool() if whole is BertForTokenClassification else slice(None)
    torch.testing.assert_close(skipped.logits[real], ordinary.logits[real], rtol=1e-5, atol=1e-5)
    assert len(skipped.hidden_states) == 3


class Replaced(nn.Module):
    """A linear of another make, which applies an activation itself if told to."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.activation = "none"
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        y = F.linear(x, self.weight, self.bias)
        words: dict[str, Any] = {
            "none": lambda y: y,
            "gelu": F.gelu,
            "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
            "relu": torch.relu,
            "tanh": torch.tanh,
        }
        return words[self.activation](y)


def replace(model: nn.Module) -> list[Replaced]:
    found = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            found.append(Replaced(module))
            setattr(model.get_submodule(parent), child, found[-1])
    return found


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
    "silu": "none",
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@KINDS
def test_linears_of_another_make_apply_the_activation(kind: str, activation: str) -> None:
    config, mask = tiny.config(kind), ragged()
    setattr(config, "activation" if kind == "distilbert" else "hidden_act", activation)
    model = type(MODELS[kind])(config).eval()
    inputs = {"input_ids": tokens(mask.shape), "attention_mask": mask}
    names = list(model.state_dict())
    with torch.inference_mode():
        ordinary = model(**inputs).last_hidden_state
        linears = replace(model)
        skipped = padding_free(model)(**inputs).last_hidden_state
        same(ordinary, skipped, mask)
        inner = [linear for linear in linears if linear.weight.shape == (32, 16)]
        assert [linear.activation for linear in inner] == [ACTIVATIONS[activation]] * 2
        assert all(linear.activation == "none" for linear in linears if linear not in inner)
        # All but the pooler's linear, the last one, see the real tokens and nothing else.
        assert all(len(linear.shapes) == 1 and linear.shapes[0][0] == int(mask.sum()) for linear in linears[:12])
        # The ordinary path with the fused linears, as training takes it, applies the activation once too.
        torch.testing.assert_close(type(model).forward(model, **inputs).last_hidden_state, ordinary)
        padding_free(model, enabled=False)
        assert all(linear.activation == "none" for linear in linears)
        assert torch.equal(model(**inputs).last_hidden_state, ordinary)
        assert list(model.state_dict()) == names


@KINDS
def test_linears_replaced_later_and_put_back(kind: str) -> None:
    model, mask = padding_free(tiny.base(kind)), ragged()
    inputs = {"input_ids": tokens(mask.shape), "attention_mask": mask}
    with torch.inference_mode():
        first = model(**inputs).last_hidden_state
        replaced = copy.deepcopy(model)
        linears = replace(replaced)
        torch.testing.assert_close(replaced(**inputs).last_hidden_state, first)
        padding_free(replaced)
        assert any(linear.activation == "gelu" for linear in linears)
        torch.testing.assert_close(replaced(**inputs).last_hidden_state, first)
        torch.testing.assert_close(copy.deepcopy(replaced)(**inputs).last_hidden_state, first)
        # Ordinary linears come back without a word: the activation must not be lost.
        plain = dict(model.named_modules())
        for name, module in list(replaced.named_modules()):
            if isinstance(module, Replaced):
                parent, _, child = name.rpartition(".")
                setattr(replaced.get_submodule(parent), child, plain[name])
        torch.testing.assert_close(replaced(**inputs).last_hidden_state, first)


def test_hooks_on_linears_and_other_norms() -> None:
    class RootMeanSquare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.square().mean(-1, keepdim=True).rsqrt()

    model, mask = tiny.base("bert"), ragged()
    for layer in model.encoder.layer:
        layer.output.LayerNorm = RootMeanSquare()
        layer.attention.output.dense.register_forward_hook(lambda module, inputs, output: output * 2)
    ordinary, skipped = both(model, input_ids=tokens(mask.shape), attention_mask=mask)
    same(ordinary.last_hidden_state, skipped.last_hidden_state, mask)


def test_fewer_heads_than_configured() -> None:
    model, mask = tiny.base("bert"), ragged()
    heads = model.encoder.layer[1].attention.self
    for name in ("query", "key", "value"):
        linear = getattr(heads, name)
        linear.weight, linear.bias = nn.Parameter(linear.weight[4:12]), nn.Parameter(linear.bias[4:12])
    output = model.encoder.layer[1].attention.output.dense
    output.weight = nn.Parameter(output.weight[:, 4:12])
    ordinary, skipped = both(model, input_ids=tokens(mask.shape), attention_mask=mask)
    same(ordinary.last_hidden_state, skipped.last_hidden_state, mask)


@KINDS
def test_on_and_off_and_copies(kind: str) -> None:
    model = tiny.base(kind)
    state, modules = model.state_dict(), [name for name, _ in model.named_modules()]
    signature = inspect.signature(model.forward)
    assert not is_padding_free(model)
    assert padding_free(padding_free(model)) is model and is_padding_free(model)
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == list(state) and [name for name, _ in model.named_modules()] == modules
    twin = copy.deepcopy(model)
    assert is_padding_free(twin) and twin.forward.__self__ is twin
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        ids = tokens(torch.Size((2, 5)))
        assert (twin(ids).last_hidden_state == 0).all() and (model(ids).last_hidden_state != 0).any()
    padding_free(model, enabled=False)
    assert not is_padding_free(model) and "forward" not in model.__dict__
    padding_free(model, enabled=False)


@KINDS
def test_training_takes_the_ordinary_path(kind: str) -> None:
    model, mask = tiny.base(kind).train(), ragged()
    inputs = {"input_ids": tokens(mask.shape), "attention_mask": mask}
    results = []
    for enabled in (False, True):
        padding_free(model, enabled)
        torch.manual_seed(0)
        results.append(model(**inputs).last_hidden_state)
    assert torch.equal(*results)
    torch.manual_seed(1)
    assert not torch.equal(model(**inputs).last_hidden_state, results[0])


@KINDS
def test_gradients_in_eval_mode(kind: str) -> None:
    model, mask = tiny.base(kind), ragged()
    weights = {name: parameter for name, parameter in model.named_parameters() if "pooler" not in name}
    above, results = torch.randn(5, 9, 16) * mask[:, :, None], []
    for enabled in (False, True):
        out = padding_free(model, enabled)(input_ids=tokens(mask.shape), attention_mask=mask).last_hidden_state
        # Ordinary rows without a token attend to something all the same; they do not count here.
        results.append(torch.autograd.grad((out * above).sum(), list(weights.values()), allow_unused=True))
    for name, ordinary, skipped in zip(weights, *results, strict=True):
        assert torch.allclose(skipped, ordinary, rtol=1e-4, atol=1e-4), name


@KINDS
def test_bfloat16_and_autocast(kind: str) -> None:
    mask = ragged()
    inputs = {"input_ids": tokens(mask.shape), "attention_mask": mask}
    with torch.inference_mode():
        exact = tiny.base(kind)(**inputs).last_hidden_state[mask.bool()]
        ordinary, skipped = both(tiny.base(kind).bfloat16(), **inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, cast = both(tiny.base(kind), **inputs)
    error = (ordinary.last_hidden_state[mask.bool()].float() - exact).abs().mean()
    for output in (skipped, cast):
        assert (output.last_hidden_state[mask.bool()].float() - exact).abs().mean() <= 1.5 * error
    assert skipped.last_hidden_state.dtype == torch.bfloat16


def test_empty_batches() -> None:
    model = padding_free(MODELS["bert"])
    with torch.inference_mode():
        for shape in ((2, 3), (1, 1)):
            mask = torch.zeros(shape, dtype=torch.int64)
            out = model(input_ids=tokens(mask.shape), attention_mask=mask)
            assert out.last_hidden_state.shape == (*shape, 16) and (out.last_hidden_state == 0).all()
        assert model(input_ids=tokens(torch.Size((0, 4)))).last_hidden_state.shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_attentions": True}, "output_attentions: a padding-free model does not take it"),
        ({"encoder_hidden_states": torch.zeros(2, 4, 16)}, "encoder_hidden_states: a padding-free model"),
        ({"past_key_values": object()}, "past_key_values: a padding-free model"),
        ({"is_causal": True}, "is_causal: a padding-free model"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask: expected \[2, 4\], got \[2, 1, 4, 4\]"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask: expected \[2, 4\], got \[2, 5\]"),
        ({"inputs_embeds": torch.zeros(2, 4, 16)}, "input_ids, inputs_embeds: expected exactly one"),
        ({"input_ids": None}, "input_ids, inputs_embeds: expected exactly one"),
    ],
)
def test_what_it_does_not_take_is_named(change: dict[str, Any], message: str) -> None:
    model = padding_free(MODELS["bert"])
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": tokens(torch.Size((2, 4))), **change})


def test_attentions_asked_for_by_the_configuration() -> None:
    model = padding_free(BertModel(tiny.config("bert")).eval())
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=tokens(torch.Size((2, 4))))


def test_models_that_cannot_be_padding_free_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        padding_free("bert")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model: expected a bert, roberta, distilbert model.*got Linear"):
        padding_free(nn.Linear(2, 2))
    for change, message in (
        ({"is_decoder": True}, "is a decoder"),
        ({"add_cross_attention": True}, "has cross-attention"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' positions"),
    ):
        model = BertModel(tiny.config("bert"))
        for name, value in change.items():
            setattr(model.config, name, value)
        with pytest.raises(UserError, match=message):
            padding_free(model)
        assert not is_padding_free(model)
    model = BertModel(tiny.config("bert"))
    model.forward = lambda **kwargs: None
    with pytest.raises(UserError, match="has been replaced already"):
        padding_free(model)


def test_without_padding_it_compiles_in_one_piece() -> None:
    model = padding_free(tiny.base("bert"))
    ids = torch.tensor([[2, 5, 9, 13, 3]])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).last_hidden_state, model(ids).last_hidden_state)
