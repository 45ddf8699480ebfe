"""HTML and SVG as text: everything put in is escaped unless it is HTML already; for reports and for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["Html", "heat_table", "join", "table", "tag"]

_VOID = {"br", "meta"}
_SHAPES = {"circle", "line", "path", "polygon", "polyline", "rect"}


class Html(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element of HTML or SVG.

    Args:
        name: of the element.
        children: `Html` goes in as it is; all else as escaped text; None is left out.
        attributes: a trailing underscore is dropped (`class_`), others become hyphens; None and False are left out,
            True is written without a value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{_text(value, quote=True)}"')
    opened = " ".join(words)
    if name in _VOID:
        return Html(f"<{opened}>")
    if name in _SHAPES and not children:
        return Html(f"<{opened}/>")
    return Html(f"<{opened}>{join(children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after the other, each escaped unless it is `Html`."""
    return Html(between.join(part if isinstance(part, Html) else _text(part) for part in parts if part is not None))


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A small table for a notebook, with a heading for each column and row; styled in place, for any background."""
    left = "text-align:left"
    first = tag("tr", *(tag("th", head, scope="col", style=left) for head in heads))
    body = [
        tag("tr", tag("th", row[0], scope="row", style=left), *(tag("td", cell, style=left) for cell in row[1:]))
        for row in rows
    ]
    return tag("table", tag("caption", title), tag("thead", first) if heads else None, tag("tbody", *body))


def heat_table(
    title: str, corner: str, columns: Sequence[str], rows: Sequence[str], shares: Sequence[Sequence[float | None]]
) -> Html:
    """Shares as percentages on a ground the darker the larger they are: a heat map for a notebook.

    Args:
        title: the caption.
        corner: what the rows' headings are.
        columns, rows: headings.
        shares: one line a row, one number in [0, 1] a column; None where there is none.
    """
    known = [share for line in shares for share in line if share is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    body = []
    for name, line in zip(rows, shares, strict=True):
        cells = [tag("td", "" if share is None else f"{share:.1%}", style=_ground(share, low, high)) for share in line]
        body.append(tag("tr", tag("th", name, scope="row", style="text-align:left"), *cells))
    heads = [tag("th", head, scope="col") for head in (corner, *columns)]
    return tag("table", tag("caption", title), tag("thead", tag("tr", *heads)), tag("tbody", *body))


def _ground(share: float | None, low: float, high: float) -> str:
    # Half transparent at most, so that text keeps its contrast on a light and on a dark page.
    depth = 0.0 if share is None else 0.05 + 0.45 * (share - low) / max(high - low, 0.02)
    return f"text-align:right;background:rgba(56,132,255,{depth:.2f})"


def _text(part: object, *, quote: bool = False) -> str:
    # Characters that no page may hold would make it malformed.
    text = "".join(letter for letter in str(part) if letter in "\t\n" or letter >= " ")
    return html.escape(text, quote=quote)
