"""What `sparsify` reports of a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from sparsebert._html import table
from sparsebert._show import rich_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Replacement", "Sparsification"]

_HEADS = ("layer", "shape", "zero", "", "format", "bytes", "speed", "reason")


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
        rows = [_cells(record) for record in self]
        widths = [max(len(row[column]) for row in (_HEADS, *rows)) for column in range(len(_HEADS))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (_HEADS, *rows)]
        return "\n".join([*lines, self._total()])

    def __rich__(self) -> Table:
        return rich_table(self._total(), _HEADS, [_cells(record) for record in self])

    def _repr_html_(self) -> str:
        return table(self._total(), _HEADS, [_cells(record) for record in self])

    def _total(self) -> str:
        before, after = (sum(getattr(record, name) for record in self) for name in ("bytes_before", "bytes_after"))
        return f"{len(self.replaced)} of {len(self)} layers replaced; all their weights: {before:,} -> {after:,} bytes"


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
