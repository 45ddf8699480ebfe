"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import sparsebert
from sparsebert._html import Html, tag
from sparsebert.reports.html import sections
from sparsebert.reports.html.series import by_task
from sparsebert.reports.html.style import STYLE
from sparsebert.reports.html.tables import plain_table
from sparsebert.reports.runs import RunRecord

__all__ = ["page"]

_MOST_ROWS = 40
# Where things lie on this machine is nobody else's business.
_PLACES = ("data_dir", "output", "resume", "config")


def page(
    runs: Sequence[RunRecord],
    title: str = "sparsebert report",
    command: str = "",
    others: Sequence[tuple[str, object]] = (),
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """The whole report.

    Args:
        runs: one at least.
        title: of the page.
        command: that made it, for the record.
        others: analyses of several runs: names and what their files hold.
        say: gets a line when a part begins.
    """
    tasks = by_task(runs)
    makers: list[tuple[str, str, Callable[[], list[Html]]]] = [
        ("accuracy", "Accuracy by sparsity", lambda: sections.accuracy(tasks)),
        ("latency", "Accuracy by latency", lambda: sections.latency(tasks)),
        ("masks", "What the masks keep", lambda: sections.masks(tasks)),
        ("training", "Training", lambda: sections.training(tasks)),
        ("measured", "Speed and memory", lambda: sections.measurements(runs)),
        ("analyses", "Analyses", lambda: sections.analyses(runs, others)),
        ("runs", "The runs", lambda: _runs(runs)),
        ("conditions", "Hardware and versions", lambda: _conditions(runs)),
    ]
    body = []
    for ident, heading, make in makers:
        say(heading.lower())
        body.append(tag("section", tag("h2", heading, id=ident), *make(), aria_labelledby=ident))
    links = [tag("li", tag("a", heading, href=f"#{ident}")) for ident, heading, _ in makers]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    top = tag("header", tag("h1", title), _summary(runs), tag("nav", tag("ul", *links), aria_label="sections"))
    today = f"{datetime.date.today():%Y-%m-%d}"
    foot = tag("footer", tag("p", f"Made on {today} by sparsebert {sparsebert.__version__}"), _code(command))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', top, tag('main', *body), foot), lang='en')}\n"


def _summary(runs: Sequence[RunRecord]) -> Html:
    """What was run, at a glance."""
    dates = sorted(_date(run) for run in runs)
    results = [run.result for run in runs]
    patterns = _words(result.get("pattern") for result in results if result.get("pattern"))
    lines = [
        ("runs", str(len(runs))),
        ("methods", _words(result["method"] for result in results)),
        ("tasks", _words(result["task"] for result in results)),
        ("patterns", patterns or "none: all runs are dense"),
        ("seeds", _words(result["seed"] for result in results)),
        ("models", _words(_model(run) for run in runs)),
        ("finished", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"),
    ]
    return tag("dl", *(part for name, value in lines for part in (tag("dt", name), tag("dd", value))))


def _runs(runs: Sequence[RunRecord]) -> list[Html]:
    heads = (
        "run",
        "method",
        "task",
        "pattern",
        "sparsity %",
        "of masked %",
        "of model %",
        "seed",
        "score",
        "time",
        "end",
    )
    table = plain_table("all runs", heads, [_row(run) for run in runs], texts=4)
    many = len(runs) > _MOST_ROWS
    parts = [tag("details", tag("summary", f"all {len(runs)} runs"), table) if many else table]
    notes = [tag("li", f"{run.label}: {run.result['note']}") for run in runs if run.result.get("note")]
    if notes:
        parts += [tag("h3", "Notes"), tag("ul", *notes)]
    parts.append(tag("h3", "To make a run again"))
    parts.append(tag("p", "Save a run's settings as config.yaml and start:", class_="note"))
    again = "python -m sparsebert.train --config config.yaml --output FOLDER"
    parts.append(_code(again + "  # with --data-dir FOLDER where the data lie on disk") or Html())
    for run in runs:
        parts.append(tag("details", tag("summary", run.label), tag("pre", _settings(run))))
    return parts


def _row(run: RunRecord) -> tuple[str, ...]:
    result, sparsity = run.result, run.result["sparsity"]
    shares = [f"{100 * sparsity[name]:.4g}" if name in sparsity else "" for name in ("target", "masked", "model")]
    took = result.get("seconds")
    return (
        *(run.label, result["method"], result["task"], result.get("pattern") or ""),
        *(shares if run.pruned else ("dense", "", "")),
        *(str(result["seed"]), f"{100 * result['score']:.2f} {result['metric']}"),
        *(f"{took:.0f} s" if isinstance(took, (int, float)) else "", _date(run)),
    )


def _conditions(runs: Sequence[RunRecord]) -> list[Html]:
    """Which hardware and versions the runs had, each set once."""
    parts = []
    for name, heading in (("hardware", "Hardware"), ("versions", "Versions")):
        found: dict[str, list[str]] = {}
        for run in runs:
            values = run.result.get(name)
            words = (
                ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, dict) else "not said"
            )
            found.setdefault(words, []).append(run.label)
        rows = [
            tag(
                "p",
                words
                if len(found) == 1
                else f"{words} ({len(of)} runs: {', '.join(of[:4])}{' …' if len(of) > 4 else ''})",
            )
            for words, of in found.items()
        ]
        parts += [tag("h3", heading), *rows]
    precisions = _words(run.result.get("precision") for run in runs if run.result.get("precision"))
    return [*parts, tag("p", f"Precision of training and scoring: {precisions or 'not said'}.")]


def _settings(run: RunRecord) -> str:
    """config.yaml without what is only about the machine it was written on."""
    own = {name: _last(value) for name, value in run.config["run"].items() if name not in _PLACES}
    rest = {
        section: {name: _last(value) for name, value in values.items()} if isinstance(values, dict) else values
        for section, values in run.config.items()
        if section != "run"
    }
    return str(yaml.safe_dump({"run": own, **rest}, sort_keys=False))


def _last(value: Any) -> Any:
    """Of absolute paths only the last part."""
    if isinstance(value, list):
        return [_last(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _model(run: RunRecord) -> str:
    model = run.result.get("model")
    source = model.get("source") if isinstance(model, dict) else run.config["run"].get("model")
    return str(_last(str(source)))


def _date(run: RunRecord) -> str:
    """When the result was written."""
    return f"{datetime.datetime.fromtimestamp(run.files.result.stat().st_mtime):%Y-%m-%d}"


def _words(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _code(command: str) -> Html | None:
    return tag("pre", command) if command else None


def command_line(argv: Sequence[str]) -> str:
    """The command as it is shown, folders by their last part."""
    return shlex.join(["python", "-m", "sparsebert.report", *(str(_last(word)) for word in argv)])
