"""A run's result as a table: rich on a terminal, plain text in a pipe."""

from __future__ import annotations

import sys
from typing import Any

from sparsebert.training.folder import RunFolder

__all__ = ["plain_table", "result_table"]


def plain_table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns; a terminal gets rich's box around them."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False)
        for row in rows:
            table.add_row(*row)
        console = Console()
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip("\n")
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def result_table(result: dict[str, Any], folder: RunFolder) -> str:
    """What a finished run reports."""
    metric, sparsity = result["metric"], result["sparsity"]
    pruned = result["pattern"] is not None
    rows = [
        ("method", result["method"] + (f", {result['pattern']}, target {sparsity['target']:.1%}" if pruned else "")),
        ("task", f"{result['task']}, {result['data']['rows']['validation']} validation examples"),
        (f"{metric}" + (" of the pruned model" if pruned else ""), f"{result['score']:.4f}"),
    ]
    others = [key for key in result["metrics"] if key != metric]
    if others:
        rows.append(("also", ", ".join(f"{key} {result['metrics'][key]:.4f}" for key in others)))
    if "teacher" in result and "score" in result["teacher"]:
        rows.append((f"{metric} of the teacher", f"{result['teacher']['score']:.4f}"))
    if "untouched" in result:
        rows.append((f"{metric} untouched (feature extraction)", f"{result['untouched'][metric]:.4f}"))
    rows += [
        ("sparsity, whole model", f"{sparsity['model']:.2%} of {sparsity['parameters']:,} parameters"),
        ("sparsity, encoder", f"{sparsity['encoder']:.2%}"),
    ]
    if pruned:
        rows.append(("masks", f"{sparsity['mask_bytes']:,} bytes"))
    rows += [
        ("time", f"{result['seconds']:.0f} s, {result['precision']}"),
        ("saved", str(folder.root)),
    ]
    if result["note"]:
        rows.append(("note", result["note"]))
    return plain_table(rows)
