"""What an analysis is: which runs it takes, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table

__all__ = ["Analysis", "Finding", "Options", "mean_and_spread", "needs_masks", "takes_all"]


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class Options:
    """What the user asks of all analyses."""

    data_dir: str | None = None
    """Where the runs' data are now, if they have moved."""
    max_samples: int = 1000
    """Rows of train, and of validation, that are looked at."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of what is drawn at random."""
    head_steps: int = 300
    """Steps that train a new head."""
    teacher: Path | None = None
    """A dense run to compare with, in place of a run's own teacher."""
    say: Callable[[str], None] = field(default=_silent, compare=False)
    """Told what is being done."""


@dataclass
class Finding:
    """What an analysis found."""

    data: dict[str, Any]
    """For analysis.json: plain values, shares as fractions."""
    tables: list[Table] = field(default_factory=list)
    """The same for readers."""


@dataclass(frozen=True)
class Analysis:
    """One thing that can be looked at."""

    summary: str
    """One line for `--help`."""
    make: Callable[[Sequence[RunRecord], Options], Finding]
    """Takes runs that fit; a UserError where they do not fit together."""
    unfit: Callable[[RunRecord, Options], str | None]
    """Why it cannot be made from a run, or None."""
    least: int = 1
    """Runs that it takes at least."""
    trains: bool = False
    """Whether something is trained for it; such an analysis is made only when asked for."""


def takes_all(run: RunRecord, options: Options) -> str | None:
    """Any run fits."""
    return None


def needs_masks(run: RunRecord, options: Options) -> str | None:
    """Dense runs do not fit."""
    return None if run.pruned else f"its method, {run.result['method']}, prunes nothing"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def spread_text(values: Sequence[float], places: int = 4) -> str:
    """`0.8125 ± 0.0100`, or the mean alone."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{places}f}" + (f" ± {spread:.{places}f}" if spread is not None else "")
