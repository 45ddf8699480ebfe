"""Timing candidates in turns, so that a change of the machine's pace meets them all; benchmarks use it too."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["SETTLE", "STOPWATCHES", "Stopwatch", "Timing", "interleave"]

SETTLE = 2e-3
"""Seconds for which a candidate runs untimed before each timed call."""

_WARM_UP = 2
_LEAST_ROUNDS = 3

Stopwatch = Callable[[Callable[[], Any]], float]
"""Runs a call once and returns the seconds it took."""


@dataclass(frozen=True)
class Timing:
    """Seconds one candidate took: one number a round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)

    def quantile(self, share: float) -> float:
        """The smallest measured time that at least `share` of the rounds did not exceed (nearest rank)."""
        return sorted(self.seconds)[max(0, math.ceil(share * len(self.seconds)) - 1)]


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int,
    stopwatch: Stopwatch | None = None,
    *,
    settle: float = SETTLE,
    budget: float = math.inf,
) -> dict[str, Timing]:
    """Time every candidate `repeats` times in turns, each round beginning with another one.

    Each is called twice before, so that allocations, lookups and compilations are behind it. Before each timed call
    the candidate runs untimed for `settle` seconds, once at least: libraries bring thread pools of their own, whose
    threads go on spinning for a while after a call and would be timed with the candidate that comes next. So
    caches are as warm as a candidate leaves them to itself.

    Args:
        candidates: calls by name.
        repeats: rounds.
        stopwatch: one of `STOPWATCHES`; the wall clock where None.
        settle: seconds.
        budget: seconds after which no further round is begun, once there have been 3.
    """
    names, watch = list(candidates), stopwatch or _wall
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(_WARM_UP):
            candidates[name]()
    begun = time.perf_counter()
    for turn in range(repeats):
        if turn >= _LEAST_ROUNDS and time.perf_counter() - begun > budget:
            break
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            settled = time.perf_counter() + settle
            candidates[name]()
            while time.perf_counter() < settled:
                candidates[name]()
            times[name].append(watch(candidates[name]))
    return {name: Timing(tuple(took)) for name, took in times.items()}


def _read(clock: Callable[[], float]) -> Stopwatch:
    def watch(call: Callable[[], Any]) -> float:
        _synchronize()
        start = clock()
        call()
        _synchronize()
        return clock() - start

    return watch


def _events(call: Callable[[], Any]) -> float:
    """The GPU's own time between two events of its stream: without what the host does before and after."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _synchronize()
    first.record()
    call()
    last.record()
    _synchronize()
    return float(first.elapsed_time(last)) * 1e-3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_wall = _read(time.perf_counter)

STOPWATCHES: dict[str, Stopwatch] = {"wall": _wall, "cpu": _read(time.process_time), "cuda": _events}
"""By name: wall-clock time, processor time of this process, and time on the GPU."""
