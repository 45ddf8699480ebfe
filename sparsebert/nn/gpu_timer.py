"""Times calls on a GPU: as an eager model makes them, and as a CUDA graph replays them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import torch

__all__ = ["measure_captured", "measure_events"]

BURST = 10
"""Calls between two events: enough that one call waits for the one before, as a model's layers do."""
_ROUNDS, _WARM = 31, 3
# So far behind the quickest, a candidate needs no exact number.
_HOPELESS = 3.0


def measure_events(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of one call of each, by CUDA events around bursts of calls; the candidates take turns, burst by burst.

    In a burst the GPU waits for Python or Python runs ahead of it: the slower of the two is what a layer of an eager
    model takes. So a sparse layer that saves the GPU time but costs more to launch is not found faster by it.
    """
    for call in calls.values():
        for _ in range(_WARM):
            call()
    return _in_turns({name: _burst(call) for name, call in calls.items()})


def measure_captured(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of one call of each as a CUDA graph replays it, which costs nothing to launch.

    For models that run in CUDA graphs (`torch.compile(mode="reduce-overhead")`, `torch.cuda.graph`): give it to
    `sparsify` or `SparseLinear.from_linear` as `timer`. Infinity for a call that cannot be captured.
    """
    replays, seconds = {}, {}
    for name, call in calls.items():
        try:
            replays[name] = _captured(call)
        except RuntimeError:
            seconds[name] = math.inf
    return {**seconds, **(_in_turns(replays) if replays else {})}


def _burst(call: Callable[[], object]) -> Callable[[], object]:
    def burst() -> None:
        for _ in range(BURST):
            call()

    return burst


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(BURST):
            call()
    graph.replay()
    return graph.replay


def _in_turns(bursts: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of one call of each, each burst of which makes `BURST`."""
    first = {name: min(times) for name, times in _rounds(bursts, list(bursts), 2).items()}
    quickest = min(first.values())
    names = [name for name in bursts if first[name] <= _HOPELESS * quickest]
    samples = _rounds(bursts, names, _ROUNDS)
    return {**first, **{name: statistics.median(times) for name, times in samples.items()}}


def _rounds(bursts: Mapping[str, Callable[[], object]], names: list[str], count: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(count):
        # Everyone follows everyone.
        order = names[turn % len(names) :] + names[: turn % len(names)]
        events = {}
        for name in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            bursts[name]()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) / 1e3 / BURST)
    return samples
