"""Uneven widths: pruned heads and neurons taken out of an encoder, written down as transformers' `per_layer_config`.

transformers 5 describes layers of different widths in `config.per_layer_config`, a mapping from a layer's number to
the attributes in which it differs. Its BERT, RoBERTa and DistilBERT do not read that: their half of it is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sparsebert.errors import UserError, unknown
from sparsebert.models.prunable import LAYOUTS, Layout, heads_of
from sparsebert.nn.masked import MaskedLinear
from sparsebert.nn.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["build_uneven", "remove_structure", "widths_of", "write_widths"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Family:
    """What a kind of model calls its widths, and where they stand beside its linears."""

    heads: str
    """In the configuration."""
    neurons: str
    activation: str
    """The module, in a layer, between the two linears of the feed-forward block."""


_BERT = _Family("num_attention_heads", "intermediate_size", "intermediate.intermediate_act_fn")
_FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _Family("n_heads", "hidden_dim", "ffn.activation"),
}
if set(_FAMILIES) != set(LAYOUTS):
    raise RuntimeError("every kind of model needs its names in sparsebert/models/per_layer.py")


@torch.no_grad()
def remove_structure(model: Model) -> Model:
    """Take the attention heads and the neurons that are wholly pruned out of every encoder in `model`, in place.

    A head goes where its rows of `value`, or its columns of the attention's output, are all zero; a neuron where its
    row of the first linear of the feed-forward block, or its column of the second, is. What a zero row still passed on
    is a constant (the head's bias; the activation of the neuron's) and is added to the bias behind. One head and one
    neuron a layer are always kept. The output is that of the model before, up to rounding.

    Every encoder's configuration then has the widths in the standard `per_layer_config` (or in the ordinary field,
    where all layers have equally many neurons), and `head_dim`, which can no longer be worked out from them.
    `save_pretrained` writes a plain dense checkpoint; `AutoSparseModel.from_pretrained` loads it, while the
    `from_pretrained` of transformers cannot build uneven BERTs.

    Args:
        model: a BERT, RoBERTa or DistilBERT with any head, or a module that holds one (`TaskModel`); ordinary linears,
            pruned weights zero.

    Returns:
        `model`. Without anything to remove it is as it was.

    Raises:
        TypeError: not a module. UserError: no such encoder in it, or linears that were replaced already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    encoders = [module for module in model.modules() if _is_encoder(module)]
    if not encoders:
        raise UserError(
            f"model: expected a {', '.join(_FAMILIES)} model or a module that holds one, got {type(model).__name__}"
        )
    for encoder in encoders:
        for index in range(len(_layers(encoder))):
            for name in _linears(encoder, index):
                _check_plain(encoder, index, name)
    for encoder in encoders:
        for index in range(len(_layers(encoder))):
            _shrink_heads(encoder, index)
            _shrink_neurons(encoder, index)
        write_widths(encoder)
    return model


def widths_of(encoder: PreTrainedModel) -> list[tuple[int, int]]:
    """`(heads, neurons)` of every layer of a base model, as its modules have them."""
    heads = enumerate(heads_of(encoder))
    return [(count, int(_linears(encoder, index)["ffn_in"].out_features)) for index, count in heads]


