"""Makes the analyses that are asked for, or all that fit, and the report that analysis.json holds."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from sparsebert.errors import UserError, unknown
from sparsebert.reports.analysis import ANALYSES, Finding, Options
from sparsebert.reports.runs import RunRecord

__all__ = ["SCHEMA", "analyse", "merged"]

SCHEMA = 1
"""Version of the layout of analysis.json; a change that readers must know of raises it."""


def analyse(
    runs: Sequence[RunRecord], options: Options, what: Sequence[str] | None, command: str
) -> tuple[dict[str, Any], dict[str, Finding]]:
    """Analyses of runs.

    Args:
        runs: with labels that differ.
        options: of all analyses.
        what: names of analyses; None makes all that fit the runs and train nothing.
        command: the command line, for the report.

    Returns:
        The report, and the findings by name. The report is plain values: `schema`; `runs`, each with `label`,
        `method`, `task`, `metric`, `score`, `sparsity` (the target) and `seed`; `analyses`, by name `data` (see the
        analysis), `tables` (each `title`, `heads`, `rows` of words, `notes`), the labels of the `runs` it is made
        from, `date` and `command`; `left_out`, by name what was not made and of which run, with the reason.

    Raises:
        UserError: an unknown name, or with `what` a run that an analysis cannot be made from.
    """
    for name in what or ():
        if name not in ANALYSES:
            raise unknown("analysis", name, ANALYSES)
    plans = {name: _plan(name, runs, options) for name in ANALYSES if what is None or name in what}
    if what is not None:
        # Before anything is made, which may take minutes.
        for name, (_, words) in plans.items():
            if words:
                raise UserError(f"{name}: cannot be made: {'; '.join(words)}")
    findings: dict[str, Finding] = {}
    made: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, (fitting, words) in plans.items():
        analysis = ANALYSES[name]
        if what is None and analysis.trains:
            left_out[name] = f"it trains; ask for it with --what {name}"
            continue
        try:
            if len(fitting) >= analysis.least:
                findings[name] = analysis.make(fitting, options)
                made[name] = _record(findings[name], fitting, command)
        except UserError as error:
            if what is not None:
                raise UserError(f"{name}: {error}") from error
            words.append(str(error))
        if words:
            left_out[name] = "; ".join(words)
    return {"schema": SCHEMA, "runs": _about(runs), "analyses": made, "left_out": left_out}, findings


def _plan(name: str, runs: Sequence[RunRecord], options: Options) -> tuple[list[RunRecord], list[str]]:
    """The runs that an analysis can be made from, and what is in its way."""
    analysis = ANALYSES[name]
    reasons = {run.label: reason for run in runs if (reason := analysis.unfit(run, options))}
    fitting = [run for run in runs if run.label not in reasons]
    words = _grouped(reasons, len(runs))
    if len(fitting) < analysis.least > 1:
        words.append(f"it takes {analysis.least} runs or more")
    return fitting, words


def _grouped(reasons: Mapping[str, str], runs: int) -> list[str]:
    """Each reason once, with the labels of the runs that it holds for."""
    labels: dict[str, list[str]] = {}
    for label, reason in reasons.items():
        labels.setdefault(reason, []).append(label)
    return [f"{'every run' if len(names) == runs > 1 else ', '.join(names)}: {r}" for r, names in labels.items()]


def merged(report: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The report with the analyses of an earlier one of the very same runs that were not made again."""
    if before is None or before.get("schema") != SCHEMA or before.get("runs") != report["runs"]:
        return report
    analyses = {**before.get("analyses", {}), **report["analyses"]}
    left_out = {**before.get("left_out", {}), **report["left_out"]}
    # A reason stands beside an analysis only where it says which runs are not in it.
    gone = {name for name in analyses if name not in report["left_out"] or name not in report["analyses"]}
    return {
        **report,
        "analyses": {name: analyses[name] for name in ANALYSES if name in analyses},
        "left_out": {name: reason for name, reason in left_out.items() if name not in gone},
    }


def _record(finding: Finding, runs: Sequence[RunRecord], command: str) -> dict[str, Any]:
    return {
        "data": finding.data,
        "tables": [dataclasses.asdict(table) for table in finding.tables],
        "runs": [run.label for run in runs],
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "command": command,
    }


def _about(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    keys = ("method", "task", "metric", "score", "seed")
    return [
        {
            "label": run.label,
            **{key: run.result[key] for key in keys},
            "sparsity": run.result["sparsity"].get("target"),
        }
        for run in runs
    ]
