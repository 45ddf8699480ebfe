"""Running BERT, RoBERTa and DistilBERT on the real tokens alone.

Padding is taken out once before the encoder and put back once behind it. In between every linear works on
`[tokens, H]`, attention goes by sequence (`varlen_attention`), and what stands between two linears runs in one pass
each (`add_layer_norm`; the feed-forward activation inside the linear where that can apply one). Unpadding once is
what pays: NVIDIA's FasterTransformer ("effective transformer") and ModernBERT (Warner et al., 2024) do the same.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions

from sparsebert.errors import UserError
from sparsebert.models.prunable import LAYOUTS
from sparsebert.ops import add_layer_norm, varlen_attention

__all__ = ["is_padding_free", "padding_free"]


def padding_free(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let the BERTs, RoBERTas and DistilBERTs inside `model` skip padding, in place.

    Only `forward` of each base model is replaced: parameters and the names in the state dict stay as they are, and
    modules may be replaced before or after. `last_hidden_state` and `hidden_states` are the ordinary ones at real
    tokens and 0 at padding. A token is real where the attention mask is not 0; without a mask all are. The padding may
    be on any side, between tokens too, and a row may be all padding. In training mode the ordinary path runs, dropout
    and all. Forward hooks on whole encoder layers do not fire; those on linears do.

    Where the linear before the feed-forward activation has a word `activation` ("none"), as `SparseLinear` does, it is
    set to the activation's, so that both run in one pass. Call again after replacing linears for that.

    Under `torch.compile` the graph breaks where the real tokens are counted; without a mask it is in one piece.

    Args:
        model: such a base model, or any module that holds one (`TaskModel`, `BertForSequenceClassification`, ...).
        enabled: False brings back the ordinary forward.

    Returns:
        `model`.

    Raises:
        TypeError: not a module. UserError: there is no such base model in it, or one that is a decoder, has
            cross-attention or relative positions, or has had its forward replaced by something else.

    The forward then raises a ValueError for `output_attentions=True` (the probabilities are never stored), a mask that
    is not `[batch, seq]`, and a decoder's arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    bases = [(module, family) for module in model.modules() if (family := _family(module)) is not None]
    if not bases:
        raise UserError(
            f"model: expected a {', '.join(_FAMILIES)} model from transformers or a module that holds one, "
            f"got {type(model).__name__}"
        )
    for base, _ in bases:
        _check(base)
    for base, family in bases:
        (_enable if enabled else _disable)(base, family)
    return model


def is_padding_free(base: nn.Module) -> bool:
    """Whether `padding_free` is in force for this base model."""
    return isinstance(base.__dict__.get("forward"), types.MethodType) and hasattr(base.forward, _MARK)


@dataclass(frozen=True)
class Parts:
    """What one encoder layer is made of."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_norm: nn.Module
    ffn_in: nn.Module
    activation: Callable[[Tensor], Tensor]
    ffn_out: nn.Module
    ffn_norm: nn.Module
    head_size: int
    scale: float


def _bert_parts(layer: Any) -> Parts:
    attention, inner, output = layer.attention, layer.intermediate, layer.output
    heads = attention.self
    return Parts(
        *(heads.query, heads.key, heads.value, attention.output.dense, attention.output.LayerNorm),
        *(inner.dense, inner.intermediate_act_fn, output.dense, output.LayerNorm),
        *(heads.attention_head_size, heads.scaling),
    )


def _distilbert_parts(layer: Any) -> Parts:
    heads, inner = layer.attention, layer.ffn
    return Parts(
        *(heads.q_lin, heads.k_lin, heads.v_lin, heads.out_lin, layer.sa_layer_norm),
        *(inner.lin1, inner.activation, inner.lin2, layer.output_layer_norm),
        *(heads.attention_head_size, heads.scaling),
    )


@dataclass(frozen=True)
class Family:
    """How a kind of model is built, beyond its `Layout`."""

    parts: Callable[[Any], Parts]
    inner: str
    """Name, in a layer, of the module that holds the feed-forward activation."""
    ffn_in: str
    """Name of the linear in there."""
    activation: str
    """Name of the activation in there."""
    arguments: tuple[str, ...]
    """The forward's arguments by position."""
    embedded: tuple[str, ...]
    """Those of them that the embeddings take."""


