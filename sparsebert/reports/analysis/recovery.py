"""Connection recovery: what is kept in the end and was pruned at some moment before (Adapting by Pruning)."""

from __future__ import annotations

from collections.abc import Sequence

from sparsebert.reports.analysis.base import Analysis, Finding, Options, needs_masks
from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table

__all__ = ["RECOVERY"]


def _unfit(run: RunRecord, options: Options) -> str | None:
    if reason := needs_masks(run, options):
        return reason
    return None if "recovery" in run.result else "its result does not say what was ever pruned; train it again"


def _recovery(runs: Sequence[RunRecord], options: Options) -> Finding:
    found = {run.label: run.result["recovery"] for run in runs}
    rows = [
        (run.label, run.result["method"], f"{of['kept']:,}", f"{of['recovered']:,}", f"{of['share']:.2%}")
        for run, of in zip(runs, found.values(), strict=True)
    ]
    heads = ("run", "method", "kept units", "pruned once", "share")
    return Finding({"runs": found}, [Table("connection recovery", heads, rows)])


RECOVERY = Analysis("share of what is kept that was pruned at some moment before", _recovery, _unfit)
