"""Sparse layers in the place of a model's pruned linears: every one that is worth it, in any torch model."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparsebert.errors import UserError
from sparsebert.formats import parse_format
from sparsebert.nn.choose import Timer, checked_rows, choose
from sparsebert.nn.layout import Layout
from sparsebert.nn.masked import MaskedEmbedding, MaskedLinear
from sparsebert.nn.sparse_linear import SparseLinear
from sparsebert.nn.sparsification import Replacement, Sparsification
from sparsebert.nn.structure import check_dtype, check_weight, mask_of

__all__ = ["load_sparsified", "sparsify"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Wanted:
    """How the user wants layers to be stored."""

    min_sparsity: float
    format: str
    rows: Sequence[int] | None
    trainable: bool | None
    timer: Timer | None


def sparsify(
    model: Model,
    *,
    min_sparsity: float = 0.3,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    rows: Sequence[int] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    trainable: bool | None = None,
    timer: Timer | None = None,
) -> Model:
    """Put a `SparseLinear` in the place of every linear layer of `model` that is sparse enough and gains by it.

    In place. Looks at `nn.Linear` (its weight's own zeros) and `MaskedLinear` (its mask); everything else, and what
    may be in use elsewhere (tied weights, hooks, parametrizations), is left as it is. With `format="auto"` a layer is
    replaced only where a sparse format was measured to be faster on this machine, see `choose`; layers of equal shape
    and structure share one measurement. `model.sparsification` then says what was done, and why.
    Its state_dict loads into a model sparsified in any way, or by `load_sparsified` into an ordinary one. The
    `save_pretrained` of a transformers model then writes a folder for `sparsebert.AutoSparseModel` to load; the
    `from_pretrained` of transformers does not know sparse layers.

    Args:
        model: any module that holds linear layers, with its weights loaded.
        min_sparsity: share of zeros from which a layer is looked at. Well below what a model was pruned to as a whole:
            its layers differ.
        format: "auto", or the spelling of one format for all ("unstructured", "blocks:8x2" ...): no measurement.
        dtype: the dtype the whole model is moved to first (`model.to(dtype)`), torch.bfloat16 for one.
        rows: numbers of rows of x (tokens in a batch) that matter to "auto"; None: the defaults of `choose`.
        include, exclude: shell patterns of dotted names (`"encoder.*"`); only what matches `include` is looked at, and
            nothing that matches `exclude`.
        trainable: as for `SparseLinear.from_linear`. With None weights and biases require gradients where they did; the
            report names the weights that are frozen because their format stores pruned ones too.
        timer: measures in `choose`'s place.

    Returns:
        `model` itself.

    Raises:
        UserError: a setting that cannot be, a pattern that matches no linear layer, or a model that is itself a linear
            layer. TypeError: not a module.
    """
    _check(model, min_sparsity, format, dtype)
    wanted = _Wanted(min_sparsity, format, None if rows is None else checked_rows(rows), trainable, timer)
    places = _places(model)
    chosen = _matching(places, include, exclude)
    if dtype is not None:
        model.to(dtype)
    shared, adapted, records = _shared(model), _adapted(model), []
    for name, (module, parents) in places.items():
        why = (adapted.get(id(module)) or _why_not(name, module, parents, shared)) if name in chosen else "excluded"
        record, sparse = _left(name, module, why) if why else _converted(name, module, wanted)
        records.append(record)
        if sparse is not None:
            for parent, child in parents:
                setattr(parent, child, sparse)
    if include is None:
        records += _others(model, min_sparsity)
    model.sparsification = Sparsification(records)  # type: ignore[assignment]
    return _saved_sparse(model)


def _saved_sparse(model: Model) -> Model:
    """Gives a transformers model with sparse layers a `save_pretrained` that knows them."""
    if hasattr(type(model), "save_pretrained") and any(isinstance(held, SparseLinear) for held in model.modules()):
        model.save_pretrained = types.MethodType(_save_pretrained, model)  # type: ignore[assignment]
    return model


def _save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """As `sparsebert.models.sparse_folder.save_pretrained`, which a sparsified transformers model has in place of its
    own: a folder that `AutoSparseModel.from_pretrained` loads."""
    # By name and late: the room of models stands above this one, and needs transformers.
    importlib.import_module("sparsebert.models.sparse_folder").save_pretrained(self, *args, **kwargs)


# What pickle looks a bound method up by.
_save_pretrained.__name__ = "save_pretrained"


def _check(model: object, min_sparsity: float, format: str, dtype: torch.dtype | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.Linear, MaskedLinear, SparseLinear)):
        raise UserError(
            f"model: expected a module that holds linear layers, got a {type(model).__name__}, which cannot be "
            "replaced in place; use SparseLinear.from_linear(linear)"
        )
    if not isinstance(min_sparsity, (int, float)) or not 0 <= min_sparsity <= 1:
        raise UserError(f"min_sparsity: expected a share from 0 to 1, got {min_sparsity!r}")
    if format != "auto":
        parse_format(format)
    check_dtype(dtype)


Parents = list[tuple[nn.Module, str]]


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, Parents]]:
    """Every linear layer by its first name, with all the places that hold it."""
    linears = (nn.Linear, MaskedLinear, SparseLinear)
    found: dict[int, tuple[str, nn.Module, Parents]]
    found = {id(module): (name, module, []) for name, module in model.named_modules() if isinstance(module, linears)}
    for parent in model.modules():
        for child, held in parent._modules.items():
            if id(held) in found:
                found[id(held)][2].append((parent, child))
    return {name: (module, parents) for name, module, parents in found.values()}


def _matching(
    places: Mapping[str, object], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> set[str]:
    chosen = set(places)
    for argument, given in (("include", include), ("exclude", exclude)):
        if given is None:
            continue
        matches: set[str] = set()
        patterns = (given,) if isinstance(given, str) else given
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise UserError(f"{argument}: expected patterns of layers' names such as 'encoder.*', got {given!r}")
        for pattern in patterns:
            some = set(fnmatch.filter(places, pattern))
            if not some:
                few = ", ".join(map(repr, list(places)[:5])) or "none"
                raise UserError(f"{argument}: {pattern!r} matches no linear layer of the model; the first are: {few}")
            matches |= some
        chosen = chosen & matches if argument == "include" else chosen - matches
    return chosen


def _shared(model: nn.Module) -> dict[int, list[str]]:
    """The full names of every parameter that more than one module, or one module twice, holds."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for child, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{prefix}.{child}" if prefix else child)
    return {key: held for key, held in names.items() if len(held) > 1}