_BERT = Family(
    _bert_parts,
    "intermediate",
    "dense",
    "intermediate_act_fn",
    (
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache"),
    ),
    ("input_ids", "token_type_ids", "position_ids", "inputs_embeds"),
)
_DISTILBERT = Family(
    _distilbert_parts,
    "ffn",
    "lin1",
    "activation",
    ("input_ids", "attention_mask", "inputs_embeds", "position_ids"),
    ("input_ids", "inputs_embeds", "position_ids"),
)
_FAMILIES = {"bert": _BERT, "roberta": _BERT, "distilbert": _DISTILBERT}
_MARK = "_sparsebert_padding_free"
_REFUSED = {
    "output_attentions": "attention probabilities are never stored",
    "encoder_hidden_states": "there is no cross-attention",
    "encoder_attention_mask": "there is no cross-attention",
    "past_key_values": "there is no cache",
    "is_causal": "every token attends to all of its sequence",
}
# The words of the linears that apply an activation themselves, by the class of the module that it replaces. By name:
# some of these classes have moved or been renamed between versions of transformers.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "Tanh": "tanh",
}


def _family(module: nn.Module) -> Family | None:
    """The family of a base model; None for any other module, a task model on top of one included."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind not in _FAMILIES or not isinstance(getattr(module, "embeddings", None), nn.Module):
        return None
    stack = LAYOUTS[kind].layers.split(".")[0]
    return _FAMILIES[kind] if isinstance(getattr(module, stack, None), nn.Module) else None


def _layers(base: nn.Module) -> nn.ModuleList:
    return base.get_submodule(LAYOUTS[base.config.model_type].layers)  # type: ignore[union-attr, index, return-value]


def _check(base: nn.Module) -> None:
    config: Any = base.config
    kind = f"this {config.model_type} model"
    if getattr(config, "is_decoder", False) or getattr(config, "is_causal", None):
        raise UserError(
            f"model: {kind} is a decoder; only encoders, whose tokens all see each other, can be padding-free"
        )
    if getattr(config, "add_cross_attention", False):
        raise UserError(f"model: {kind} has cross-attention, which has no padding-free form here")
    positions = getattr(config, "position_embedding_type", None)
    if positions not in (None, "absolute"):
        raise UserError(f"model: {kind} has {positions!r} positions; only absolute ones are supported")
    if "forward" in base.__dict__ and not is_padding_free(base):
        raise UserError(f"model: the forward of {kind} has been replaced already; undo that first")


def _enable(base: nn.Module, family: Family) -> None:
    ordinary = type(base).forward

    @functools.wraps(ordinary)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            return ordinary(self, *args, **kwargs)
        given = dict(zip(family.arguments, args, strict=False)) | kwargs
        return _forward(self, family, given)

    setattr(forward, _MARK, True)
    # Bound to the model, so that a deep copy of the model is bound to the copy.
    base.forward = types.MethodType(forward, base)
    for layer in _layers(base):
        _fuse(layer.get_submodule(family.inner), family)


def _disable(base: nn.Module, family: Family) -> None:
    base.__dict__.pop("forward", None)
    for layer in _layers(base):
        inner: Any = layer.get_submodule(family.inner)
        activation = getattr(inner, family.activation)
        if isinstance(activation, UnlessFused):
            setattr(inner, family.activation, activation.activation)
            linear = getattr(inner, family.ffn_in)
            if getattr(linear, "activation", None) == activation.word:
                linear.activation = "none"


class UnlessFused(nn.Module):
    """An activation that is left out where the linear before it has applied it: right for whichever linear is there.

    Args:
        activation: the module; it has no parameters.
        word: what a linear calls it.
        inner: the module that holds both.
        name: of the linear in there.
    """

    def __init__(self, activation: nn.Module, word: str, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.activation = activation
        self.word = word
        self.name = name
        # Past nn.Module, which would make the holder a child of its own child.
        object.__setattr__(self, "inner", inner)

    def forward(self, x: Tensor) -> Tensor:
        """`x` as it is, or activated."""
        fused = getattr(getattr(self.inner, self.name), "activation", None) == self.word
        return x if fused else self.activation(x)


def _fuse(inner: Any, family: Family) -> None:
    linear, activation = getattr(inner, family.ffn_in), getattr(inner, family.activation)
    wrapped = isinstance(activation, UnlessFused)
    word = activation.word if wrapped else _ACTIVATIONS.get(type(activation).__name__)
    if word is None or getattr(linear, "activation", None) != "none":
        return
    if not wrapped:
        setattr(inner, family.activation, UnlessFused(activation, word, inner, family.ffn_in))
    linear.activation = word


def _forward(base: Any, family: Family, given: dict[str, Any]) -> Any:
    """The forward of a base model in eval mode, its arguments by name."""
    for name, why in _REFUSED.items():
        if given.get(name) is not None and given[name] is not False:
            raise ValueError(f"{name}: a padding-free model does not take it ({why}); see padding_free(enabled=False)")
    if getattr(base.config, "output_attentions", False) and given.get("output_attentions") is None:
        raise ValueError("config.output_attentions: a padding-free model never stores attention probabilities")
    if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
        raise ValueError("input_ids, inputs_embeds: expected exactly one of the two")
    # DistilBERT's embeddings want input_ids even where there are none.
    wanted = {name: given[name] for name in family.embedded if given.get(name) is not None}
    embedded = base.embeddings(**({"input_ids": None} | wanted))
    padding = Padding(embedded, given.get("attention_mask"))
    layers = _layers(base)
    asked = given.get("output_hidden_states", getattr(base.config, "output_hidden_states", False))
    keep = _kept_states(asked, len(layers) + 1)
    x = padding.remove(embedded)
    states = [padding.restore(x) if 0 in keep else None]
    for index, layer in enumerate(layers, start=1):
        x = _run_layer(family.parts(layer), x, padding.cu_seqlens)
        states.append(padding.restore(x) if index in keep and index < len(layers) else None)
    last = padding.restore(x)
    if len(layers) in keep:
        states[-1] = last
    return _output(base, last, tuple(states) if keep else None, given.get("return_dict"))


def _kept_states(asked: bool | int | Sequence[int] | None, count: int) -> set[int]:
    """Which of the hidden states are wanted: all, none, or those with the given numbers, negative ones from the end."""
    if asked is None or isinstance(asked, bool):
        return set(range(count)) if asked else set()
    numbers = [asked] if isinstance(asked, int) else list(asked)
    return {number % count for number in numbers if -count <= number < count}


def _output(base: Any, last: Tensor, states: tuple[Tensor | None, ...] | None, return_dict: bool | None) -> Any:
    kind: Any = BaseModelOutput
    extra: dict[str, Any] = {}
    if base.config.model_type != "distilbert":
        kind = BaseModelOutputWithPoolingAndCrossAttentions
        extra["pooler_output"] = base.pooler(last) if base.pooler is not None else None
    output = kind(last_hidden_state=last, hidden_states=states, **extra)
    if return_dict is None:
        return_dict = getattr(base.config, "return_dict", True)
    return output if return_dict else output.to_tuple()


class Padding:
    """Which tokens of a batch are real, and the way between `[batch, seq, H]` and `[tokens, H]`.

    Args:
        embedded: `[batch, seq, H]`.
        mask: `[batch, seq]`, 0 at padding, any dtype; None where there is no padding.
    """

    def __init__(self, embedded: Tensor, mask: Tensor | None) -> None:
        self.shape = embedded.shape
        batch, length = self.shape[:2]
        self.index: Tensor | None = None
        if mask is not None:
            if mask.shape != self.shape[:2]:
                raise ValueError(f"attention_mask: expected [{batch}, {length}], got {list(mask.shape)}")
            real = mask.to(device=embedded.device, dtype=torch.bool)
            # The only thing of a forward that a GPU is waited for: how many tokens are real.
            index = real.reshape(-1).nonzero().squeeze(1)
            if index.shape[0] != real.numel():
                self.index = index
                self.cu_seqlens = nn.functional.pad(real.sum(1).cumsum(0), (1, 0))
                return
        self.cu_seqlens = torch.arange(batch + 1, device=embedded.device) * length

    def remove(self, x: Tensor) -> Tensor:
        """`[batch, seq, H]` to `[tokens, H]`."""
        rows = x.reshape(-1, self.shape[2])
        return rows if self.index is None else rows.index_select(0, self.index)

    def restore(self, x: Tensor) -> Tensor:
        """`[tokens, H]` to `[batch, seq, H]`, 0 at padding."""
        if self.index is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1]).index_copy_(0, self.index, x)
        return x.view(self.shape[0], self.shape[1], x.shape[1])


def _run_layer(parts: Parts, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One encoder layer on `[tokens, H]`."""
    heads = (-1, parts.head_size)
    q, k, v = (linear(x).unflatten(-1, heads) for linear in (parts.query, parts.key, parts.value))
    mixed = varlen_attention(q, k, v, cu_seqlens, scale=parts.scale).flatten(1)
    x = _add_norm(parts.attention_norm, parts.attention_output(mixed), x)
    return _add_norm(parts.ffn_norm, parts.ffn_out(parts.activation(parts.ffn_in(x))), x)


def _add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    if type(norm) is not nn.LayerNorm or norm.bias is None or norm.weight is None or norm.weight.dim() != 1:
        return norm(x + residual)
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
