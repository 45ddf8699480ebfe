"""The results of a table of runs, as Markdown and as JSON: mean and spread over seeds, published numbers beside."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparsebert.reports.grid import Cell, Table

__all__ = ["markdown", "records"]

_KEPT = (
    "method", "task", "metric", "score", "metrics", "train_score", "held_out_score", "curve", "seed", "seconds",
    "precision", "phases", "teacher",
)  # fmt: skip


def markdown(table: Table, results: Mapping[Cell, Mapping[str, Any]], command: str) -> str:
    """A row an entry, sparsity and variant; a column a task; the mean of the tasks where a row has all of them.

    Args:
        table: what was run.
        results: each cell's `result.json`.
        command: that makes the table again.
    """
    lines = [f"# {table.title}", ""]
    if results:
        first = next(iter(results.values()))
        seeds = sorted({cell.seed for cell in results})
        sources = sorted({str(result["model"]["source"]).rpartition("/")[2] for result in results.values()})
        lines += [
            f"Made by `{command}` on {datetime.date.today():%Y-%m-%d}; model {', '.join(sources)}, seeds "
            f"{', '.join(map(str, seeds))}, precision {first['precision']}, {first['hardware']['cpu']}, torch "
            f"{first['versions']['torch']}, transformers {first['versions']['transformers']}. Scores are of the "
            "validation set at the last step, in points; nothing was chosen by it. ± is the standard deviation over "
            "seeds.",
            "",
        ]
    lines += [table.note.strip(), ""] if table.note else []
    lines += _body(table, results)
    lines += _watched(table, {cell: result for cell, result in results.items() if result.get("curve")})
    if table.published:
        lines += ["", f"Published ({table.source.strip()}; another model and other data, in points):", ""]
        lines += _published(table)
    return "\n".join(lines) + "\n"


def _body(table: Table, results: Mapping[Cell, Mapping[str, Any]]) -> list[str]:
    tasks = list(table.tasks)
    metrics = {cell.task: result["metric"] for cell, result in results.items()}
    varied, pruned = len(table.variants) > 1, any(cell.sparsity is not None for cell in results)
    head = ["method", *(["sparsity"] if pruned else []), *(["data"] if varied else [])]
    head += [f"{task} ({metrics.get(task, '')})" for task in tasks] + (["mean"] if len(tasks) > 1 else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for variant in table.variants:
        for entry in table.entries.values():
            for sparsity in entry.sparsities:
                found = [
                    (cell, result["score"])
                    for cell, result in results.items()
                    if _row(cell) == (entry.name, sparsity, variant)
                ]
                if entry.hidden or not found:
                    continue
                row = [entry.label]
                row += [f"{sparsity:.0%}" if sparsity is not None else "dense"] if pruned else []
                row += [variant] if varied else []
                row += [_spread([score for cell, score in found if cell.task == task]) for task in tasks]
                row += [_spread(_means(found, tasks))] if len(tasks) > 1 else []
                lines.append("| " + " | ".join(row) + " |")
    return lines


def _watched(table: Table, results: Mapping[Cell, Mapping[str, Any]]) -> list[str]:
    """What was scored on training rows and on a slice held out of them while training: at the end, and on the way."""
    if not results:
        return []
    rows = list(dict.fromkeys(map(_row, results)))
    tasks = [task for task in table.tasks if any(cell.task == task for cell in results)]
    lines = [
        "",
        "Over-fitting: the score on training rows less that on as many rows held out of them, at the last step; ± over "
        "seeds. Below it both on the way, each time they were watched, their means over seeds.",
        "",
        "| method | " + " | ".join(tasks) + " | mean |",
        "|---|" + "---|" * (len(tasks) + 1),
    ]
    for row in rows:
        gaps = [(cell, scores["curve"][-1]) for cell, scores in results.items() if _row(cell) == row]
        found = [(cell, last["train"] - last["held_out"]) for cell, last in gaps]
        shown = [_spread([gap for cell, gap in found if cell.task == task]) for task in tasks]
        lines.append("| " + " | ".join([_label(table, row), *shown, _spread(_means(found, tasks))]) + " |")
    for task in tasks:
        turns = max(len(scores["curve"]) for cell, scores in results.items() if cell.task == task)
        lines += ["", f"| {task}: train / held out | " + " | ".join(map(str, range(1, turns + 1))) + " |"]
        lines.append("|---|" + "---|" * turns)
        for row in rows:
            curves = [scores["curve"] for cell, scores in results.items() if (cell.task, _row(cell)) == (task, row)]
            shown = [_pair([curve[turn] for curve in curves if turn < len(curve)]) for turn in range(turns)]
            lines.append("| " + " | ".join([_label(table, row), *shown]) + " |")
    return lines


def _row(cell: Cell) -> tuple[str, float | None, str]:
    return cell.entry.name, cell.sparsity, cell.variant


def _label(table: Table, row: tuple[str, float | None, str]) -> str:
    entry, sparsity, variant = row
    words = [table.entries[entry].label, *([f"{sparsity:.0%}"] if sparsity is not None else []), variant]
    return ", ".join(word for word in words if word)


def _pair(points: Sequence[Mapping[str, float]]) -> str:
    if not points:
        return ""
    train, held_out = (100 * statistics.mean(point[name] for point in points) for name in ("train", "held_out"))
    return f"{train:.0f} / {held_out:.0f}"


def _means(found: Sequence[tuple[Cell, float]], tasks: Sequence[str]) -> list[float]:
    """The mean over all tasks, of each seed that has them all."""
    means = []
    for seed in sorted({cell.seed for cell, _ in found}):
        scores = {cell.task: score for cell, score in found if cell.seed == seed}
        if len(scores) == len(tasks):
            means.append(statistics.mean(scores.values()))
    return means


def _spread(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    text = f"{100 * statistics.mean(scores):.1f}"
    if len(scores) == 1:
        return text
    return f"{text} ± {100 * statistics.stdev(scores):.1f}"


def _published(table: Table) -> list[str]:
    tasks = list(dict.fromkeys(str(row["task"]) for row in table.published))
    keys = list(dict.fromkeys((str(row["entry"]), row.get("sparsity")) for row in table.published))
    lines = ["| method | sparsity | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
    for entry, sparsity in keys:
        scores = {
            str(row["task"]): row["score"]
            for row in table.published
            if (str(row["entry"]), row.get("sparsity")) == (entry, sparsity)
        }
        label = table.entries[entry].label if entry in table.entries else entry
        shown = f"{sparsity:.0%}" if sparsity is not None else "dense"
        lines.append(f"| {label} | {shown} | " + " | ".join(str(scores.get(task, "")) for task in tasks) + " |")
    return lines


def records(results: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the table stands on, a record a run."""
    return [
        {
            "entry": cell.entry.name,
            "sparsity": cell.sparsity,
            "variant": cell.variant,
            **{key: _without_places(result[key]) for key in _KEPT if key in result},
            "realised": result["sparsity"]["masked"],
            "data": _without_places(result["data"]),
            "versions": result["versions"],
            "hardware": result["hardware"],
        }
        for cell, result in results.items()
    ]


def _without_places(value: Any) -> Any:
    """A path on this machine says nothing to others: its last part stays."""
    if isinstance(value, Mapping):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return value.rpartition("/")[2] if isinstance(value, str) and value.startswith("/") else value