def build_uneven(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """`kind(config)`, with the widths of `config.per_layer_config` where it has any; on the current device.

    Raises:
        UserError: another kind of model; a `per_layer_config` with other attributes than heads and neurons, or with
            widths that are no positive numbers. Whatever the model's class raises passes.
    """
    if not config.is_heterogeneous:
        return kind(config)
    family = _FAMILIES.get(str(config.model_type))
    if family is None:
        raise unknown("model type", str(config.model_type), _FAMILIES)
    overrides = _overrides(config, family)
    # The layers are built even, then cut: their classes cannot read a width of their own.
    config.per_layer_config = None
    head_dim = int(config.hidden_size) // int(config.num_attention_heads)
    if getattr(config, "head_dim", head_dim) != head_dim:
        raise UserError(f"config.json: expected a head_dim of {head_dim}, got {config.head_dim!r}")
    try:
        model = kind(config)
    finally:
        config.per_layer_config = overrides
    encoder = next(module for module in model.modules() if _is_encoder(module))
    for index, given in overrides.items():
        if family.heads in given:
            _set_heads(encoder, int(index), given[family.heads], head_dim)
        if family.neurons in given:
            _set_neurons(encoder, int(index), given[family.neurons])
    return model


def _is_encoder(module: nn.Module) -> bool:
    """Whether it is a base model itself, not a task model on top of one."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind not in _FAMILIES or not isinstance(getattr(module, "embeddings", None), nn.Module):
        return False
    return isinstance(getattr(module, LAYOUTS[kind].layers.split(".")[0], None), nn.Module)


def _layers(encoder: Any) -> nn.ModuleList:
    return encoder.get_submodule(LAYOUTS[encoder.config.model_type].layers)


def _linears(encoder: Any, index: int) -> dict[str, Any]:
    """A layer's linears by component: query, key, value, attention_output, ffn_in, ffn_out."""
    layer = _layers(encoder)[index]
    return {component: layer.get_submodule(name) for component, name in LAYOUTS[encoder.config.model_type].linears}


def _check_plain(encoder: Any, index: int, component: str) -> None:
    linear = _linears(encoder, index)[component]
    if type(linear) is nn.Linear and not linear.weight.is_meta:
        return
    advice = "load its weights first"
    if isinstance(linear, SparseLinear):
        advice = "call remove_structure before sparsify"
    elif isinstance(linear, MaskedLinear):
        advice = "put its plain() in its place first"
    raise UserError(f"model: layer {index}: {component} is a {type(linear).__name__}, which cannot be cut; {advice}")


def _shrink_heads(encoder: Any, index: int) -> None:
    linears, layout = _linears(encoder, index), LAYOUTS[encoder.config.model_type]
    heads = heads_of(encoder)[index]
    value, output = linears["value"], linears["attention_output"]
    width = value.out_features // heads
    no_value = (value.weight == 0).view(heads, -1).all(1)
    gone = no_value | (output.weight == 0).view(output.out_features, heads, width).all(2).all(0)
    kept = _at_least_one(~gone)
    if bool(kept.all()):
        return
    # A softmax sums to 1: a head whose values are all its bias gives that bias.
    _add_constant(output, value.bias, (~kept & no_value).repeat_interleave(width))
    rows = kept.repeat_interleave(width).nonzero().squeeze(1)
    layer = _layers(encoder)[index]
    for component, name in layout.linears:
        if component in ("query", "key", "value"):
            _put(layer, name, _cut(linears[component], 0, rows))
        elif component == "attention_output":
            _put(layer, name, _cut(output, 1, rows))
    _note_heads(layer, layout, int(kept.sum()), width)


def _shrink_neurons(encoder: Any, index: int) -> None:
    linears, family = _linears(encoder, index), _FAMILIES[encoder.config.model_type]
    layer, first, second = _layers(encoder)[index], linears["ffn_in"], linears["ffn_out"]
    no_input = (first.weight == 0).all(1)
    kept = _at_least_one(~(no_input | (second.weight == 0).all(0)))
    if bool(kept.all()):
        return
    activation = layer.get_submodule(family.activation)
    bias = first.weight.new_zeros(first.out_features) if first.bias is None else first.bias
    _add_constant(second, activation(bias), ~kept & no_input)
    rows = kept.nonzero().squeeze(1)
    for component, name in LAYOUTS[encoder.config.model_type].linears:
        if component == "ffn_in":
            _put(layer, name, _cut(first, 0, rows))
        elif component == "ffn_out":
            _put(layer, name, _cut(second, 1, rows))


def _at_least_one(kept: Tensor) -> Tensor:
    if not bool(kept.any()):
        kept = kept.clone()
        kept[0] = True
    return kept


def _add_constant(linear: nn.Linear, x: Tensor | None, where: Tensor) -> None:
    """Adds what the inputs `x[where]` pass on to the linear's bias; there is nothing to add without a bias `x`."""
    if x is None or not bool(where.any()):
        return
    constant = linear.weight.double()[:, where] @ x.double()[where]
    if linear.bias is None:
        if bool(constant.any()):
            linear.bias = nn.Parameter(constant.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
        return
    linear.bias.copy_(linear.bias.double() + constant)


def _cut(linear: nn.Linear, dim: int, kept: Tensor) -> nn.Linear:
    """A linear with the kept rows (`dim` 0) or columns (1) of the weight alone."""
    weight = linear.weight.index_select(dim, kept)
    fresh = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    fresh.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        bias = linear.bias.index_select(0, kept) if dim == 0 else linear.bias.detach()
        fresh.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return fresh.train(linear.training)


def _set_heads(encoder: Any, index: int, heads: int, width: int) -> None:
    layer, hidden = _layers(encoder)[index], int(encoder.config.hidden_size)
    layout = LAYOUTS[encoder.config.model_type]
    for component, name in layout.linears:
        if component in ("query", "key", "value"):
            _put(layer, name, nn.Linear(hidden, heads * width))
        elif component == "attention_output":
            _put(layer, name, nn.Linear(heads * width, hidden))
    _note_heads(layer, layout, heads, width)


def _set_neurons(encoder: Any, index: int, neurons: int) -> None:
    layer, hidden = _layers(encoder)[index], int(encoder.config.hidden_size)
    for component, name in LAYOUTS[encoder.config.model_type].linears:
        if component == "ffn_in":
            _put(layer, name, nn.Linear(hidden, neurons))
        elif component == "ffn_out":
            _put(layer, name, nn.Linear(neurons, hidden))


def _put(layer: nn.Module, name: str, linear: nn.Linear) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, linear)


def _note_heads(layer: nn.Module, layout: Layout, heads: int, width: int) -> None:
    attention: Any = layer.get_submodule(layout.attention)
    setattr(attention, layout.heads, heads)
    if hasattr(attention, "all_head_size"):
        attention.all_head_size = heads * width


def write_widths(encoder: Any) -> None:
    """Writes the widths that the modules have into the configuration, which a model on top of the base shares."""
    config, family, widths = encoder.config, _FAMILIES[encoder.config.model_type], widths_of(encoder)
    config.per_layer_config = None
    heads = int(config.num_attention_heads)
    head_dim = int(config.hidden_size) // heads
    if len({neurons for _, neurons in widths}) == 1:
        setattr(config, family.neurons, widths[0][1])
    neurons = int(getattr(config, family.neurons))
    overrides: dict[int, dict[str, int]] = {}
    for index, (some_heads, some_neurons) in enumerate(widths):
        if some_heads != heads:
            overrides.setdefault(index, {})[family.heads] = some_heads
        if some_neurons != neurons:
            overrides.setdefault(index, {})[family.neurons] = some_neurons
    if any(family.heads in given for given in overrides.values()):
        config.head_dim = head_dim
    if overrides:
        config.per_layer_config = overrides


def _overrides(config: Any, family: _Family) -> dict[int | str, dict[str, Any]]:
    """What differs from the ordinary widths, by layer, checked."""
    written: Mapping[str, Any] = config.to_dict().get("per_layer_config") or {}
    for index, given in written.items():
        for name, value in given.items():
            if name not in (family.heads, family.neurons):
                raise UserError(
                    f"config.json: per_layer_config: layer {int(index)}: {name!r} cannot differ between layers here "
                    f"(what can: {family.heads}, {family.neurons})"
                )
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"config.json: per_layer_config: layer {int(index)}: expected {name} to be 1 or more, got {value!r}"
                )
    return {int(index): dict(given) for index, given in written.items()}
