"""The sections of the report; what is missing is said in a line, with the command that makes it."""

from __future__ import annotations

from collections.abc import Sequence

from sparsebert._html import Html, join, tag
from sparsebert.errors import UserError
from sparsebert.reports.html.analyses import analysis_parts
from sparsebert.reports.html.curves import TRAIN_AND_DEV, latency_plots, measured, sparsity_plot, training_plots
from sparsebert.reports.html.heatmap import Kept, head_maps, kept_of, layer_map, mean_of
from sparsebert.reports.html.plots import Plot
from sparsebert.reports.html.series import Group, Series, TaskRuns, spread_of
from sparsebert.reports.html.tables import benchmark_tables, plain_table
from sparsebert.reports.runs import RunRecord, read_run

__all__ = ["accuracy", "analyses", "latency", "masks", "measurements", "training"]

_MOST_LINES = 5
_LEGEND = (
    "Means over seeds; whiskers are the standard deviation. Filled points: no other method is as sparse and better. "
    "Level lines: dense models."
)


def accuracy(tasks: Sequence[TaskRuns]) -> list[Html]:
    """Score by sparsity, a plot and a table for each task."""
    plots = [plot for plot in map(sparsity_plot, tasks) if plot is not None]
    parts = [_missing("No run here prunes: there is nothing to set against sparsity.")]
    if plots:
        parts = [tag("p", _LEGEND, class_="note"), _plots(plots)]
    repeated = sum(len(group.again) for task in tasks for _, group in task.groups)
    if repeated:
        words = "run repeats" if repeated == 1 else "runs repeat"
        parts.append(_missing(f"{repeated} {words} another's configuration and seed: in no mean."))
    parts += [_scores(task) for task in tasks]
    once = [task for task in tasks if all(len(group.runs) == 1 for _, group in task.groups)]
    if once:
        names = ", ".join(task.name for task in once)
        parts.append(_missing(f"One seed each on {names}: nothing is known of the spread there."))
    return parts


def latency(tasks: Sequence[TaskRuns]) -> list[Html]:
    """Score by latency, for runs that were measured."""
    plots = [plot for task in tasks for plot in latency_plots(task, measured(task))]
    if plots:
        return [_plots(plots)]
    return [
        _missing("No subnetwork here was measured; do it with: ", tag("code", "python -m sparsebert.benchmark RUN"))
    ]


def masks(tasks: Sequence[TaskRuns]) -> list[Html]:
    """What is kept by layer, component and head, for each method, sparsity and task."""
    parts: list[Html] = []
    unread: list[str] = []
    for task, _, group in _pruned(tasks):
        read, errors = _read(group)
        if errors:
            unread += errors
            continue
        kept = mean_of(read)
        if not kept.components:
            unread.append(f"{group.name} on {task.name}: its folder holds no masks")
            continue
        over = f", mean of {len(group.runs)} seeds" if len(group.runs) > 1 else ""
        shown = [layer_map(kept, f"weights kept, %{over}"), head_maps(kept, f"weights of each head kept{over}")]
        parts.append(_folded(f"{task.name}: {group.name}", *shown, is_open=not parts))
    if not parts and not unread:
        return [_missing("No run here has masks.")]
    parts += [_missing(line) for line in unread[:_MOST_LINES]]
    more = len(unread) - _MOST_LINES
    return [*parts, _missing(f"So it is with {more} more.")] if more > 0 else parts


def training(tasks: Sequence[TaskRuns]) -> list[Html]:
    """Curves from the logs."""
    parts: list[Html] = []
    silent: list[str] = []
    watched = False
    for task in tasks:
        for _, group in task.groups:
            plots = training_plots(group)
            watched = watched or any(plot.title.startswith(TRAIN_AND_DEV) for plot in plots)
            name = f"{task.name}: {group.name}"
            if plots:
                parts.append(_folded(name, _plots(plots), is_open=not parts))
            else:
                silent.append(name)
    if parts and any(len(group.runs) > 1 for task in tasks for _, group in task.groups):
        parts.insert(0, tag("p", "Means over seeds; the bands are the standard deviation.", class_="note"))
    if parts and not watched:
        flags = tag("code", "--eval-strategy steps --watch-train")
        parts.append(_missing("No run logged curves of train against dev; training does with ", flags, "."))
    if silent:
        parts.append(_missing(f"No curve was logged (metrics.jsonl) by: {_few(silent)}."))
    return parts


