"""Plots of runs: score by sparsity, score by latency, and what the log says of training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from sparsebert.reports.html.plots import Level, Line, Plot, Point, Upright
from sparsebert.reports.html.series import Group, Series, TaskRuns, spread_of
from sparsebert.reports.runs import RunRecord

__all__ = ["TRAIN_AND_DEV", "Measured", "best_of", "latency_plots", "measured", "sparsity_plot", "training_plots"]

TRAIN_AND_DEV = "train and dev"
"""How the titles of plots of watched scores begin."""

_MOST_POINTS = 150
_SEEN_ELSEWHERE = ("loss", "grad_norm", "learning_rate", "epoch", "step", "train_seconds", "train_loss")

Pairs = list[tuple[float, float]]
Measured = dict[tuple[str, str], list[tuple[Series, Group, list[dict[str, float]]]]]
"""By batch and machine: groups with what each of their measured runs came to (`latency`, `dense`, `score`)."""


def best_of(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points no other one is at least as good as in both numbers (more is better), and better in one."""
    return [not any((x, y) != (a, b) and a >= x and b >= y for a, b in points) for x, y in points]


def sparsity_plot(task: TaskRuns) -> Plot | None:
    """Score by sparsity, a line a method; None where nothing is pruned."""
    pairs = [(series, group) for series in task.sparse for group in series.groups]
    if not pairs:
        return None
    places = [(group.share("masked"), statistics.mean(group.scores)) for _, group in pairs]
    best = {id(group): ok for (_, group), ok in zip(pairs, best_of(places), strict=True)}
    lines = []
    for series in task.sparse:
        points = [_point(group.share("masked"), group, not best[id(group)]) for group in series.groups]
        lines.append(Line(series.label, points, series.style))
    return Plot(
        task.name,
        "sparsity of the masked weights",
        f"{task.metric}, points",
        lines,
        _levels(task),
        percent=True,
    )


def latency_plots(task: TaskRuns, found: Measured) -> list[Plot]:
    """Score by latency of a batch, a plot a batch and machine."""
    plots = []
    for (case, machine), members in found.items():
        places = [(-_mean(rows, "latency"), _mean(rows, "score")) for _, _, rows in members]
        lines = []
        for series in task.sparse:
            points = []
            for (own, group, rows), ok in zip(members, best_of(places), strict=True):
                if own is series:
                    points.append(_timed(group, rows, not ok))
            if points:
                lines.append(Line(series.label, points, series.style))
        dense = [row["dense"] for _, _, rows in members for row in rows if "dense" in row]
        stands = [Upright("best dense", statistics.mean(dense), min(dense), max(dense))] if dense else []
        note = f"{machine}. The vertical line: the best dense path, and its range over the measurements."
        title = f"{task.name}, batch {case}"
        plots.append(
            Plot(title, "latency, ms (p50)", f"{task.metric}, points", lines, _levels(task), stands, note, x_from=0.0)
        )
    return plots


def measured(task: TaskRuns) -> Measured:
    """What the runs' benchmark.json say of the task's subnetworks; what cannot be read is left out."""
    found: Measured = {}
    for series in task.sparse:
        for group in series.groups:
            cases: dict[tuple[str, str], list[dict[str, float]]] = {}
            for run in group.runs:
                for key, row in _timings(run).items():
                    cases.setdefault(key, []).append(row)
            for key, rows in cases.items():
                found.setdefault(key, []).append((series, group, rows))
    return found


def training_plots(group: Group) -> list[Plot]:
    """Losses, shares and watched scores by step, the mean over seeds where there are several."""
    logs = [_steps(run) for run in group.runs]
    stands = _phases(group.runs[0])
    keys = list(dict.fromkeys(key for log in logs for key in log))
    losses = [
        key for key in keys if key == "loss" or (key.endswith("_loss") and not key.startswith(("eval_", "train")))
    ]
    watched = [key for key in keys if key.startswith("eval_")]
    shares = [key for key in keys if key not in losses + watched and _is_share(key, logs)]
    plots = [
        _curves("loss while training", "loss", losses, logs, stands),
        _curves("schedules", "share", shares, logs, stands, shares=True),
    ]
    for key in watched:
        if not key.startswith("eval_train_"):
            name = key.removeprefix("eval_")
            other = f"eval_train_{name}"
            names = {other: "on a slice of train", key: "on a slice held out of train"}
            there = [of for of in names if of in keys]
            plots.append(_curves(f"{TRAIN_AND_DEV}: {name}", name, there, logs, stands, names))
    return [plot for plot in plots if plot is not None]


def _point(x: float, group: Group, hollow: bool) -> Point:
    mean, spread = spread_of(group.scores)
    seeds = ", ".join(f"{score:.1f}" for score in group.scores)
    title = f"{group.name}: {mean:.1f}" + (f" ± {spread:.1f} ({seeds})" if spread is not None else " (one seed)")
    low, high = (None, None) if spread is None else (mean - spread, mean + spread)
    return Point(x, mean, low, high, title, hollow)


