"""Rows of the tables: what was measured in a cell, its targets, and their JSON and Markdown. Without torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Row", "Target", "judged", "markdown", "rivals", "slug", "summary", "write"]

Row = dict[str, Any]
"""`kind` is "speed" (with `times`), "fact" (with `facts`), "red" (with `why`) or "skipped" (with `why`); all have
`cell` and `case`. Times are in milliseconds."""


@dataclass(frozen=True)
class Target:
    """A goal of performance.md §9 (or one of the project's own), and how a row is held against it."""

    goal: str
    """Its number: "G5"."""
    measure: Literal["faster", "slower", "limit", "value", "rate"]
    """faster: time of `against` / ours, at least `bound`. slower: ours / `against`, at most `bound`. limit: physical
    limit / ours, at least `bound`. value: the fact `key`, at most `bound`; rate: the fact `key`, at least `bound`."""
    bound: float | Mapping[str, float]
    """A number, or one for each kind of device ("H100", "H200"; another takes the first)."""
    against: tuple[str, ...] = ()
    """Candidates compared with, the best of them; () is all."""
    key: str = ""
    ours: str = ""
    """Which candidate is ours, where it is not the row's subject."""

    def bound_on(self, device: str) -> float:
        """The bound for a device of this name."""
        if not isinstance(self.bound, Mapping):
            return float(self.bound)
        return next((b for kind, b in self.bound.items() if kind in device), next(iter(self.bound.values())))


def judged(target: Target, row: Row, device: str) -> dict[str, Any]:
    """`target` held against `row`: what was wanted, what came, whether it is met (None where it cannot be told)."""
    bound, got = target.bound_on(device), _measured(target, row)
    least = target.measure in ("faster", "limit", "rate")
    names = " or ".join(target.against) or "the best other"
    said = {
        "faster": f"{bound:g}x as fast as {names}",
        "slower": f"{bound:g}x the time of {names}",
        "limit": f"{bound:.0%} of the physical limit",
        "value": f"{target.key} {bound:g}",
        "rate": f"{target.key} {bound:g}",
    }[target.measure]
    met = None if got is None else (got >= bound if least else got <= bound)
    return {
        "goal": target.goal,
        "wanted": f"{f'{target.ours}: ' if target.ours else ''}{'>=' if least else '<='} {said}",
        "got": None if got is None else round(got, 4),
        "met": met,
    }


def _measured(target: Target, row: Row) -> float | None:
    if target.measure in ("value", "rate"):
        value = row.get("facts", {}).get(target.key, row.get(target.key))
        return None if value is None else float(value)
    times = row.get("times", {})
    subject = target.ours or row.get("subject")
    ours = times.get(subject, {}).get("median")
    if not ours:
        return None
    if target.measure == "limit":
        limit = row.get("limit ms")
        return None if limit is None else limit / ours
    names = target.against or rivals(times, str(subject))
    others = [times[name]["median"] for name in names if name in times]
    if not others:
        return None
    return min(others) / ours if target.measure == "faster" else ours / min(others)


def rivals(names: Iterable[str], subject: str) -> list[str]:
    """The candidates that are none of ours: neither the subject nor a variant of it ("sparsebert, new mask")."""
    return [name for name in names if name != subject and not name.startswith(f"{subject}, ")]


def slug(words: str) -> str:
    """A device's name as a folder: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def write(folder: Path, part: str, head: Mapping[str, Any], rows: Sequence[Row], note: str) -> None:
    """Writes `<part>.json` and `<part>.md`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"part": part, "head": dict(head), "note": note, "rows": list(rows)}
    texts = {
        "json": json.dumps(_finite(record), indent=1, allow_nan=False),
        "md": markdown(part, head, rows, note),
    }
    for ending, text in texts.items():
        half = folder / f".{part}.{ending}.part"
        half.write_text(text.rstrip() + "\n", encoding="utf-8")
        half.replace(folder / f"{part}.{ending}")


