"""Times on a GPU, of candidates in turns: by events behind work that hides the launches, by a graph's replay, or whole.

- `gpu`: events around back-to-back calls, put in the queue while the GPU still waits, so that what the host takes for a
  launch is not in the number unless it takes longer than the kernels do.
- `graph`: the same calls captured in one CUDA graph, whose replays are timed: what a launch costs at the least.
- `host`: wall clock around one call and a wait for the GPU, host included: models and training steps as they are run.

Without a GPU (the rehearsal) all three read the wall clock, once.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparsebert.reports.timing import Timing

__all__ = ["HOWS", "LEAST", "REPEATS", "Capture", "Clock"]

HOWS = ("gpu", "graph", "host")
REPEATS, LEAST = 31, 7
"""Rounds of a row, and the fewest that are reported where its seconds run out."""
_WARM_UP = 3
_SAMPLE = 3e-4
_MOST_INNER = 20
_CYCLES = 1.9e9
"""Of a second: how long `torch.cuda._sleep` keeps the GPU busy need not be exact."""

Call = Callable[[Any], Any]


class Capture(RuntimeError):
    """A call that a CUDA graph does not take."""


class Clock:
    """Times calls on a device.

    Args:
        device: where the calls work.
        repeats: rounds.
        seconds: for all rounds of a row together; at least `LEAST` are taken.
    """

    def __init__(self, device: torch.device, repeats: int = REPEATS, seconds: float = 12.0) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.repeats = repeats if self.cuda else 1
        self.seconds = seconds
        self._place = 0

    def warm(self, call: Call, sets: Sequence[Any]) -> None:
        """Calls it a few times, with every set once: compilations, handles, allocations, what a set is converted to."""
        for turn in range(max(_WARM_UP, len(sets)) if self.cuda else 1):
            call(sets[turn % len(sets)])
        self.wait()

    def wait(self) -> None:
        """Until the GPU has nothing to do; raises what went wrong there."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def estimate(self, call: Call, sets: Sequence[Any]) -> tuple[float, float]:
        """`(seconds on the GPU, seconds until the host is free again)` of one call, roughly."""
        self.wait()
        start = time.perf_counter()
        for turn in range(3 if self.cuda else 1):
            call(sets[turn % len(sets)])
        free = time.perf_counter() - start
        self.wait()
        turns = 3 if self.cuda else 1
        return (time.perf_counter() - start) / turns, free / turns

    def interleave(
        self, calls: Mapping[str, Call], sets: Sequence[Any], how: str, seconds: float | None = None,
        refused: dict[str, str] | None = None,
    ) -> dict[str, Timing]:  # fmt: skip
        """Seconds of one call of each candidate, in turns over the rounds; warm them up before.

        Every call gets the set after that of the last call, whichever candidate's that was: several sets, together
        larger than the cache, make it cold. `refused` takes the candidates that no CUDA graph takes, and why.

        Raises:
            Capture: there is no CUDA graph of a candidate, and no `refused` to say so.
        """
        self._place = 0
        runs = {}
        for name, call in calls.items():
            try:
                runs[name] = self._run(call, sets, how)
            except Capture as why:
                if refused is None:
                    raise
                refused[name] = str(why)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        names, begun = list(runs), time.perf_counter()
        for turn in range(self.repeats):
            if turn >= LEAST and time.perf_counter() - begun > (seconds or self.seconds):
                break
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                samples[name].append(runs[name]())
        return {name: Timing(tuple(taken)) for name, taken in samples.items()}

    def _run(self, call: Call, sets: Sequence[Any], how: str) -> Callable[[], float]:
        """Takes one sample: the seconds of one call."""
        if not self.cuda or how == "host":
            return self._by_wall(call, sets)
        took, host = self.estimate(call, sets)
        inner = max(1, min(_MOST_INNER, math.ceil(_SAMPLE / max(took, 1e-7))))
        if how == "graph":
            # A graph rotates over its own calls alone: it must go over all sets to be cold.
            return self._by_graph(call, sets, max(inner, len(sets)))

        def sample() -> float:
            given = [self._next(sets) for _ in range(inner)]
            return self._by_events(lambda: [call(s) for s in given], host * inner) / inner

        return sample

    def _next(self, sets: Sequence[Any]) -> Any:
        self._place += 1
        return sets[self._place % len(sets)]

    def _by_wall(self, call: Call, sets: Sequence[Any]) -> Callable[[], float]:
        def sample() -> float:
            given = self._next(sets)
            self.wait()
            start = time.perf_counter()
            call(given)
            self.wait()
            return time.perf_counter() - start

        return sample

    def _by_events(self, work: Callable[[], Any], host: float) -> float:
        """Seconds between two events around `work`, which the host queues up in `host` seconds while the GPU sleeps."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sleep = getattr(torch.cuda, "_sleep", None)
        if sleep is not None:
            sleep(int(min(1.5 * host + 3e-5, 0.02) * _CYCLES))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def _by_graph(self, call: Call, sets: Sequence[Any], inner: int) -> Callable[[], float]:
        graph = self.capture(lambda: [call(sets[i % len(sets)]) for i in range(inner)])
        start = time.perf_counter()
        graph()
        # Starting a graph of hundreds of kernels takes the host a while too.
        host = 1e-4 + time.perf_counter() - start
        self.wait()
        return lambda: self._by_events(graph, host) / inner

    def capture(self, work: Callable[[], Any]) -> Callable[[], None]:
        """`work` as a CUDA graph's replay.

        Raises:
            Capture: it cannot be captured: it waits for the GPU, for one.
        """
        if not self.cuda:
            work()
            return work
        side, stream = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            work()
        stream.wait_stream(side)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        held: list[Any] = []
        try:
            with torch.cuda.graph(graph):
                held.append(work())
        except Exception as error:
            self._recover(stream)
            # What is captured holds nothing any more; a wait shows whether the device still answers.
            self.wait()
            raise Capture(f"no CUDA graph of it: {str(error).strip().splitlines()[0]}") from error

        def replay() -> None:
            graph.replay()

        # The outputs live in the graph's memory and must not be given to others.
        replay.held = held  # type: ignore[attr-defined]
        replay()
        self.wait()
        return replay

    def _recover(self, stream: Any) -> None:
        """Undoes what torch leaves where ending a capture fails too: its stream current, the generator capturing."""
        torch.cuda.set_stream(stream)
        with contextlib.suppress(Exception):
            own = torch.cuda.default_generators[torch.cuda.current_device()]
            own.graphsafe_set_state(torch.Generator(self.device).graphsafe_get_state())
