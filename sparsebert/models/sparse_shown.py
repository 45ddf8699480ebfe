"""How a sparse model shows itself in a notebook and through rich: what it is, and what its layers are stored in."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsebert._html import join, table
from sparsebert._show import rich_table
from sparsebert.models.prunable import in_a_few_words
from sparsebert.models.task_model import TaskModel

if TYPE_CHECKING:
    from rich.console import Group

    from sparsebert.nn.sparsification import Replacement

__all__ = ["show_itself"]

_HEADS = ("layer", "linears", "kept", "formats", "dense bytes", "bytes")
_LAYER = re.compile(r"(?:^|\.)layer\.(\d+)\.")


def show_itself(model: nn.Module) -> None:
    """Gives a model that `AutoSparseModel` loaded `__rich__` and `_repr_html_`; its `repr` stays that of its class.

    The model has `sparsification` and `provenance`.
    """
    shown: Any = model
    shown.__rich__, shown._repr_html_ = types.MethodType(_rich, model), types.MethodType(_html, model)


def _rich(model: nn.Module) -> Group:
    from rich.console import Group

    title, facts, layers = _shown(model)
    return Group(rich_table(title, (), facts), *([rich_table("", _HEADS, layers)] if layers else []))


def _html(model: nn.Module) -> str:
    title, facts, layers = _shown(model)
    return join([table(title, (), facts), table("linear layers", _HEADS, layers) if layers else None])


def _shown(model: Any) -> tuple[str, list[tuple[str, str]], list[tuple[str, ...]]]:
    """Title, facts by name, and a row for each encoder layer and for all that is outside them."""
    records: Sequence[Replacement] = model.sparsification
    base = model.base if isinstance(model, TaskModel) else model
    facts = model._shown() if isinstance(model, TaskModel) else _facts(base)
    origin = model.provenance.get("base_model") or {}
    if origin.get("name"):
        facts.append(("made from", str(origin["name"])))
    if model.provenance.get("pattern"):
        facts.append(("pattern", str(model.provenance["pattern"])))
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    now = sum(tensor.nbytes for tensor in tensors.values())
    dense = now + sum(record.bytes_before - record.bytes_after for record in records)
    facts.append(("all tensors", f"{now:,} bytes" + (f", dense {dense:,}" if records else "")))
    groups: dict[str, list[Replacement]] = {}
    for record in records:
        found = _LAYER.search(record.name)
        groups.setdefault(str(int(found[1]) + 1) if found else "outside", []).append(record)
    rows = [_row(name, group) for name, group in groups.items()]
    return type(model).__name__, facts, [*rows, _row("all", records)] if rows else []


def _facts(model: Any) -> list[tuple[str, str]]:
    encoder = getattr(model, model.base_model_prefix, model)
    return [
        ("model", in_a_few_words(encoder)),
        ("runs in", f"{model.dtype} on {model.device}".removeprefix("torch.")),
    ]


def _row(name: str, group: Sequence[Replacement]) -> tuple[str, ...]:
    formats: dict[str, int] = {}
    for record in group:
        formats[record.format] = formats.get(record.format, 0) + 1
    size = sum(record.shape[0] * record.shape[1] for record in group)
    kept = sum((1 - record.sparsity) * record.shape[0] * record.shape[1] for record in group)
    return (
        name,
        str(len(group)),
        f"{kept / max(size, 1):.1%}",
        ", ".join(f"{count} {format}" for format, count in formats.items()),
        f"{sum(record.bytes_before for record in group):,}",
        f"{sum(record.bytes_after for record in group):,}",
    )
