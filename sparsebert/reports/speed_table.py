"""The measurements as tables: rich on a terminal, plain text in a pipe, and Markdown in a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "markdown", "shown", "tables", "terminal"]


@dataclass(frozen=True)
class Table:
    """A table of words, with a title and lines below it."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def plain(self) -> str:
        """Aligned columns: the first to the left, the others to the right."""
        widths = [max(len(line[column]) for line in (self.heads, *self.rows)) for column in range(len(self.heads))]
        lines = [self.title]
        for line in (self.heads, *self.rows):
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            lines.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        """A section of a Markdown file."""
        lines = [self.heads, ("---", *("---:" for _ in self.heads[1:])), *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([f"## {self.title}", body, *self.notes])


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report that `measure` made, the batches' first; those without rows are left out."""
    found = [_case(case) for case in report["cases"]]
    found += [_memory(report), _scores(report), _layers(report), _break_even(report), _what_if(report)]
    return [table for table in found if table.rows]


def terminal(report: Mapping[str, Any]) -> str:
    """The report as it is printed."""
    return shown("\n".join(_lead(report)), tables(report))


def shown(lead: str, tables: Sequence[Table]) -> str:
    """Lines of text and tables as they are printed: boxes on a terminal, plain text in a pipe."""
    if not sys.stdout.isatty():
        return "\n\n".join([*([lead] if lead else []), *(table.plain() for table in tables)])
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Box

    console = Console()
    with console.capture() as capture:
        if lead:
            console.print(escape(lead))
        for table in tables:
            box = Box(title=escape(table.title), title_justify="left")
            for number, head in enumerate(table.heads):
                box.add_column(escape(head), justify="right" if number else "left")
            for row in table.rows:
                box.add_row(*map(escape, row))
            console.print()
            console.print(box)
            for note in table.notes:
                console.print(escape(note))
    return capture.get().rstrip("\n")


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown file, its conditions below."""
    conditions = report["conditions"]
    hardware = ", ".join(f"{name} {value}" for name, value in conditions["hardware"].items())
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    lines = [
        f"date: {conditions['date']}",
        f"command: `{conditions['command']}`",
        f"hardware: {hardware}",
        f"measured on: {conditions['device']}, {conditions['threads']} threads",
        f"rounds: {conditions['repeats']} at most, seed {conditions['seed']}",
        f"versions: {versions}",
    ]
    if conditions["lengths"]:
        lines.append("real lengths: " + "; ".join(map(str, conditions["lengths"].values())))
    below = "## Conditions\n\n" + "\n".join(f"- {line}" for line in lines)
    lead = "\n".join(f"- {line}" for line in _lead(report))
    return "\n\n".join(["# benchmark", lead, *(table.markdown() for table in tables(report)), below]) + "\n"


def _lead(report: Mapping[str, Any]) -> list[str]:
    """What comes before the tables: what was measured, what the numbers say, and what is missing."""
    subject = report["subject"]
    pruned = (
        f"{subject['pattern']}, {subject['sparsity']:.1%} of the masked weights gone" if subject["pattern"] else "dense"
    )
    lines = [f"{subject['where']}: {subject['model_type']}, {pruned}"]
    if subject["imposed"]:
        lines.append("the masks were put on by magnitude to measure speed alone: nothing is known of the accuracy")
    lines += [f"{case['case']}: {case['verdict']}" for case in report["cases"]]
    lines += [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    note = report["conditions"]["lengths"].get("note")
    return [*lines, *([note] if note else [])]


def _case(case: Mapping[str, Any]) -> Table:
    rows, notes = [], []
    for row in case["rows"]:
        if row["status"] != "ok":
            notes.append(f"{row['variant']}: failed, no speed is given: {row['reason']}")
            continue
        numbers = (f"{row['p50_ms']:.3f}", f"{row['p90_ms']:.3f}", f"{row['sentences_per_second']:.1f}")
        rows.append((row["variant"], row["kind"], *numbers, f"{row['tokens_per_second']:.0f}", _times(row["speedup"])))
    heads = ("variant", "kind", "p50 ms", "p90 ms", "sentences/s", "tokens/s", "speed against best dense")
    return Table(f"batch {case['case']} ({case['kind']} lengths)", heads, rows, (*notes, case["verdict"]))


def _memory(report: Mapping[str, Any]) -> Table:
    rows, notes = [], []
    for variant in report["variants"]:
        memory, weights = variant.get("memory", {}), variant.get("weights", {})
        sizes = [weights.get("total"), weights.get("linears"), memory.get("resident"), memory.get("peak")]
        rows.append((variant["variant"], *map(_mib, sizes), _formats(variant.get("layers"))))
        if "reason" in memory or "note" in memory:
            notes.append(f"{variant['variant']}: {memory.get('reason') or memory['note']}")
    measured = [variant["memory"]["case"] for variant in report["variants"] if "memory" in variant]
    if measured:
        notes.insert(
            0,
            "resident and peak: what a process of its own holds more than before it loaded the model, with the variant "
            f"built, and at the worst moment of batch {measured[0]}",
        )
    heads = ("variant", "weights MiB", "of linears", "resident MiB", "peak MiB", "layers by format")
    return Table("memory", heads, rows, tuple(notes))


def _scores(report: Mapping[str, Any]) -> Table:
    accuracy = report["accuracy"]
    rows = []
    if "score" in accuracy:
        rows.append((f"the run's own, {accuracy['precision']}", f"{accuracy['score']:.4f}"))
    for name, metrics in accuracy.get("scores", {}).items():
        rows.append((name, f"{metrics[accuracy['metric']]:.4f}"))
    return Table("accuracy", ("variant", str(accuracy.get("metric", ""))), rows)


def _layers(report: Mapping[str, Any]) -> Table:
    rows = []
    for row in report["layers"]:
        best = row["best"]
        ours = ("-", "-", "-") if best is None else (best, f"{row['ms'][best]:.4f}", _times(row["speedup"]))
        dense = (row["best_dense"], f"{row['ms'][row['best_dense']]:.4f}")
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        rows.append((shape, f"{row['sparsity']:.0%}", str(len(row["layers"])), str(row["rows"]), *dense, *ours))
    heads = ("out x in", "sparsity", "layers", "rows", "best dense", "ms", "best format", "ms", "speed")
    return Table("layer by layer", heads, rows)


def _break_even(report: Mapping[str, Any]) -> Table:
    rows = []
    for row in report["break_even"]:
        shares = [float(share) for share in row["ms"]]
        even = row["break_even"]
        words = (
            f"above {max(shares):.0%}" if even is None else f"below {min(shares):.0%}" if not even else f"{even:.0%}"
        )
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        rows.append((shape, str(row["rows"]), row["format"], row["best_dense"], f"{row['dense_ms']:.4f}", words))
    heads = ("out x in", "rows", "format", "best dense", "ms", "breaks even at")
    return Table("break-even, by random masks", heads, rows)


def _what_if(report: Mapping[str, Any]) -> Table:
    rows, notes = [], []
    for row in report["what_if"]:
        if "reason" in row:
            notes.append(f"{row['pattern']} at {row['sparsity']:.0%}, {row['variant']}: failed: {row['reason']}")
            continue
        times = (f"{row['p50_ms']:.3f}", f"{row['dense_ms']:.3f}", _times(row["speedup"]))
        rows.append((row["case"], row["pattern"], f"{row['sparsity']:.0%}", row["variant"], *times))
    heads = ("batch", "pattern", "sparsity", "variant", "p50 ms", "best dense ms", "speed")
    return Table("what if: other patterns, by random masks", heads, rows, tuple(notes))


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.2f}"


def _formats(layers: Mapping[str, int] | None) -> str:
    if layers is None:
        return "-"
    return ", ".join(f"{count} {word}" for word, count in layers.items()) or "all dense"
