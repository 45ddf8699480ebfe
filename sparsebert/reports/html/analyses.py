"""What `sparsebert.analyze` wrote, as plots and tables: its own, else its numbers as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsebert._html import Html, tag
from sparsebert.reports.html.analysis_plots import analysis_plots
from sparsebert.reports.html.tables import plain_table

__all__ = ["analysis_parts"]

_MOST_ROWS = 200


def analysis_parts(content: Any) -> list[Html]:
    """All that an analysis.json holds, and what was left out.

    Args:
        content: of the file, of any shape; what is not as `sparsebert.analyze` writes it is shown as it is.
    """
    if not isinstance(content, dict) or not isinstance(content.get("analyses"), dict):
        return _parts("analysis.json", content)
    parts: list[Html] = []
    for name, record in content["analyses"].items():
        plots = analysis_plots(name, record.get("data")) if isinstance(record, dict) else []
        if plots:
            parts.append(tag("div", *(plot.html() for plot in plots), class_="plots"))
        parts += _parts(name, record)
        if isinstance(record, dict) and "command" in record:
            parts.append(tag("p", f"{record.get('date', '')}: ", tag("code", record["command"]), class_="note"))
    left_out = content.get("left_out")
    for name, reason in left_out.items() if isinstance(left_out, dict) else ():
        parts.append(tag("p", f"{name} left out: {reason}", class_="missing"))
    return parts


def _parts(name: str, content: Any) -> list[Html]:
    found = [_own(table) for table in _tables(content)]
    if found:
        return found
    rows = list(_leaves(content))
    if not rows:
        return []
    more = len(rows) - _MOST_ROWS
    shown = plain_table(name, ("what", "value"), rows[:_MOST_ROWS])
    return [shown, tag("p", f"{more} more numbers in analysis.json", class_="note")] if more > 0 else [shown]


def _tables(content: Any) -> Iterator[Mapping[str, Any]]:
    """Every table in it: an object with `heads` and `rows`, all rows as long as the heads."""
    if isinstance(content, dict):
        heads, rows = content.get("heads"), content.get("rows")
        if isinstance(heads, list) and isinstance(rows, list) and heads:
            if all(isinstance(row, list) and len(row) == len(heads) for row in rows):
                yield content
        else:
            for value in content.values():
                yield from _tables(value)
    elif isinstance(content, list):
        for value in content:
            yield from _tables(value)


def _own(table: Mapping[str, Any]) -> Html:
    notes = table.get("notes")
    shown = plain_table(str(table.get("title", "")), [str(head) for head in table["heads"]], table["rows"])
    return tag("div", shown, *(tag("p", note, class_="note") for note in (notes if isinstance(notes, list) else ())))


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value with where it stands."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{path} · {key}" if path else str(key))
    elif isinstance(content, list) and any(isinstance(value, (dict, list)) for value in content):
        for place, value in enumerate(content):
            yield from _leaves(value, f"{path} · {place}" if path else str(place))
    elif isinstance(content, list):
        yield path, ", ".join(map(_word, content))
    else:
        yield path, _word(content)


def _word(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
