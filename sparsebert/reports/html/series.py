"""Runs put together: those that differ in the seed alone, these by sparsity into series, series by task."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsebert.reports.html.plots import COLOURS
from sparsebert.reports.runs import RunRecord

__all__ = ["Group", "Series", "TaskRuns", "by_task", "spread_of"]

# What makes no other method of two runs: the seed, the axis of the plots, where things lie, how often is logged and
# saved. Model and data count by what they are (their hashes), not by where they lie.
_APART = {
    "run": {"sparsity", "data_dir", "teacher", "text", "model", "task", "precision"},
    "settings": {"mask"},
    "trainer": {
        *(
            "seed",
            "data_seed",
            "logging_steps",
            "logging_first_step",
            "save_strategy",
            "save_steps",
            "save_total_limit",
        ),
        *("eval_steps", "eval_on_start", "report_to", "per_device_eval_batch_size", "eval_accumulation_steps"),
        *("dataloader_num_workers", "load_best_model_at_end", "disable_tqdm", "run_name"),
    },
}
_MOST_DIFFERENCES = 3

Signature = dict[str, str]


@dataclass
class Group:
    """Runs of one task that differ in the seed alone."""

    sparsity: float
    """The target."""
    runs: list[RunRecord] = field(default_factory=list)
    """One a seed."""
    again: list[RunRecord] = field(default_factory=list)
    """Runs of a seed that is there already: in no mean."""
    name: str = ""
    """Of its series, with the sparsity."""

    @property
    def scores(self) -> list[float]:
        """One a seed, in points."""
        return [100 * float(run.result["score"]) for run in self.runs]

    @property
    def seeds(self) -> list[int]:
        """In the order of `runs`."""
        return [int(run.result["seed"]) for run in self.runs]

    def share(self, name: str) -> float:
        """Mean of a number of the results' sparsity, such as `masked` or `model`; the target where it is missing."""
        return statistics.mean(float(run.result["sparsity"].get(name, self.sparsity)) for run in self.runs)


@dataclass
class Series:
    """One method in one configuration on one task."""

    label: str
    pruned: bool
    groups: list[Group]
    """By sparsity, the least first."""
    style: int = 0
    """Of its lines: the same wherever its label appears, as far as there are colours for it."""


@dataclass
class TaskRuns:
    """All runs of one task, by one metric, on one set of validation examples."""

    name: str
    metric: str
    series: list[Series]
    index: int = 0

    @property
    def groups(self) -> list[tuple[Series, Group]]:
        """All groups with their series."""
        return [(series, group) for series in self.series for group in series.groups]

    @property
    def dense(self) -> list[Series]:
        """Those without a mask."""
        return [series for series in self.series if not series.pruned]

    @property
    def sparse(self) -> list[Series]:
        """Those with one."""
        return [series for series in self.series if series.pruned]