def _timed(group: Group, rows: Sequence[Mapping[str, float]], hollow: bool) -> Point:
    mean, spread = spread_of([row["score"] for row in rows])
    x = _mean(rows, "latency")
    low, high = (None, None) if spread is None else (mean - spread, mean + spread)
    return Point(x, mean, low, high, f"{group.name}: {mean:.1f} at {x:.3g} ms ({len(rows)} measured)", hollow)


def _levels(task: TaskRuns) -> list[Level]:
    levels = []
    for series in task.dense:
        for group in series.groups:
            mean, spread = spread_of(group.scores)
            low, high = (None, None) if spread is None else (mean - spread, mean + spread)
            levels.append(Level(series.label, mean, low, high, series.style))
    return levels


def _mean(rows: Iterable[Mapping[str, float]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _timings(run: RunRecord) -> dict[tuple[str, str], dict[str, float]]:
    """By batch and machine: the best subnetwork's latency and score, and the best dense path's latency."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    try:
        report = run.benchmark
        if report is None or report["subject"]["imposed"]:
            return {}
        conditions, scores = report["conditions"], report["accuracy"].get("scores", {})
        device = conditions["hardware"].get("gpu" if conditions["device"] == "cuda" else "cpu")
        threads = int(conditions["threads"])
        machine = f"{device}, {threads} {'thread' if threads == 1 else 'threads'}"
        for case in report["cases"]:
            name, dense = case["best_subnetwork"], case["best_dense"]
            times = {row["variant"]: row["p50_ms"] for row in case["rows"] if row["status"] == "ok"}
            if name is None:
                continue
            score = scores.get(name, {}).get(run.result["metric"], run.result["score"])
            row = {"latency": float(times[name]), "score": 100 * float(score)}
            found[f"{case['case']}, {case['kind']} lengths", machine] = row | (
                {"dense": float(times[dense])} if dense else {}
            )
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return found


def _steps(run: RunRecord) -> dict[str, Pairs]:
    """The log's numbers by name: steps counted over all phases, and values."""
    found: dict[str, Pairs] = {}
    begun = {phase: first for phase, first, _ in _spans(run)}
    for entry in run.metrics:
        step = entry.get("step")
        if not isinstance(step, int) or "train_seconds" in entry:
            continue
        for key, value in entry.items():
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if fits and not key.endswith(("_runtime", "_per_second")):
                found.setdefault(key, []).append((begun.get(str(entry.get("phase")), 0) + step, float(value)))
    return found


def _spans(run: RunRecord) -> list[tuple[str, int, int]]:
    """Phases of the log with the steps before them and their own."""
    lengths: dict[str, int] = {}
    for entry in run.metrics:
        if isinstance(entry.get("step"), int):
            phase = str(entry.get("phase"))
            lengths[phase] = max(lengths.get(phase, 0), entry["step"])
    spans, first = [], 0
    for phase, length in lengths.items():
        spans.append((phase, first, length))
        first += length
    return spans


def _phases(run: RunRecord) -> list[Upright]:
    spans = _spans(run)
    return [Upright(phase, float(first)) for phase, first, _ in spans] if len(spans) > 1 else []


def _is_share(key: str, logs: Sequence[Mapping[str, Pairs]]) -> bool:
    values = [value for log in logs for _, value in log.get(key, [])]
    return key not in _SEEN_ELSEWHERE and bool(values) and all(0 <= value <= 1 for value in values)


def _curves(
    title: str,
    label: str,
    keys: Sequence[str],
    logs: Sequence[Mapping[str, Pairs]],
    stands: Sequence[Upright],
    names: Mapping[str, str] | None = None,
    shares: bool = False,
) -> Plot | None:
    lines = []
    for style, key in enumerate(keys):
        points = _over_seeds([log[key] for log in logs if key in log])
        lines.append(Line((names or {}).get(key, key.replace("_", " ")), points, style, marked=len(points) < 2))
    if not lines:
        return None
    return Plot(title, "step", label, lines, (), stands, shares=shares)


def _over_seeds(curves: Sequence[Pairs]) -> list[Point]:
    """Mean and standard deviation at each step that all curves have; the curve itself where it is one alone."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    every = max(1, math.ceil(len(steps) / _MOST_POINTS))
    # Counted from the end: where training ended is what matters most.
    chosen = [step for place, step in enumerate(steps) if (len(steps) - 1 - place) % every == 0]
    return [_spread_point(step, [table[step] for table in tables]) for step in chosen]


def _spread_point(step: float, values: Sequence[float]) -> Point:
    mean, spread = spread_of(values)
    low, high = (None, None) if spread is None else (mean - spread, mean + spread)
    return Point(step, mean, low, high, f"step {step:g}: {mean:.4g}")