def measurements(runs: Sequence[RunRecord]) -> list[Html]:
    """Every run's measurements."""
    parts: list[Html] = []
    missing, damaged = [], []
    for run in runs:
        try:
            report = run.benchmark
            if report is None:
                missing.append(run.label)
                continue
            lines = [
                tag("p", f"{name} left out: {reason}", class_="note") for name, reason in report["left_out"].items()
            ]
            conditions = report["conditions"]
            hardware = ", ".join(f"{name} {value}" for name, value in conditions["hardware"].items())
            said = f"{conditions['date']}, {conditions['device']}, {conditions['threads']} threads, {hardware}"
            if report["subject"]["imposed"]:
                lines.append(tag("p", "The masks were put on by magnitude to measure speed alone.", class_="note"))
            shown = [
                tag("p", said, class_="note"),
                tag("pre", conditions["command"]),
                *benchmark_tables(report),
                *lines,
            ]
            parts.append(_folded(run.label, *shown, is_open=not parts))
        except UserError as error:
            damaged.append(_said(error, run))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            damaged.append(
                f"{run.label}: its benchmark.json is none of this sparsebert's ({type(error).__name__} {error})"
            )
    if parts:
        parts.insert(0, tag("p", "Rows in which the subnetwork is slower than dense are marked.", class_="note"))
    if missing:
        parts.append(_missing(f"Not measured (no benchmark.json): {_few(missing)}."))
    return parts + [_missing(line) for line in damaged]


def analyses(runs: Sequence[RunRecord], others: Sequence[tuple[str, object]]) -> list[Html]:
    """What was analysed.

    Args:
        runs: each may have its own.
        others: of folders of several runs, by name.
    """
    parts: list[Html] = []
    damaged = []
    found: list[tuple[str, object]] = list(others)
    for run in runs:
        try:
            if run.analysis is not None:
                found.append((run.label, run.analysis))
        except UserError as error:
            damaged.append(_said(error, run))
    for label, content in found:
        shown = analysis_parts(content)
        if shown:
            parts.append(_folded(label, *shown, is_open=not parts))
    if not parts and not damaged:
        return [_missing("Nothing was analysed; do it with: ", tag("code", "python -m sparsebert.analyze RUN…"))]
    return parts + [_missing(line) for line in damaged]


def _scores(task: TaskRuns) -> Html:
    """A row a method, a column a sparsity."""
    targets = sorted({group.sparsity for series in task.sparse for group in series.groups})
    rows = []
    for series in (*task.dense, *task.sparse):
        seeds = sorted({seed for group in series.groups for seed in group.seeds})
        found = {group.sparsity: _score(group, len(seeds)) for group in series.groups}
        dense = "" if series.pruned else next(iter(found.values()))
        cells = [found.get(target, "") if series.pruned else "" for target in targets]
        rows.append((series.label, *([dense] if task.dense else []), *cells, ", ".join(map(str, seeds))))
    heads = ("method", *(["dense"] if task.dense else []), *(f"{100 * target:.4g} %" for target in targets), "seeds")
    return plain_table(f"{task.name}: {task.metric} in points, by sparsity", heads, rows)


def _score(group: Group, seeds: int) -> str:
    mean, spread = spread_of(group.scores)
    words = f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"
    return words if len(group.runs) == seeds else f"{words} ({len(group.runs)} of {seeds} seeds)"


def _pruned(tasks: Sequence[TaskRuns]) -> list[tuple[TaskRuns, Series, Group]]:
    return [(task, series, group) for task in tasks for series in task.sparse for group in series.groups]


def _read(group: Group) -> tuple[list[Kept], list[str]]:
    """What each run's masks keep, and what could not be read."""
    found: list[Kept] = []
    errors: list[str] = []
    for run in group.runs:
        try:
            # A record of its own, so that not all runs' masks stay in memory.
            own = read_run(run.folder)
            found.append(kept_of(own.masks(), own.matrices))
        except UserError as error:
            errors.append(_said(error, run))
    return found, errors


def _said(error: UserError, run: RunRecord) -> str:
    """An error without where the run lies on this machine."""
    return str(error).replace(str(run.folder), run.label)


def _plots(plots: Sequence[Plot]) -> Html:
    return tag("div", *(plot.html() for plot in plots), class_="plots")


def _folded(title: str, *parts: Html | None, is_open: bool) -> Html:
    return tag("details", tag("summary", title), *parts, open=is_open)


def _missing(*words: object) -> Html:
    return tag("p", join(words), class_="missing")


def _few(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
