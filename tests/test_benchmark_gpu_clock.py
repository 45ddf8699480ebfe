"""The clock and the rows of `benchmarks.gpu` with CUDA's calls replaced: what runs on a GPU runs once here."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.gpu.bench import Bench, Cell, Check, Red, Skip  # noqa: E402
from benchmarks.gpu.clock import LEAST, REPEATS, Capture, Clock  # noqa: E402
from benchmarks.gpu.rows import Target  # noqa: E402
from sparsebert.kernels._cost import Cost  # noqa: E402


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = math.nan

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


class Graph:
    """A graph that replays nothing; capturing refuses where `refuse` is set."""

    refuse = False
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@contextlib.contextmanager
def capturing(graph: Graph) -> Iterator[None]:
    if Graph.refuse:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    nothing = lambda *arguments, **options: None  # noqa: E731
    replaced: dict[str, Any] = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capturing,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda of: contextlib.nullcontext(),
        "set_stream": nothing,
        "synchronize": nothing,
        "_sleep": nothing,
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 164,
        "mem_get_info": lambda device: (1 << 30, 1 << 31),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=4096),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Graph, "refuse", False)
    return torch.device("cuda")


@pytest.fixture
def bench(cuda: torch.device) -> Bench:
    rows: list[Any] = []
    found = Bench(cuda, rows.append, name="NVIDIA H100")
    found.device = torch.device("cpu")  # where the inputs of these tests are
    found.seen = rows  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("how", ["gpu", "graph", "host"])
def test_candidates_take_turns(cuda: torch.device, how: str) -> None:
    order: list[str] = []
    calls = {name: lambda s, name=name: order.append(name) for name in "ab"}
    times = Clock(cuda).interleave(calls, [1, 2, 3], how)
    assert {name: len(time.seconds) for name, time in times.items()} == {"a": REPEATS, "b": REPEATS}
    assert all(second >= 0 for time in times.values() for second in time.seconds)


def test_no_candidate_gets_the_inputs_that_the_last_left_in_the_cache(cuda: torch.device) -> None:
    order: list[int] = []
    calls = {name: lambda s: order.append(s) for name in "abc"}
    Clock(cuda).interleave(calls, range(4), "host")
    assert all(first != second for first, second in itertools.pairwise(order))


def test_a_graph_goes_over_every_set(cuda: torch.device) -> None:
    seen: list[int] = []
    clock = Clock(cuda)
    clock.interleave({"a": lambda s: time.sleep(1e-3) or seen.append(s)}, range(40), "graph")
    assert set(seen) == set(range(40))


def test_what_was_warmed_up_has_met_every_set(cuda: torch.device) -> None:
    seen: list[int] = []
    Clock(cuda).warm(seen.append, range(40))
    assert set(seen) == set(range(40))


def test_a_slow_row_has_the_least_of_rounds(cuda: torch.device) -> None:
    times = Clock(cuda, seconds=1e-9).interleave({"a": lambda s: None}, [None], "host")
    assert len(times["a"].seconds) == LEAST


def test_cold_inputs_rotate_through_more_than_the_cache(bench: Bench) -> None:
    sets = bench.sets(lambda: SimpleNamespace(x=torch.ones(256), y=[torch.ones(4)]), "cold")
    assert len(sets) * 1024 >= 3 * 4096
    assert len(bench.sets(lambda: SimpleNamespace(x=torch.ones(256)), "warm")) == 1
    # A candidate that reads a quarter of the largest tensor needs four times as many.
    some = bench.sets(lambda: SimpleNamespace(x=torch.ones(256)), "cold", lambda s: 256)
    assert len(some) * 256 >= 3 * 4096
    seen: list[int] = []
    bench.clock.interleave({"a": lambda s: seen.append(s)}, range(5), "host")  # type: ignore[arg-type]
    assert set(seen) == set(range(5))


def row_of(bench: Bench, ours: Any, **options: Any) -> Any:
    calls = {"sparsebert": ours, "torch": lambda s: s.x * 2}
    check = Check(lambda s: s.x.double() * 2, lambda s: s.x * 2)
    make = lambda: SimpleNamespace(x=torch.randn(64))  # noqa: E731
    return bench.compare({"M": 64}, make, calls, check=check, limit=Cost(256, 256, 64), **options)


def test_a_row_has_times_error_limit_and_targets(bench: Bench) -> None:
    found = row_of(bench, lambda s: s.x + s.x, targets=[Target("G5", "faster", 1e-9)], graph=True)
    assert [row["timed"] for row in bench.seen] == ["cold, gpu", "cold, graph"]  # type: ignore[attr-defined]
    assert found["error"] <= 1e-6
    assert found["limit ms"] == pytest.approx(512 / 3.0e12 * 1e3)
    assert set(found["times"]) == {"sparsebert", "torch"}
    assert found["targets"][0]["met"] is True
    assert found["times"]["torch"]["rounds"] == REPEATS


@pytest.mark.parametrize(
    "ours", [lambda s: s.x * 2.01, lambda s: s.x * math.nan, lambda s: s.x[:-1] * 2, lambda s: (s.x, s.x)]
)
def test_no_speed_of_a_wrong_result(bench: Bench, ours: Any) -> None:
    assert row_of(bench, ours) is None
    (row,) = bench.seen  # type: ignore[attr-defined]
    assert row["kind"] == "red"
    assert "times" not in row


def test_what_no_graph_takes_is_timed_without(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "refuse", True)
    found = row_of(bench, lambda s: s.x + s.x, graph=True)
    assert [row["timed"] for row in bench.seen] == ["cold, gpu"]  # type: ignore[attr-defined]
    assert found["left out"]["sparsebert in a graph"].endswith("when stream is capturing")
    with pytest.raises(Capture):
        bench.clock.capture(lambda: None)


def test_ours_failing_costs_its_row_alone(bench: Bench) -> None:
    bench.rehearsing = False

    def failing(s: Any) -> Any:
        raise RuntimeError("no such kernel")

    def run(bench: Bench) -> None:
        row_of(bench, failing)
        row_of(bench, lambda s: s.x + s.x, graph=False)

    bench.run(Cell("a cell", run))
    assert [row["kind"] for row in bench.seen] == ["red", "speed"]  # type: ignore[attr-defined]
    assert bench.seen[0]["why"] == "RuntimeError: no such kernel"  # type: ignore[attr-defined]


def test_a_kernel_that_fails_is_not_replaced_while_it_is_measured(bench: Bench) -> None:
    from sparsebert.ops import _backend

    seen: list[bool] = []
    bench.missing = lambda ops: None  # type: ignore[method-assign]
    for ops in (("hidden_mse",), ()):
        bench.run(Cell("a cell", lambda bench: seen.append(_backend._must_raise()), ops=ops))
    assert seen == [True, False]


def test_variants_of_ours_are_no_rivals(bench: Bench) -> None:
    calls = {name: lambda s: time.sleep(1e-4) for name in ("sparsebert", "torch")}
    found = bench.compare({}, [None], {**calls, "sparsebert, new mask": lambda s: None}, how="host")
    assert found is not None
    assert found["best"] == found["times"]["torch"]["median"] / found["times"]["sparsebert"]["median"]


def test_another_candidate_that_fails_is_left_out(bench: Bench) -> None:
    def failing(s: Any) -> Any:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    calls = {"sparsebert": lambda s: s, "other": failing}
    found = bench.compare({}, [torch.ones(4)], calls)
    assert found is not None
    assert found["left out"] == {"other": "RuntimeError: CUDA out of memory."}


def raising(error: Exception) -> Any:
    def run(bench: Bench, **settings: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "kind", "why"),
    [
        (Skip("no such tool"), "skipped", "no such tool"),
        (Red("wrong"), "red", "wrong"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "red", "OutOfMemoryError: CUDA out of memory."),
        (ValueError("x: expected\nmore"), "red", "ValueError: x: expected"),
    ],
)
def test_whatever_happens_in_a_cell_is_one_row(bench: Bench, error: Exception, kind: str, why: str) -> None:
    bench.rehearsing = False
    bench.run(Cell("a cell", raising(error), {"dtype": torch.bfloat16, "shape": (2, 3), "targets": ()}))
    (row,) = bench.seen  # type: ignore[attr-defined]
    assert (row["kind"], row["why"]) == (kind, why)
    assert row["case"] == {"dtype": "bfloat16", "shape": "2x3"}


def test_an_op_without_a_kernel_is_skipped_by_name(bench: Bench) -> None:
    bench.run(Cell("a cell", raising(ValueError()), ops=("no_such_op",)))
    (row,) = bench.seen  # type: ignore[attr-defined]
    assert (row["kind"], row["why"]) == ("skipped", "no_such_op: there is no such op yet")


def test_memory_at_the_peak(bench: Bench) -> None:
    assert bench.peak(lambda s: s, None) == 64
