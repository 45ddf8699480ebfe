"""Sparse layers in the place of a model's pruned linears: every one that is worth it, in any torch model."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparsebert.errors import UserError
from sparsebert.formats import parse_format
from sparsebert.nn.choose import ROWS, Timer, choose
from sparsebert.nn.masked import MaskedLinear
from sparsebert.nn.sparse_linear import SparseLinear
from sparsebert.nn.structure import check_weight, mask_of

__all__ = ["Replacement", "Sparsification", "sparsify"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Replacement:
    """What became of one linear layer."""

    name: str
    shape: tuple[int, int]
    """`(out_features, in_features)`"""
    sparsity: float
    """Share of the weights that are zero (pruned, where there is a mask)."""
    action: str
    """"replaced" or "left"."""
    reason: str
    format: str
    """Spelling of the format the weight is stored in now."""
    bytes_before: int
    """Of the weight; biases are as they were."""
    bytes_after: int
    speedup: float | None = None
    """As measured when the format was chosen, over the best dense path; None where nothing was measured."""


class Sparsification(Sequence[Replacement]):
    """What `sparsify` did: a sequence of `Replacement`s, one a layer; `print` shows a table."""

    def __init__(self, records: Sequence[Replacement]) -> None:
        self._records = tuple(records)

    @overload
    def __getitem__(self, index: int) -> Replacement: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Replacement]: ...
    def __getitem__(self, index: int | slice) -> Replacement | Sequence[Replacement]:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sparsification) and self._records == other._records

    def __hash__(self) -> int:
        return hash(self._records)

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        """The layers that are sparse now."""
        return tuple(record for record in self if record.action == "replaced")

    @property
    def left(self) -> tuple[Replacement, ...]:
        """The layers that are as they were."""
        return tuple(record for record in self if record.action == "left")

    def __repr__(self) -> str:
        return f"<Sparsification: {len(self.replaced)} replaced, {len(self.left)} left>"

    def __str__(self) -> str:
        if not self:
            return "no linear layers"
        heads = ["layer", "shape", "zero", "", "format", "bytes", "speed", "reason"]
        rows = [_cells(record) for record in self]
        widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]
        before, after = (sum(getattr(record, name) for record in self) for name in ("bytes_before", "bytes_after"))
        total = f"{len(self.replaced)} of {len(self)} layers replaced; their weights: {before:,} -> {after:,} bytes"
        return "\n".join([*lines, total])


def _cells(record: Replacement) -> list[str]:
    return [
        record.name,
        f"{record.shape[0]}x{record.shape[1]}",
        f"{record.sparsity:.1%}",
        record.action,
        record.format,
        f"{record.bytes_before:,} -> {record.bytes_after:,}",
        "" if record.speedup is None else f"{record.speedup:.2f}x",
        record.reason,
    ]


@dataclass(frozen=True)
class _Wanted:
    """How the user wants layers to be stored."""

    min_sparsity: float
    format: str
    rows: Sequence[int]
    trainable: bool
    timer: Timer | None


def sparsify(
    model: Model,
    *,
    min_sparsity: float = 0.5,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    rows: Sequence[int] = ROWS,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    trainable: bool = False,
    timer: Timer | None = None,
) -> Model:
    """Put a `SparseLinear` in the place of every linear layer of `model` that is sparse enough and gains by it.

    In place. Looks at `nn.Linear` (its weight's own zeros) and `MaskedLinear` (its mask); everything else, and what
    may be in use elsewhere (tied weights, hooks, parametrizations), is left as it is. With `format="auto"` a layer is
    replaced only where a sparse format was measured to be faster on this machine, see `choose`; layers of equal shape
    and structure share one measurement. `model.sparsification` then says what was done, and why.

    Args:
        model: any module that holds linear layers, with its weights loaded.
        min_sparsity: share of zeros from which a layer is looked at.
        format: "auto", or the spelling of one format for all ("unstructured", "blocks:8x2" ...): no measurement.
        dtype: the dtype the whole model is moved to first (`model.to(dtype)`), torch.bfloat16 for one.
        rows: numbers of rows of x (tokens in a batch) that matter to "auto".
        include, exclude: shell patterns of dotted names (`"encoder.*"`); only what matches `include` is looked at, and
            nothing that matches `exclude`.
        trainable: whether the sparse layers' weights and biases require gradients.
        timer: measures in `choose`'s place.

    Returns:
        `model` itself.

    Raises:
        UserError: a setting that cannot be, a pattern that matches no linear layer, or a model that is itself a linear
            layer. TypeError: not a module.
    """
    _check(model, min_sparsity, dtype)
    if format != "auto":
        parse_format(format)
    if dtype is not None:
        model.to(dtype)
    wanted = _Wanted(min_sparsity, format, rows, trainable, timer)
    places = _places(model)
    chosen = _matching(places, include, exclude)
    shared = _shared(model)
    records = []
    for name, (module, parents) in places.items():
        why = _why_not(name, module, parents, shared) if name in chosen else "excluded"
        record, sparse = _left(name, module, why) if why else _converted(name, module, wanted)
        records.append(record)
        if sparse is not None:
            for parent, child in parents:
                setattr(parent, child, sparse)
    model.sparsification = Sparsification(records)  # type: ignore[assignment]
    return model


def _check(model: object, min_sparsity: float, dtype: torch.dtype | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.Linear, MaskedLinear, SparseLinear)):
        raise UserError(
            f"model: expected a module that holds linear layers, got a {type(model).__name__}, which cannot be "
            "replaced in place; use SparseLinear.from_linear(linear)"
        )
    if not 0 <= min_sparsity <= 1:
        raise UserError(f"min_sparsity: expected a share from 0 to 1, got {min_sparsity}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype: expected a float dtype such as torch.bfloat16, got {dtype}")


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
        for pattern in (given,) if isinstance(given, str) else given:
            some = set(fnmatch.filter(places, pattern))
            if not some:
                few = ", ".join(list(places)[:5]) or "none at all"
                raise UserError(f"{argument}: {pattern!r} matches no linear layer of the model (it has {few} ...)")
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
    for parent, _ in parents:
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            return f"its parent, torch's {type(parent).__name__}, multiplies by the weight itself"
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
        return _left(name, module, f"{sparsity:.1%} of its weights are zero, less than {wanted.min_sparsity:.1%}")
    spelling, speedup, reason = wanted.format, None, "as asked for"
    choice = None
    if wanted.format == "auto":
        choice = choose(
            module.weight,
            mask_of(module),
            bias=module.bias,
            rows=wanted.rows,
            trainable=wanted.trainable,
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
    shape = (module.out_features, module.in_features)
    before = module.weight.numel() * module.weight.element_size()
    record = Replacement(name, shape, sparsity, "replaced", reason, spelling, before, sparse.nbytes, speedup)
    return record, sparse


def _zeros(module: nn.Module) -> float:
    """Share of the weights that are zero, or pruned where there is a mask."""
    mask = mask_of(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    # Uninitialised, quantised or distributed weights need not know how to count.
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.numel():
        return 0.0
    kept = int(mask.sum()) if mask is not None else int(weight.count_nonzero())
    return 1 - kept / weight.numel()
