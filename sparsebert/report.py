"""`python -m sparsebert.report RUN… --out report.html`: runs as one HTML file that can be sent and opened anywhere."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sparsebert.errors import UserError
from sparsebert.training.command import run_command

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help says how)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 for a user's error."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    parser = _Parser(
        prog="python -m sparsebert.report",
        description="Put runs into one HTML file: plots, heat maps, tables, commands, hardware. It needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--out", "--output", type=Path, default=Path("report.html"), help="the file [report.html]")
    parser.add_argument("--title", default="sparsebert report", help="of the page [sparsebert report]")
    given = parser.parse_args(argv)

    from sparsebert.reports.html.page import command_line, page
    from sparsebert.reports.runs import read_runs
    from sparsebert.training.disk import guard_disk
    from sparsebert.training.folder import write_text
    from sparsebert.training.quiet import quiet

    quiet()
    out = given.out.expanduser()
    if out.is_dir():
        raise UserError(f"out {out}: is a folder; give a file, such as {out / 'report.html'}")
    runs = read_runs(given.runs)
    others = [found for path in given.runs if (found := _analysis(path.expanduser(), {run.folder for run in runs}))]
    with guard_disk(out.parent, new=True):
        out.parent.mkdir(parents=True, exist_ok=True)
    text = page(runs, given.title, command_line(argv), others, lambda line: print(line, file=sys.stderr, flush=True))
    with guard_disk(out.parent):
        write_text(out, text)
    print(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {len(text.encode()) / 1024:.0f} KiB: {out}")
    return 0


def _analysis(path: Path, folders: set[Path]) -> tuple[str, object] | None:
    """The analysis of several runs that lies in their common folder."""
    file = path / "analysis.json"
    if path in folders or not file.is_file():
        return None
    try:
        return path.resolve().name, json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it, or analyse again") from error


if __name__ == "__main__":
    sys.exit(main())
