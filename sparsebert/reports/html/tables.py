"""Tables of the report: those of the measurements and plain ones, each scrolling in its own box."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsebert._html import Html, tag
from sparsebert.reports.speed_table import Table, tables

__all__ = ["benchmark_tables", "plain_table", "show_table"]

_SPEED = re.compile(r"(\d+(?:\.\d+)?)x")


def plain_table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1) -> Html:
    """A table whose first cell of a row is its heading.

    Args:
        caption: its title.
        heads: of the columns.
        rows: cells; `Html` as it is. A row may be a `Losing`.
        texts: how many columns hold text and stand to the left.
    """
    first = [tag("th", head, scope="col", class_="text" if at < texts else None) for at, head in enumerate(heads)]
    body = []
    for row in rows:
        cells = [tag("th", row[0], scope="row", class_="text")]
        cells += [tag("td", cell, class_="text" if at < texts else None) for at, cell in enumerate(row[1:], 1)]
        body.append(tag("tr", *cells, class_="loses" if isinstance(row, Losing) else None))
    table = tag("table", tag("caption", caption), tag("thead", tag("tr", *first)), tag("tbody", *body))
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


class Losing(tuple[object, ...]):
    """A row that says: slower than dense."""


def show_table(table: Table) -> Html:
    """A table of words with its notes; rows whose speed is below 1 are marked, where that is about a subnetwork."""
    rows = [_marked(table, row) for row in table.rows]
    texts = 2 if "kind" in table.heads[:2] else 1
    notes = [tag("p", note, class_="note") for note in table.notes]
    return tag("div", plain_table(table.title, table.heads, rows, texts=texts), *notes)


def benchmark_tables(report: Mapping[str, Any]) -> list[Html]:
    """Everything that `sparsebert.benchmark` measured, losing cells included and marked.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: not such a report.
    """
    return [show_table(table) for table in tables(report)]


def _marked(table: Table, row: tuple[str, ...]) -> Sequence[object]:
    about_dense = len(table.heads) > 1 and table.heads[1] == "kind" and row[1] != "subnetwork"
    found = _SPEED.fullmatch(row[-1])
    if found is None or about_dense or not table.heads[-1].startswith("speed") or float(found[1]) >= 1:
        return row
    return Losing((*row[:-1], f"{row[-1]} slower"))