def _finite(value: Any) -> Any:
    """`value` with numbers that JSON does not have as words."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def markdown(part: str, head: Mapping[str, Any], rows: Sequence[Row], note: str) -> str:
    """The rows of a part as one page."""
    lines = [f"# {part}", "", *(f"- {name}: {_said(value)}" for name, value in head.items()), "", note]
    speeds = [row for row in rows if row["kind"] == "speed"]
    facts = [row for row in rows if row["kind"] == "fact"]
    if speeds:
        lines += [
            "",
            "Milliseconds: median (lowest to highest) of candidates timed in turns. `best` is the quickest other "
            "candidate's median over ours: below 1 ours loses. `error` is ‖ours - exact‖ / ‖exact‖ against float64 or "
            "float32. `limit` is the least time that memory and arithmetic allow.",
            "",
            *_table([_speed_cells(row) for row in speeds], _SPEED_HEADS),
        ]
    if facts:
        lines += ["", *_table([_fact_cells(row) for row in facts], ("cell", "case", "found", "targets"))]
    for kind, title in (("red", "Failed: no speed is reported"), ("skipped", "Skipped")):
        found = [row for row in rows if row["kind"] == kind]
        if found:
            cells = [[row["cell"], _case(row), row["why"]] for row in found]
            lines += ["", f"## {title}", "", *_table(cells, ("cell", "case", "why"))]
    notes = list(dict.fromkeys(_notes(rows)))
    if notes:
        lines += ["", "## Notes", "", *(f"- {line}" for line in notes)]
    return "\n".join(lines)


_SPEED_HEADS = ("cell", "case", "timed", "ours, ms", "others, ms (over ours)", "best", "error", "limit, ms", "share",
                "targets")  # fmt: skip


def _speed_cells(row: Row) -> list[str]:
    times, subject = row["times"], row.get("subject")
    ours = times.get(subject)
    others = []
    for name, time in times.items():
        if name != subject:
            over = f" ({time['median'] / ours['median']:.2f}x)" if ours else ""
            others.append(f"{name} {_ms(time)}{over}")
    return [
        row["cell"],
        _case(row),
        row["timed"],
        (_ms(ours) if subject == "sparsebert" else f"{subject} {_ms(ours)}") if ours else "-",
        "<br>".join(others) or "-",
        _number(row.get("best")),
        _number(row.get("error")),
        _number(row.get("limit ms")) + (f" ({row['limit from']})" if row.get("limit from") else ""),
        _number(row.get("share")),
        _targets(row),
    ]


def _fact_cells(row: Row) -> list[str]:
    found = "<br>".join(f"{name}: {_said(value)}" for name, value in row["facts"].items())
    return [row["cell"], _case(row), found, _targets(row)]


def _targets(row: Row) -> str:
    words = {True: "met", False: "**not met**", None: "cannot be told"}
    said = [f"{t['goal']} {t['wanted']}: {_number(t['got'])}, {words[t['met']]}" for t in row.get("targets", ())]
    return "<br>".join(said) or "-"


def _notes(rows: Sequence[Row]) -> list[str]:
    found = []
    for row in rows:
        found += [f"{row['cell']}: {line}" for line in row.get("notes", ())]
        found += [f"{row['cell']}: {name} was left out: {why}" for name, why in row.get("left out", {}).items()]
    return found


def _case(row: Row) -> str:
    return ", ".join(f"{name} {_said(value)}" if name else _said(value) for name, value in row["case"].items())


def _ms(time: Mapping[str, Any]) -> str:
    return f"{_number(time['median'])} ({_number(time['low'])} to {_number(time['high'])})"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.3g}" if isinstance(value, float) and not 1000 <= abs(value) < 1e6 else f"{value:.0f}"


def _said(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(item)}" for name, item in value.items())
    return ", ".join(map(_said, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(cells: Sequence[Sequence[str]], heads: Sequence[str]) -> list[str]:
    clean = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    lines = [list(heads), ["---"] * len(heads), *clean]
    return ["| " + " | ".join(line) + " |" for line in lines]


def summary(row: Row) -> str:
    """One line for the terminal."""
    what = f"{row['cell']}: {_case(row)}"
    if row["kind"] in ("red", "skipped"):
        return f"{row['kind'].upper():8}{what}: {row['why']}"
    if row["kind"] == "fact":
        return f"        {what}: {_said(row['facts'])}{_judgement(row)}"
    ours = row["times"].get(row.get("subject"))
    best = f", {row['best']:.2f}x the best other" if row.get("best") else ""
    listed = "; ".join(f"{name} {_ms(time)}" for name, time in row["times"].items())
    if ours:
        listed = f"{row['subject']} {_ms(ours)}"
    return f"        {what} [{row['timed']}]: {listed} ms{best}{_judgement(row)}"


def _judgement(row: Row) -> str:
    words = {True: "met", False: "NOT met", None: "?"}
    said = "; ".join(f"{t['goal']} {t['wanted']} {words[t['met']]}" for t in row.get("targets", ()))
    return f" | {said}" if said else ""
