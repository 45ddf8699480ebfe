"""Building a sparse model over stored tensors: from its configuration, without data, and then filled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsebert.errors import UserError
from sparsebert.models.folder import WEIGHTS, first_line
from sparsebert.models.per_layer import build_uneven
from sparsebert.models.sparse_folder import architecture, describe
from sparsebert.nn.layout import Layout
from sparsebert.nn.sparse_linear import SparseLinear
from sparsebert.nn.sparsification import Replacement

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["build", "fill"]

# Made anew when a model is built; a file does not hold them.
FIXED_BUFFERS = ("position_ids", "token_type_ids")
_LAYER_NUMBER = re.compile(r"\.layer\.(\d+)\.")
# What a configuration may ask of transformers that a folder must not decide: another kernel from the hub, code.
_NOT_FROM_A_FILE = ("attn_implementation", "experts_implementation", "auto_map", "transformers_weights", "name_or_path")
# Widths of a layer are not among them: those of an uneven model need not be in the file.
_SIZES = ("num_labels", "vocab_size", "max_position_embeddings", "hidden_size", "dim")


def build(folder: Path, raw: dict[str, Any], tensors: Mapping[str, Tensor], attn: str) -> PreTrainedModel:
    """The model of the configuration, without data."""
    path = folder / "config.json"
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UserError(f"{path}: expected one name in 'architectures', got {names!r}")
    try:
        kind = architecture(names[0], raw["model_type"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    config = _config(path, raw, kind, tensors)
    config._attn_implementation = attn
    config._name_or_path = str(folder)
    try:
        with torch.device("meta"):
            model = build_uneven(kind, config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except Exception as error:  # whatever a class of transformers makes of sizes that cannot be
        raise UserError(f"{path}: no model can be built from it ({first_line(error)})") from error
    encoder = getattr(model, model.base_model_prefix, model)
    # `load_base` leaves out a pooler that a checkpoint has no weights for.
    if getattr(encoder, "pooler", None) is not None and not any("pooler." in name for name in tensors):
        encoder.pooler = None
    return model


def _config(path: Path, raw: dict[str, Any], kind: Any, tensors: Mapping[str, Tensor]) -> PretrainedConfig:
    """The configuration, once no number in it could make building run away."""
    if raw.get("quantization_config") is not None or raw.get("is_decoder"):
        raise UserError(f"{path}: expected an encoder with floating-point weights, got a decoder or a quantised model")
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for key in _SIZES:
        value = raw.get(key, 0)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest):
            raise UserError(
                f"{path}: {key} is {value!r}, but no side of a tensor in {WEIGHTS} is longer than {largest}"
            )
    layers = len({found[1] for name in tensors if (found := _LAYER_NUMBER.search(name))})
    key = "n_layers" if raw["model_type"] == "distilbert" else "num_hidden_layers"
    for name in {key, "num_hidden_layers"} & (raw.keys() | {key}):
        if raw.get(name) != layers or isinstance(raw.get(name), bool):
            raise UserError(f"{path}: {name} is {raw.get(name)!r}, but {WEIGHTS} has {layers} layers")
    given = {name: value for name, value in raw.items() if name not in _NOT_FROM_A_FILE and not name.startswith("_")}
    try:
        return kind.config_class.from_dict(given)
    except Exception as error:  # the library raises a dozen unrelated types here
        raise UserError(f"{path}: not a usable configuration ({first_line(error)})") from error


def fill(
    path: Path,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    tied: Mapping[str, str],
    described: Mapping[str, Any] | None,
) -> list[Replacement]:
    """Puts the tensors into a model without data: sparse layers first, then everything else."""
    modules = dict(model.named_modules())
    records = []
    used: set[str] = set()
    prefixes = [name.removesuffix("layout") for name in tensors if name.endswith(".layout")]
    if described is not None and {prefix[:-1] for prefix in prefixes} != described.keys():
        odd = sorted({prefix[:-1] for prefix in prefixes} ^ described.keys())[0]
        raise UserError(f"{path}: {odd!r} is a sparse layer only in one of it and config.json")
    for prefix in prefixes:
        layer, taken = _sparse(path, prefix, modules.get(prefix[:-1]), tensors)
        about = describe(layer._stored())
        if described is not None and described[prefix[:-1]] != about:
            raise UserError(f"{path}: {prefix[:-1]}: {about}, but config.json says {described[prefix[:-1]]!r}")
        parent, _, child = prefix[:-1].rpartition(".")
        setattr(modules[parent], child, layer.eval())
        used |= taken
        records.append(_record(prefix[:-1], layer))
    _fill_rest(path, model, {name: tensor for name, tensor in tensors.items() if name not in used}, tied)
    return records


def _sparse(path: Path, prefix: str, target: Any, tensors: Mapping[str, Tensor]) -> tuple[SparseLinear, set[str]]:
    """A sparse layer over its stored tensors, checked, and their names."""
    if type(target) is not nn.Linear:
        raise UserError(f"{path}: {prefix[:-1]!r} is no linear layer of the model")
    try:
        layout = Layout.read(tensors[f"{prefix}layout"], f"{prefix}layout")
        why = layout.mismatch((target.out_features, target.in_features), "none")
        if why is not None:
            raise ValueError(f"{prefix}layout: {why}")
        names = layout.format.tensor_names()
        missing = [name for name in names if prefix + name not in tensors]
        if missing:
            raise ValueError(f"{prefix}{missing[0]}: missing; {layout.format.name} needs it")
        # Indices in memory of their own: a few megabytes, while a copy of a mapped buffer would copy the whole file.
        stored = layout.check(
            {name: tensors[prefix + name] if name == "values" else tensors[prefix + name].clone() for name in names},
            prefix,
        )
        bias = tensors.get(f"{prefix}bias")
        if (bias is None) != (target.bias is None):
            raise ValueError(f"{prefix}bias: {'missing' if bias is None else 'the layer has none'}")
        layer = SparseLinear.from_stored(stored, bias, trainable=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    return layer, {prefix + name for name in (*names, "layout", *(["bias"] if bias is not None else []))}


def _fill_rest(path: Path, model: PreTrainedModel, tensors: dict[str, Tensor], tied: Mapping[str, str]) -> None:
    expected = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta}
    aliases = {name: source for name, source in tied.items() if name in expected}
    wanted = expected.keys() - aliases.keys()
    if wanted != tensors.keys():
        odd = sorted(wanted ^ tensors.keys())[0]
        where = "is no tensor of the model" if odd in tensors else "missing, though the model has it"
        raise UserError(f"{path}: {odd}: {where}")
    parameters: dict[str, nn.Parameter] = {}
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise UserError(
                f"{path}: {name}: expected float {list(expected[name].shape)} by config.json, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        parameters[name] = nn.Parameter(tensor)
    for name, source in aliases.items():
        if source not in parameters or parameters[source].shape != expected[name].shape:
            raise UserError(f"{path}: {name} is said to be tied to {source!r}, which does not fit")
        parameters[name] = parameters[source]
    for name, parameter in parameters.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, parameter)
    _fill_buffers(model)


def _fill_buffers(model: PreTrainedModel) -> None:
    """The buffers that a class makes itself and that no file holds."""
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        parent, _, child = name.rpartition(".")
        if child not in FIXED_BUFFERS:
            raise UserError(f"model: what is in the buffer {name} of this version of transformers is not known")
        row = torch.arange(buffer.shape[-1]) if child == "position_ids" else torch.zeros(buffer.shape[-1]).long()
        setattr(model.get_submodule(parent), child, row.expand(buffer.shape))


def _record(name: str, layer: SparseLinear) -> Replacement:
    shape = (layer.out_features, layer.in_features)
    before = shape[0] * shape[1] * layer.values.element_size()
    return Replacement(name, shape, layer.sparsity, "replaced", "as saved", layer.format, before, layer.nbytes)
