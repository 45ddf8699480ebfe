"""How objects show themselves in a notebook (`_repr_html_`) and through rich (`__rich__`): from the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsebert._html import heat_table

if TYPE_CHECKING:
    from rich.table import Table

Shares = Mapping[tuple[int | None, str], float]
"""By layer (None: outside the layers) and component."""

__all__ = ["by_layer", "heat_map", "rich_shares", "rich_table"]


def by_layer(shares: Shares) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Columns (components), rows (layers from 1, then what is outside them) and what stands in them."""
    columns = list(dict.fromkeys(component for _, component in shares))
    layers = sorted({layer for layer, _ in shares if layer is not None})
    lines: list[int | None] = [*layers, *([None] if any(layer is None for layer, _ in shares) else [])]
    rows = ["outside" if layer is None else str(layer + 1) for layer in lines]
    return columns, rows, [[shares.get((layer, component)) for component in columns] for layer in lines]


def heat_map(title: str, shares: Shares) -> str:
    """Shares by layer and component as a shaded table of HTML."""
    columns, rows, lines = by_layer(shares)
    return str(heat_table(title, "layer", [name.replace("_", " ") for name in columns], rows, lines))


def rich_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table for rich; without `heads`, rows of name and value."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=bool(heads))
    for place, head in enumerate(heads):
        table.add_column(escape(head), justify="right" if place else "left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def rich_shares(title: str, shares: Shares) -> Table:
    """Shares by layer and component for rich."""
    columns, rows, lines = by_layer(shares)
    cells = [["" if share is None else f"{share:.1%}" for share in line] for line in lines]
    return rich_table(title, ["layer", *columns], [[name, *line] for name, line in zip(rows, cells, strict=True)])
