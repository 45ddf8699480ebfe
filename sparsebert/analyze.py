"""`python -m sparsebert.analyze RUN...`: what the papers study of their subnetworks, from finished runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sparsebert.errors import UserError
from sparsebert.training.command import run_command

if TYPE_CHECKING:
    from sparsebert.reports.runs import RunRecord

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help says how)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 for a user's error."""
    return run_command(_run, argv)


def _parser() -> argparse.ArgumentParser:
    from sparsebert.reports.analysis import ANALYSES

    lines = "\n".join(
        f"  {name:12} {analysis.summary}" + (" (only when asked for)" if analysis.trains else "")
        for name, analysis in ANALYSES.items()
    )
    parser = _Parser(
        prog="python -m sparsebert.analyze",
        description=f"What the papers study of their subnetworks, from finished runs.\n\nanalyses:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, or a folder of runs")
    add("--what", nargs="+", help="names of analyses [all that fit the runs and train nothing]")
    add("--output", type=Path, help="folder for analysis.json [the run's; of several runs, the one they all lie in]")
    add("--data-dir", help="where the runs' data are now, if they have moved")
    add("--max-samples", type=int, default=1000, help="rows of train and of validation that are looked at [1000]")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of shuffles, new weights and directions [0 1 2]")
    add("--head-steps", type=int, default=300, help="steps that train a new head, for shuffle and reinit [300]")
    add("--teacher", type=Path, help="a dense run, for layers, in place of the run's own teacher")
    add("--json", action="store_true", help="print the report as JSON")
    return parser


def _run(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    for name, least in (("max_samples", 1), ("head_steps", 1)):
        if getattr(given, name) < least:
            raise UserError(f"{name}: expected at least {least}, got {getattr(given, name)}")
    if min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
        raise UserError(f"seeds: expected different numbers of at least 0, got {' '.join(map(str, given.seeds))}")

    from sparsebert.reports.analysis import Options
    from sparsebert.reports.analysis.collect import analyse, merged
    from sparsebert.reports.runs import read_runs
    from sparsebert.reports.speed_table import shown
    from sparsebert.training.disk import guard_disk
    from sparsebert.training.folder import write_text
    from sparsebert.training.quiet import quiet

    quiet()
    runs = read_runs(given.runs)
    options = Options(
        data_dir=given.data_dir,
        max_samples=given.max_samples,
        seeds=tuple(given.seeds),
        head_steps=given.head_steps,
        teacher=given.teacher,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    what = [name for word in given.what for name in word.split(",") if name] if given.what else None
    # The report is for others too: where a folder lies on this machine is nobody else's business.
    words = [Path(word).name if os.path.isabs(word) else word for word in argv]
    report, findings = analyse(runs, options, what, shlex.join(["python", "-m", "sparsebert.analyze", *words]))
    output = given.output or _place(runs)
    if output is not None:
        with guard_disk(output, new=True):
            output.mkdir(parents=True, exist_ok=True)
            whole = merged(report, _before(output / "analysis.json"))
            write_text(output / "analysis.json", json.dumps(whole, indent=1) + "\n")
    if given.json:
        print(json.dumps(report))
        return 0
    lead = "\n".join(f"left out: {name}: {reason}" for name, reason in report["left_out"].items())
    print(shown(lead, [table for finding in findings.values() for table in finding.tables]))
    print(f"\nwritten: {output / 'analysis.json'}" if output else "\nnot written; give --output FOLDER")
    return 0


def _place(runs: Sequence[RunRecord]) -> Path | None:
    """Where the report goes: into the run's folder; of several runs, into the folder that they all lie in."""
    if len(runs) == 1:
        return runs[0].folder
    parents = {run.folder.resolve().parent: run.folder.parent for run in runs}
    return next(iter(parents.values())) if len(parents) == 1 else None


def _before(path: Path) -> dict[str, Any] | None:
    """An earlier report there; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


if __name__ == "__main__":
    sys.exit(main())