def _adapted(model: nn.Module) -> dict[int, str]:
    """Why the linears inside adapters (LoRA and its kind, as peft builds them) are left, by their id."""
    return {
        id(inner): f"it belongs to an adapter ({type(module).__name__}); merge that first (peft: merge_and_unload)"
        for module in model.modules()
        if "base_layer" in module._modules
        for inner in module.modules()
    }


def _reads_weight(parent: nn.Module, child: str) -> bool:
    """Whether the parent's forward, as written, has the child's weight in it: to multiply, or for its dtype."""
    try:
        source = inspect.getsource(type(parent).forward)
    except (OSError, TypeError):
        return False
    return re.search(rf"\bself\.{re.escape(child)}\.weight\b", source) is not None


def _others(model: nn.Module, min_sparsity: float) -> list[Replacement]:
    """Records of pruned matrices that are no linear layer's, which a user may look for in vain."""
    linears, embeddings = (nn.Linear, MaskedLinear, SparseLinear), (nn.Embedding, nn.EmbeddingBag, MaskedEmbedding)
    records = []
    for name, module in model.named_modules():
        if isinstance(module, (*linears, *embeddings, parametrize.ParametrizationList)):
            continue
        for child, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.dim() != 2:
                continue
            zeros = _share(parameter, None)
            if 0 < zeros < 1 and zeros >= min_sparsity:
                place = name if child == "weight" else f"{name}.{child}".lstrip(".")
                size = parameter.numel() * parameter.element_size()
                shape = (parameter.shape[0], parameter.shape[1])
                why = f"it is in a {type(module).__name__}, which is no nn.Linear"
                records.append(Replacement(place, shape, zeros, "left", why, "dense", size, size))
    return records


