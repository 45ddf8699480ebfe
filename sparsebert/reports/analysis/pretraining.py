"""Pre-training loss on held-out text against the score downstream (TAMT, its first analysis)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsebert.errors import UserError
from sparsebert.reports.analysis.base import Analysis, Finding, Options
from sparsebert.reports.runs import RunRecord, read_run
from sparsebert.reports.speed_table import Table

__all__ = ["PRETRAINING"]

LOSSES = ("mlm_loss", "kd_loss")
_LEAST = 3


def text_losses(run: RunRecord) -> dict[str, float]:
    """Held-out losses of the run's mask: its own search's, or those of the run that its mask is from."""
    for phase in reversed(run.result.get("phases", [])):
        # A new masked-LM head is trained on the dense model: its loss says nothing of the mask.
        found = {name: float(phase[name]) for name in LOSSES if name in phase and "new_mlm_head" not in phase}
        if found:
            return found
        source = phase.get("mask", {}).get("run")
        if source and (Path(source).expanduser() / "result.json").is_file():
            return text_losses(read_run(source))
    return {}


def _unfit(run: RunRecord, options: Options) -> str | None:
    if text_losses(run):
        return None
    return "it has no losses on held-out text (runs of tamt have, and runs that take their masks by --mask)"


def _pretraining(runs: Sequence[RunRecord], options: Options) -> Finding:
    points = [
        {
            "run": run.label,
            "task": run.result["task"],
            "metric": run.result["metric"],
            "sparsity": run.result["sparsity"].get("target"),
            "score": float(run.result["score"]),
            **text_losses(run),
        }
        for run in runs
    ]
    correlations = []
    for task in dict.fromkeys(point["task"] for point in points):
        for name in LOSSES:
            pairs = [(point[name], point["score"]) for point in points if point["task"] == task and name in point]
            if found := _correlation(pairs):
                correlations.append({"task": task, "loss": name, "runs": len(pairs), **found})
    rows = [
        (p["run"], p["task"], f"{p['sparsity'] or 0.0:.0%}", *(_number(p.get(name)) for name in (*LOSSES, "score")))
        for p in points
    ]
    heads = ("run", "task", "sparsity", "masked-LM loss", "distance from dense", "score")
    tables = [Table("loss on held-out text and score downstream", heads, rows)]
    if correlations:
        lines = [
            (
                c["task"],
                c["loss"].removesuffix("_loss"),
                str(c["runs"]),
                f"{c['pearson']:+.3f}",
                f"{c['spearman']:+.3f}",
            )
            for c in correlations
        ]
        tables.append(Table("correlation of loss and score", ("task", "loss", "runs", "Pearson", "Spearman"), lines))
    return Finding({"points": points, "correlations": correlations}, tables)


def _correlation(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Pearson's and Spearman's, of at least three pairs that are not all alike; else empty."""
    from scipy import stats

    losses, scores = [loss for loss, _ in pairs], [score for _, score in pairs]
    if len(pairs) < _LEAST or len(set(losses)) == 1 or len(set(scores)) == 1:
        return {}
    pearson, spearman = float(stats.pearsonr(losses, scores)[0]), float(stats.spearmanr(losses, scores)[0])
    if not (math.isfinite(pearson) and math.isfinite(spearman)):
        raise UserError("losses or scores are not finite numbers")
    return {"pearson": pearson, "spearman": spearman}


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


PRETRAINING = Analysis("loss on held-out text against the score downstream", _pretraining, _unfit)