def spread_of(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def by_task(runs: Iterable[RunRecord]) -> list[TaskRuns]:
    """Runs in their tasks, in the order in which tasks and series first appear."""
    found: dict[tuple[str, str, str], list[RunRecord]] = {}
    for run in runs:
        found.setdefault((str(run.result["task"]), str(run.result["metric"]), _examples(run)), []).append(run)
    tasks: list[TaskRuns] = []
    styles: dict[str, int] = {}
    for index, ((task, metric, _), members) in enumerate(found.items()):
        alike = [key for key in found if key[0] == task]
        own = next(place for place, key in enumerate(alike, 1) if found[key] is members)
        series = _series(members)
        _paint(series, styles)
        tasks.append(TaskRuns(task if len(alike) == 1 else f"{task} ({own})", metric, series, index))
    return tasks


def _paint(series: Sequence[Series], styles: dict[str, int]) -> None:
    """Gives each series its label's style, where that has a colour of its own among these; else the first that has."""
    taken: set[int] = set()
    for one in series:
        known = styles.get(one.label)
        if known is None or (known % COLOURS in taken and len(taken) < COLOURS):
            free = [style for style in range(len(styles) + COLOURS + 1) if style % COLOURS not in taken]
            fresh = [style for style in free if style not in styles.values()]
            known = (fresh or free or [len(styles)])[0]
        one.style = known
        styles.setdefault(one.label, known)
        taken.add(known % COLOURS)


def _examples(run: RunRecord) -> str:
    """What the score was taken on."""
    data = run.result.get("data")
    if not isinstance(data, dict):
        return ""
    rows = data.get("rows")
    return json.dumps([data.get("validation"), rows.get("validation") if isinstance(rows, dict) else None])


def _series(runs: Sequence[RunRecord]) -> list[Series]:
    kinds: dict[str, tuple[Signature, list[RunRecord]]] = {}
    for run in runs:
        signature = _signature(run)
        kinds.setdefault(json.dumps(signature, sort_keys=True), (signature, []))[1].append(run)
    labels = _labels([signature for signature, _ in kinds.values()])
    series = []
    for label, (_, members) in zip(labels, kinds.values(), strict=True):
        groups: dict[float, Group] = {}
        for run in sorted(members, key=lambda run: int(run.result["seed"])):
            target = round(float(run.result["sparsity"].get("target", 0.0)), 4)
            group = groups.setdefault(
                target, Group(target, name=f"{label}, {100 * target:.4g} %" if run.pruned else label)
            )
            (group.again if run.result["seed"] in group.seeds else group.runs).append(run)
        ordered = [groups[target] for target in sorted(groups)]
        series.append(Series(label, any(run.pruned for run in members), ordered))
    return series


def _signature(run: RunRecord) -> Signature:
    """What must be equal for two runs to be the same but for seed and sparsity."""
    result = run.result
    found = {"method": str(result["method"]), "pattern": str(result.get("pattern") or "dense")}
    for section, apart in _APART.items():
        for name, value in (run.config.get(section) or {}).items():
            if name not in apart and name not in found:
                found[name] = json.dumps(value, sort_keys=True, default=str)
    if not run.pruned:
        # Written into every configuration, and without a meaning for these.
        for name in ("allocation", "masked"):
            found.pop(name, None)
        found["pattern"] = "dense"
    model = result.get("model")
    source = str(model.get("source")) if isinstance(model, dict) else ""
    found["model"] = f"{Path(source).name} {run.base[:8]}"
    found["precision"] = str(result.get("precision"))
    found["data"] = json.dumps(result.get("data"), sort_keys=True)
    found["mask"] = _origin(run)
    return found


def _origin(run: RunRecord) -> str:
    """Where a given mask comes from: the folder's name without what seed, sparsity and task add to it."""
    settings = run.config.get("settings") or {}
    mask = settings.get("mask") if isinstance(settings, Mapping) else None
    if not isinstance(mask, str):
        return str(mask)
    name, result = re.sub(r"-s?\d+$", "", Path(mask).name), run.result
    parts = [f"{result['sparsity'].get('target', 0.0):g}", str(result["task"])]
    return "-".join(part for part in name.split("-") if part not in parts)


def _labels(signatures: Sequence[Signature]) -> list[str]:
    """Names that differ: the method's, with what tells it from others of the same method."""
    patterns = {signature["pattern"] for signature in signatures} - {"dense"}
    labels: list[str] = []
    for own in signatures:
        words = [own["method"]]
        if own["pattern"] == "dense":
            words.append("dense")
        elif len(patterns) > 1 or own["pattern"] != "unstructured":
            words.append(own["pattern"])
        alike = [o for o in signatures if (o["method"], o["pattern"]) == (own["method"], own["pattern"])]
        keys = sorted({key for other in alike for key in {*own, *other} if other.get(key) != own.get(key)})
        shown = [key for key in keys if key != "data"][:_MOST_DIFFERENCES]
        words += [f"{key} {_word(own.get(key))}" for key in shown]
        if len(keys) > len(shown):
            words.append(f"data {_hash_word(own['data'])}" if keys == ["data"] else "…")
        labels.append(", ".join(words))
    # Those that are still equal get their number.
    return [label if labels.index(label) == place else f"{label} ({place + 1})" for place, label in enumerate(labels)]


def _hash_word(text: str) -> str:
    """A short word for a long text."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _word(value: str | None) -> str:
    return "-" if value is None else value.strip('"')
