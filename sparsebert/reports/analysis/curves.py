"""Train-versus-dev curves (SPD's study of over-fitting), from what a run logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsebert.reports.analysis.base import Analysis, Finding, Options
from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table

__all__ = ["CURVES", "curves_of"]

_DEV, _TRAIN = "eval_", "eval_train_"
_TIMES = ("_runtime", "_per_second", "_time")


def _unfit(run: RunRecord, options: Options) -> str | None:
    if any(key.startswith(_DEV) for entry in run.metrics for key in entry):
        return None
    return "nothing was watched while it was trained (--eval-strategy steps --watch-train)"


def curves_of(run: RunRecord) -> dict[str, dict[str, list[list[float]]]]:
    """By phase and name of what was logged, `[step, value]` pairs: `loss`, `eval_...` (the slice held out of train),
    `eval_train_...` (as many rows of what is trained on)."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for entry in run.metrics:
        step, phase = entry.get("step"), entry.get("phase")
        if not isinstance(step, (int, float)) or not isinstance(phase, str):
            continue
        for key, value in entry.items():
            logged = key == "loss" or (key.startswith(_DEV) and not key.endswith(_TIMES))
            if logged and isinstance(value, (int, float)):
                found.setdefault(phase, {}).setdefault(key, []).append([step, value])
    return found


def _curves(runs: Sequence[RunRecord], options: Options) -> Finding:
    found: dict[str, Any] = {}
    rows = []
    for run in runs:
        curves, ends = curves_of(run), []
        for phase, series in curves.items():
            for key, dev in series.items():
                if key.startswith(_TRAIN) or not key.startswith(_DEV):
                    continue
                name = key.removeprefix(_DEV)
                end = _end(phase, name, dev, series.get(_TRAIN + name))
                ends.append(end)
                rows.append(
                    (run.label, phase, name, _number(end["train"]), _number(end["dev"]), _number(end["gap"]),
                     f"{end['best']:.4f} at {end['best_step']:g}")
                )  # fmt: skip
        found[run.label] = {"curves": curves, "ends": ends}
    heads = ("run", "phase", "of", "train", "dev", "gap", "best dev, at step")
    notes = ("at the last evaluation; dev is the slice held out of train, train is as many rows of what is trained on",)
    return Finding({"runs": found}, [Table("train and dev", heads, rows, notes)])


def _end(phase: str, name: str, dev: list[list[float]], train: list[list[float]] | None) -> dict[str, Any]:
    """Where a pair of curves ends; `gap` is positive where it over-fits: train less dev, of losses dev less train."""
    best = (min if name == "loss" else max)(dev, key=lambda pair: pair[1])
    last = train[-1][1] if train else None
    gap = None if last is None else (dev[-1][1] - last if name == "loss" else last - dev[-1][1])
    return {
        "phase": phase,
        "name": name,
        "train": last,
        "dev": dev[-1][1],
        "gap": gap,
        "best": best[1],
        "best_step": best[0],
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


CURVES = Analysis("train-versus-dev curves and the gap at their end", _curves, _unfit)