def _why_not(name: str, module: nn.Module, parents: Parents, shared: Mapping[int, list[str]]) -> str | None:
    """Why a layer cannot be replaced, whatever its weight, in a plain sentence; None where it can."""
    if isinstance(module, SparseLinear):
        return "it is a SparseLinear already"
    if parametrize.is_parametrized(module):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    if hasattr(module, "weight_orig"):
        return "torch.nn.utils holds its weight in a hook (prune or spectral_norm); make it permanent first"
    if type(module) not in (nn.Linear, MaskedLinear):
        return f"it is a {type(module).__name__}, a subclass of nn.Linear with its own forward or its own readers"
    if "forward" in vars(module):
        return "its forward was replaced by another function"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind, None) for kind in hooks):
        return "it has hooks, which would be lost"
    for parameter in (module.weight, module.bias):
        others = [other for other in shared.get(id(parameter), ()) if other.rpartition(".")[0] != name]
        if others:
            return f"its {'weight' if parameter is module.weight else 'bias'} is tied to {others[0]}"
    for parent, child in parents:
        if _reads_weight(parent, child):
            return f"its parent, a {type(parent).__name__}, reads its weight itself, which is made anew each time"
    if isinstance(module, MaskedLinear) and module.score is not None:
        return "its mask is still being learned"
    try:
        check_weight(module.weight)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _left(name: str, module: nn.Module, reason: str, speedup: float | None = None) -> tuple[Replacement, None]:
    """The record of a layer that stays."""
    if isinstance(module, SparseLinear):
        shape = (module.out_features, module.in_features)
        bytes_now = module.nbytes
        return Replacement(name, shape, module.sparsity, "left", reason, module.format, bytes_now, bytes_now), None
    weight: Tensor = module.weight  # type: ignore[assignment]
    bytes_now = 0 if is_lazy(weight) else weight.numel() * weight.element_size()
    shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    return (
        Replacement(name, shape, _zeros(module), "left", reason, "dense", bytes_now, bytes_now, speedup),
        None,
    )


def _converted(name: str, module: nn.Module, wanted: _Wanted) -> tuple[Replacement, SparseLinear | None]:
    """The record of a layer that can be replaced, and its replacement where it is worth it."""
    assert isinstance(module, (nn.Linear, MaskedLinear))
    sparsity = _zeros(module)
    if sparsity < wanted.min_sparsity:
        return _left(name, module, f"less than {100 * wanted.min_sparsity:g}% of its weights are zero")
    if sparsity == 1 and not isinstance(module, MaskedLinear):
        return _left(name, module, "all its weights are zero, as if it were yet to be trained; from_linear takes it")
    spelling, speedup, reason = wanted.format, None, "as asked for"
    choice = None
    if wanted.format == "auto":
        choice = choose(
            module.weight,
            mask_of(module),
            bias=module.bias,
            rows=wanted.rows,
            trainable=bool(wanted.trainable),
            timer=wanted.timer,
        )
        spelling, speedup, reason = choice.format, choice.speedup, choice.reason
        if spelling == "dense":
            return _left(name, module, reason, speedup)
    try:
        sparse = SparseLinear.from_linear(module, format=spelling, trainable=wanted.trainable)
    except ValueError as error:
        return _left(name, module, f"{spelling} cannot hold it: {error}")
    sparse.choice = choice
    if module.weight.requires_grad and wanted.trainable is None and not sparse.exact:
        reason += "; frozen, for this format stores pruned weights too"
    shape = (module.out_features, module.in_features)
    before = module.weight.numel() * module.weight.element_size()
    record = Replacement(name, shape, sparsity, "replaced", reason, spelling, before, sparse.nbytes, speedup)
    return record, sparse


def _zeros(module: nn.Module) -> float:
    """Share of the weights that are zero, or pruned where there is a mask."""
    return _share(module.weight, mask_of(module))  # type: ignore[arg-type]


def _share(weight: Tensor, mask: Tensor | None) -> float:
    """Share of zeros in a weight, or of pruned places in its mask; 0 for a weight that cannot tell."""
    # Uninitialised, quantised or distributed weights need not know how to count.
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.numel():
        return 0.0
    kept = int(mask.sum()) if mask is not None else int(weight.count_nonzero())
    return 1 - kept / weight.numel()


def load_sparsified(model: Model, state: Mapping[str, Tensor], *, strict: bool = True, assign: bool = False) -> Model:
    """Load the state_dict of a sparsified model into one of the same architecture that is not, in place.

    Linear layers that are sparse in the state become `SparseLinear`s, of the same formats; the rest is
    `model.load_state_dict`.

    Args:
        model: with any weights, or on the meta device (then with `assign=True`).
        state: from `state_dict()` of the sparsified model, or the safetensors file that it was saved to.
        strict, assign: as for `load_state_dict`.

    Returns:
        `model` itself.

    Raises:
        ValueError: an index that cannot be; it names the key. RuntimeError: keys or shapes that do not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    places = _places(model)
    layouts = {key.removesuffix(".layout"): Layout.read(state[key], key) for key in state if key.endswith(".layout")}
    for name, layout in layouts.items():
        module, parents = places.get(name, (None, []))
        if not isinstance(module, (nn.Linear, MaskedLinear)):
            continue
        weight: Tensor = module.weight
        sparse = SparseLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            activation=layout.activation,
            device=weight.device,
            dtype=weight.dtype,
            trainable=weight.requires_grad,
        )
        for parent, child in parents:
            setattr(parent, child, sparse.train(module.training))
    model.load_state_dict(state, strict=strict, assign=assign)
    return model
