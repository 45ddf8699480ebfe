"""`python -m sparsebert.reproduce`: runs a paper's table as a grid and prints it beside the published numbers."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsebert.errors import UserError
from sparsebert.training.command import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 where a run failed, 2 for a user's error."""
    return run_command(_run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsebert.reproduce",
        description="Run a table (configs/tables/TABLE.yaml) as a grid of training runs: method x sparsity x task x "
        "seed. What is done already is skipped; run the same line again after an interruption.",
        allow_abbrev=False,
    )
    parser.add_argument("table", help="name of a table in configs/tables, or a YAML file; 'list' lists them")
    parser.add_argument("--seeds", type=int, help="run only the first so many of the table's seeds")
    parser.add_argument("--entries", nargs="+", help="run only these rows (and what they stand on)")
    parser.add_argument("--tasks", nargs="+", help="run only these tasks")
    parser.add_argument("--sparsities", nargs="+", type=float, help="run only these (dense rows are run in any case)")
    parser.add_argument("--variants", nargs="+", help="run only these variants of the data, of a table that has some")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: to see that it runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are divided among them [1]")
    parser.add_argument("--data-dir", help="folder with the tasks' data; without it, the hub")
    parser.add_argument("--text", nargs="+", help="files or folders of plain text, for methods that pre-train on it")
    parser.add_argument("--model", help="a model in place of the one that the configurations name")
    parser.add_argument("--output", type=Path, help="folder of the runs [runs/TABLE]")
    parser.add_argument("--record", action="store_true", help="write the table to benchmarks/results/")
    return parser


def _run(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    from sparsebert.reports.accuracy_table import markdown, records
    from sparsebert.reports.grid import cells_of, configs_folder, load_table, run_cells
    from sparsebert.training.folder import write_text

    if given.table == "list":
        for path in sorted((configs_folder() / "tables").glob("*.yaml")):
            print(f"{path.stem:24} {load_table(path.stem).title}")
        return 0
    for name in ("seeds", "jobs"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    table = load_table(given.table)
    count = 1 if given.quick else given.seeds or len(table.seeds)
    if count > len(table.seeds):
        raise UserError(f"seeds: table {table.name} names {len(table.seeds)}, got {count}")
    cells = cells_of(table, table.seeds[:count])
    for name, known in (("entries", table.entries), ("tasks", table.tasks), ("variants", table.variants)):
        for word in getattr(given, name) or ():
            if word not in known:
                raise UserError(f"{name}: table {table.name} has no {word!r} (known: {', '.join(known)})")
    known_sparsities = {cell.sparsity for cell in cells}
    for sparsity in given.sparsities or ():
        if sparsity not in known_sparsities:
            raise UserError(f"sparsities: table {table.name} has no {sparsity:g}")
    wanted = [
        cell
        for cell in cells
        if (not given.entries or cell.entry.name in given.entries)
        and (not given.tasks or cell.task in given.tasks)
        and (not given.variants or cell.variant in given.variants)
        and (not given.sparsities or cell.sparsity in (None, *given.sparsities))
    ]
    needed = {cell.needs for cell in wanted} - set(wanted) - {None}
    output = given.output or Path("runs") / (table.name + ("-quick" if given.quick else ""))
    values = {"data_dir": given.data_dir, "text": given.text, "model": given.model}
    chosen = [cell for cell in cells if cell in needed or cell in wanted]
    results = run_cells(table, chosen, output, values, jobs=given.jobs, quick=given.quick)
    command = _command(table.name, given)
    text = markdown(table, results, command + (" --quick" if given.quick else ""))
    write_text(output / f"{table.name}.md", text)
    if given.record:
        place = table.folder.parent / "benchmarks" / "results"
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / f"{table.name}.md", text)
        write_text(place / f"{table.name}.json", json.dumps(records(results), indent=1) + "\n")
    print(text, end="")
    return 0 if len(results) == len(chosen) else 1


def _command(table: str, given: argparse.Namespace) -> str:
    """The line that makes these numbers again, without the places of this machine."""
    command = f"python -m sparsebert.reproduce {table}"
    for name in ("seeds", "entries", "tasks", "sparsities", "variants"):
        value = getattr(given, name)
        if value:
            command += f" --{name} {shlex.join(map(str, value)) if isinstance(value, list) else value}"
    command += " --data-dir DIR" if given.data_dir else ""
    command += " --text " + " ".join(Path(path).name for path in given.text) if given.text else ""
    return command


if __name__ == "__main__":
    sys.exit(main())
