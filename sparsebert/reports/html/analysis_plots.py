"""Plots of what `sparsebert.analyze` wrote: score by training rows, and the loss around the minimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sparsebert.reports.html.plots import Line, Plot, Point

__all__ = ["analysis_plots"]


def analysis_plots(name: str, data: Any) -> list[Plot]:
    """The plots of an analysis; none where it has no curves, or is not as that analysis writes it.

    Args:
        name: of the analysis.
        data: its numbers, of any shape.
    """
    make = _PLOTS.get(name)
    try:
        return [] if make is None else make(data)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        # The file is the user's; its numbers are shown as a table all the same.
        return []


def _scarcity(data: Mapping[str, Any]) -> list[Plot]:
    """A plot a task and metric, a line a method and sparsity."""
    found: dict[tuple[str, str], list[Line]] = {}
    for curve in data["curves"]:
        lines = found.setdefault((str(curve["task"]), str(curve["metric"])), [])
        share = curve["sparsity"]
        label = f"{curve['method']}, {100 * _number(share):.4g} %" if share else f"{curve['method']}, dense"
        points = [
            _point(_number(point["rows"]), point, 100, f"{label}: {point['rows']:,} rows") for point in curve["points"]
        ]
        if any(point.x <= 0 for point in points):
            raise ValueError("a logarithm needs numbers above 0")
        lines.append(Line(label, points, len(lines)))
    return [
        Plot(f"{task}: scarcity of data", "training rows", f"{metric}, points", lines, log_x=True)
        for (task, metric), lines in found.items()
    ]


def _flatness(data: Mapping[str, Any]) -> list[Plot]:
    """One plot, a line a run, from its own weights outwards."""
    lines: list[Line] = []
    for label, run in data["runs"].items():
        at_rest = _number(run["loss"])
        points = [Point(0.0, at_rest, title=f"{label}: {at_rest:.4f} as it is")]
        for point in run["points"]:
            radius = _number(point["radius"])
            points.append(_point(radius, point, 1, f"{label}: at {radius:g}"))
        lines.append(Line(str(label), points, len(lines)))
    if not lines:
        return []
    note = "Mean and spread over random directions; the distance is in lengths of each row of the weights."
    return [Plot("flatness of the minimum", "distance from the weights", "loss on train", lines, note=note)]


def _point(x: float, summary: Mapping[str, Any], factor: float, title: str) -> Point:
    """A mean with its spread, where there is one."""
    mean = factor * _number(summary["mean"])
    std = summary.get("std")
    if std is None:
        return Point(x, mean, title=f"{title}, {mean:.4g}")
    spread = factor * _number(std)
    return Point(x, mean, mean - spread, mean + spread, f"{title}, {mean:.4g} ± {spread:.2g}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return float(value)


_PLOTS: dict[str, Callable[[Any], list[Plot]]] = {"scarcity": _scarcity, "flatness": _flatness}
