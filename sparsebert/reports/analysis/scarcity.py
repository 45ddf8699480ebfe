"""Score against the number of training rows (TAMT and CR-ILD, their few-sample studies)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsebert.errors import UserError
from sparsebert.reports.analysis.base import Analysis, Finding, Options, mean_and_spread, spread_text
from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table

__all__ = ["SCARCITY"]


def _rows(run: RunRecord) -> int | None:
    rows = run.result.get("data", {}).get("rows", {}).get("train")
    return rows if isinstance(rows, int) else None


def _unfit(run: RunRecord, options: Options) -> str | None:
    return "its result does not say how many rows it was trained on" if _rows(run) is None else None


def _scarcity(runs: Sequence[RunRecord], options: Options) -> Finding:
    curves: dict[tuple[str, str, str, float | None], dict[int, list[float]]] = {}
    for run in runs:
        result = run.result
        key = (result["task"], result["method"], result["metric"], result["sparsity"].get("target"))
        curves.setdefault(key, {}).setdefault(_rows(run) or 0, []).append(float(result["score"]))
    curves = {key: points for key, points in curves.items() if len(points) > 1}
    if not curves:
        raise UserError("no two runs of one method, task and sparsity differ in their training rows (--few-samples)")
    found: list[dict[str, Any]] = []
    rows = []
    for (task, method, metric, sparsity), points in sorted(curves.items(), key=lambda item: str(item[0])):
        curve = []
        for count, scores in sorted(points.items()):
            mean, spread = mean_and_spread(scores)
            curve.append({"rows": count, "mean": mean, "std": spread, "scores": scores})
            shown = "dense" if not sparsity else f"{sparsity:.0%}"
            rows.append((method, task, shown, f"{count:,}", spread_text(scores), str(len(scores))))
        found.append({"task": task, "method": method, "metric": metric, "sparsity": sparsity, "points": curve})
    heads = ("method", "task", "sparsity", "training rows", "score", "runs")
    return Finding({"curves": found}, [Table("score against training rows", heads, rows)])


SCARCITY = Analysis("score against the number of training rows", _scarcity, _unfit, least=2)
