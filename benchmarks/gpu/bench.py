"""What a cell is given: the device, inputs to rotate, a clock, the gate of correctness, the row that comes of it."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from benchmarks.gpu.cell import Call, Cell, Check, Red, Skip, first_line, own_cost, relative_error, tensors_of
from benchmarks.gpu.clock import LEAST, Clock
from benchmarks.gpu.rows import Row, Target, judged, rivals
from sparsebert.kernels._cost import CEILINGS, Ceiling, Cost
from sparsebert.ops import _backend
from sparsebert.ops._backend import failures_raise
from sparsebert.reports.timing import Timing

__all__ = ["OURS", "SEED", "Bench", "Cell", "Check", "Red", "Skip", "first_line", "own_cost", "relative_error",
           "tensors_of"]  # fmt: skip

SEED = 0
OURS = "sparsebert"
SMALL = 6e-5
"""Seconds: below, a launch is a good part of a call, and a CUDA graph's replay is timed too."""
_MOST_SETS = 256


def fallen() -> list[str]:
    """Notes on ops whose Triton kernel failed in this process, so that their definition may have run in its place."""
    return [f"{name}: a Triton kernel of it failed here, and its definition ran instead" for name in _backend._failed]


class Bench:
    """Measures the cells of a part.

    Args:
        device: the GPU; the CPU in the rehearsal.
        emit: takes every row.
        deadline: `time.monotonic()` at which the part should end.
        name: the device's name, for its ceilings and bounds.
        ceiling: what it can do at most, as measured.
        seconds: for the rounds of one row.
    """

    def __init__(
        self,
        device: torch.device,
        emit: Callable[[Row], None],
        deadline: float = math.inf,
        name: str = "",
        ceiling: Ceiling | None = None,
        seconds: float = 12.0,
    ) -> None:
        self.device, self.name, self.deadline = device, name, deadline
        self.cuda = device.type == "cuda"
        self.rehearsing = not self.cuda
        self.clock = Clock(device, seconds=seconds)
        self.emit = emit
        table = next((found for kind, found in CEILINGS.items() if kind in name), CEILINGS["H100"])
        self.ceiling = ceiling or table
        self.options: Mapping[str, Any] = {}
        self._cell: Cell | None = None

    # ---- cells

    def run(self, cell: Cell) -> None:
        """One cell, whatever happens in it: rows, or one that says why there are none."""
        self._cell = cell
        settings = {**cell.settings, **(cell.small if self.rehearsing else {})}
        torch.manual_seed(SEED)
        try:
            reason = self.missing(cell.ops)
            if reason is not None:
                raise Skip(reason)
            # A cell of named ops measures their kernels, not what stands in where one does not compile.
            strict = failures_raise() if cell.ops else contextlib.nullcontext()
            with strict, self.interpreter(cell.ops) as forced:
                try:
                    cell.run(self, **settings)
                except ValueError as error:
                    # An op of the cell's that has no Triton kernel of its own.
                    if not forced or not str(error).startswith("SPARSEBERT_BACKEND="):
                        raise
                    os.environ.pop("SPARSEBERT_BACKEND")
                    cell.run(self, **settings)
        except Skip as why:
            self.row("skipped", cell.case(), why=str(why))
        except Exception as error:
            if self.rehearsing and not isinstance(error, Red):
                raise
            self.row("red", cell.case(), why=str(error) if isinstance(error, Red) else first_line(error))
        finally:
            self.clean()

    def missing(self, ops: Sequence[str]) -> str | None:
        """Why one of these ops has nothing that runs here, or None; the rehearsal takes any body that there is."""
        from sparsebert import ops as _registered  # noqa: F401 (registers them)
        from sparsebert.ops._backend import OPS

        for name in ops:
            if name not in OPS:
                return f"{name}: there is no such op yet"
            if self.cuda and not OPS[name].composed:
                reasons = {backend: OPS[name].missing(backend) for backend in ("cuda", "triton")}
                if all(reasons.values()):
                    return f"{name}: " + "; ".join(dict.fromkeys(str(reason) for reason in reasons.values()))
        return None

    def unserved(self, ops: Sequence[str]) -> list[str]:
        """Notes on ops that run by their definition here: the cell is measured all the same."""
        found = {name: self.missing((name,)) for name in ops}
        return [f"by its definition in torch: {reason}" for reason in found.values() if reason is not None]

    @contextlib.contextmanager
    def interpreter(self, ops: Sequence[str]) -> Iterator[bool]:
        """In the rehearsal, Triton's interpreter forced where all of `ops` have a kernel for it."""
        from sparsebert.ops._backend import OPS

        wanted = self.rehearsing and bool(ops) and all(OPS[name].missing("triton") is None for name in ops)
        before = os.environ.get("SPARSEBERT_BACKEND")
        if wanted:
            os.environ["SPARSEBERT_BACKEND"] = "triton"
        try:
            yield wanted
        finally:
            os.environ.pop("SPARSEBERT_BACKEND", None)
            if before is not None:
                os.environ["SPARSEBERT_BACKEND"] = before

    def clean(self) -> None:
        """Gives the memory of a cell back, its compiled functions too."""
        # On a device that no longer answers even this fails.
        with contextlib.suppress(Exception):
            torch._dynamo.reset()
        self._free()

    def _free(self) -> None:
        if self.cuda:
            with contextlib.suppress(Exception):
                gc.collect()
                torch.cuda.empty_cache()

    def left(self) -> float:
        """Seconds until the part should end."""
        return self.deadline - time.monotonic()

    def row(self, kind: str, case: Mapping[str, Any], targets: Sequence[Target] = (), **found: Any) -> Row:
        """Emits a row of the present cell."""
        row: Row = {"kind": kind, "cell": self._cell.name if self._cell else "", "case": dict(case), **found}
        if kind in ("speed", "fact"):
            row["targets"] = [judged(target, row, self.name) for target in targets]
        self.emit(row)
        return row

    def facts(
        self,
        case: Mapping[str, Any],
        facts: Mapping[str, Any],
        targets: Sequence[Target] = (),
        notes: Sequence[str] = (),
    ) -> Row:
        """Emits a row of numbers that are no race."""
        return self.row("fact", case, targets, facts=dict(facts), notes=list(notes))

    # ---- inputs

    def sets(self, make: Callable[[], Any], state: str, least: Callable[[Any], int] | None = None) -> list[Any]:
        """Sets of inputs to go through in turn: one where `warm`; where `cold` so many that what each candidate reads
        of them is three times the cache.

        `least` gives the bytes of a set that the candidate which needs least reads; None: its largest tensor.
        """
        torch.manual_seed(SEED)
        first = make()
        if state != "cold":
            return [first]
        if not self.cuda:
            return [first, make()]
        sizes = [t.numel() * t.element_size() for t in tensors_of(first)]
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 50 << 20)
        wanted = math.ceil(3 * cache / max(least(first) if least else max(sizes, default=1), 1))
        free = torch.cuda.mem_get_info(self.device)[0]
        fit = int(0.4 * free / max(sum(sizes), 1))
        return [first, *(make() for _ in range(max(0, min(wanted, fit, _MOST_SETS) - 1)))]

    def compiled(self, function: Any, mode: str | None = None) -> Any:
        """`torch.compile`; in the rehearsal traced alone, since compiling would take minutes."""
        if self.rehearsing:
            return torch.compile(function, backend="eager")
        return torch.compile(function, mode=mode)

    def peak(self, call: Call, inputs: Any) -> int | None:
        """Bytes that a call has allocated at most beyond what was there before; None without a GPU."""
        call(inputs)
        if not self.cuda:
            return None
        gc.collect()
        self.clock.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call(inputs)
        self.clock.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    # ---- rows

    def check(self, ours: Call, inputs: Any, check: Check) -> float:
        """The largest relative error of `ours`; raises `Red` where it is more than it may be."""
        exact = tensors_of(check.exact(inputs))
        own = [] if check.like is None else [
            relative_error(a, b) for a, b in zip(tensors_of(check.like(inputs)), exact, strict=True)
        ]  # fmt: skip
        self._poison(exact)
        got = tensors_of((check.ours or ours)(inputs))
        if len(got) != len(exact):
            raise Red(f"{len(got)} outputs, expected {len(exact)}")
        worst = 0.0
        for place, (tensor, truth) in enumerate(zip(got, exact, strict=True)):
            if tensor.shape != truth.shape:
                raise Red(f"output {place}: {list(tensor.shape)}, expected {list(truth.shape)}")
            error = relative_error(tensor, truth)
            # Triton's interpreter cuts a bfloat16 off where the GPU rounds it.
            factor = check.factor * (2.5 if self.rehearsing else 1.0)
            bound = max(check.least, factor * own[place] + 1e-6 if own else 0.0)
            if not error <= bound:
                raise Red(f"wrong result: output {place} is {error:.3g} off, may be {bound:.3g}")
            worst = max(worst, error)
        return worst

    def _poison(self, like: Sequence[Tensor]) -> None:
        """Leaves NaN in memory that the next tensors of these sizes are likely to get: what is not written shows."""
        for tensor in like:
            for dtype in (torch.float32, torch.bfloat16):
                torch.full(tensor.shape, math.nan, dtype=dtype, device=self.device)

    def compare(
        self,
        case: Mapping[str, Any],
        make: Callable[[], Any] | Sequence[Any],
        candidates: Mapping[str, Call],
        *,
        state: str = "cold",
        how: str = "gpu",
        check: Check | None = None,
        limit: Cost | None = None,
        limit_from: str = "",
        targets: Sequence[Target] = (),
        facts: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        graph: bool | None = None,
        subject: str = OURS,
        seconds: float | None = None,
        least: Callable[[Any], int] | None = None,
    ) -> Row | None:
        """Check ours, time all candidates in turns, emit a row; one more by a graph's replay where ours is short.

        The candidate `subject` is ours; another that fails is left out with its reason, ours failing is red.

        Args:
            case: what tells the row from others.
            make: gives one set of inputs, or the sets themselves.
            candidates: calls by name, each with a set of inputs.
            state: "cold" (inputs rotate through more than the cache), "warm" (the same again), or "as run".
            how: see `clock`.
            check: how ours is checked; None where there is nothing of ours, or it was checked before.
            limit: the least that must be moved and computed. limit_from: where that is from.
            targets, facts, notes: for the row.
            graph: whether a graph's replay is timed too; None: where ours takes less than `SMALL`.
            subject: what the others are compared with.
            seconds: for its rounds, in place of the clock's.
            least: see `sets`.
        """
        sets = list(make) if isinstance(make, Sequence) else self.sets(make, state, least)
        try:
            error = self.check(candidates[subject], sets[0], check) if check else None
            ready, left_out = self._ready(candidates, sets, subject)
        except Skip:
            raise
        except Exception as failure:
            if not isinstance(failure, Red) and (self.rehearsing or self.broken()):
                raise
            # The cell's other rows go on.
            why = str(failure) if isinstance(failure, Red) else first_line(failure)
            self.row("red", case, why=why, timed=f"{state}, {how}")
            self._free()
            return None
        found: dict[str, Any] = {
            "subject": subject, "sets": len(sets), "error": error, "facts": dict(facts or {}), "notes": list(notes),
            "left out": left_out, "limit ms": None if limit is None else limit.seconds(self.ceiling) * 1e3,
            "limit from": limit_from,
        }  # fmt: skip
        row = None
        hows = [how]
        if how == "gpu" and graph is not False:
            took = self.clock.estimate(ready[subject], sets)[0] if graph is None else 0.0
            hows += ["graph"] if graph or 0.0 < took < SMALL else []
        for wanted in hows:
            timed = self._times(ready, sets, wanted, left_out, seconds)
            if timed:
                row = self._speed(case, f"{state}, {wanted}", timed, targets, found)
        if row is None:
            self.row("red", case, why="; ".join(left_out.values()), timed=f"{state}, {how}")
        return row

    def _ready(
        self, candidates: Mapping[str, Call], sets: Sequence[Any], subject: str
    ) -> tuple[dict[str, Call], dict[str, str]]:
        """The candidates that run, warmed up, and why the others do not."""
        ready: dict[str, Call] = {}
        left_out: dict[str, str] = {}
        for name, call in candidates.items():
            try:
                self.clock.warm(call, sets)
                ready[name] = call
            except Exception as error:
                if name == subject:
                    raise
                if self.broken():
                    raise RuntimeError(f"{name}: {first_line(error)}") from error
                left_out[name] = first_line(error)
                self._free()
        return ready, left_out

    def _times(
        self, ready: Mapping[str, Call], sets: Sequence[Any], how: str, left_out: dict[str, str], seconds: float | None
    ) -> dict[str, Timing]:
        refused: dict[str, str] = {}
        times = self.clock.interleave(ready, sets, how, seconds, refused)
        left_out |= {f"{name} in a graph": why for name, why in refused.items()}
        return times

    def _speed(
        self, case: Mapping[str, Any], timed: str, times: Mapping[str, Timing], targets: Sequence[Target],
        found: Mapping[str, Any],
    ) -> Row:  # fmt: skip
        spelled = {
            name: {"median": t.median * 1e3, "low": t.low * 1e3, "high": t.high * 1e3, "rounds": len(t.seconds)}
            for name, t in times.items()
        }
        ours = spelled.get(found["subject"], {}).get("median")
        others = [spelled[name]["median"] for name in rivals(spelled, found["subject"])]
        limit = found["limit ms"]
        notes = [*found["notes"], *fallen()]
        if self.cuda and min(time["rounds"] for time in spelled.values()) < LEAST:
            notes.append("few rounds: the time ran out")
        return self.row(
            "speed",
            case,
            targets,
            **{**found, "notes": notes},
            timed=timed,
            times=spelled,
            best=min(others) / ours if others and ours else None,
            share=limit / ours if limit is not None and ours else None,
        )

    def broken(self) -> bool:
        """Whether this process can go on: after an illegal access every later call fails, after a capture that could
        not be ended random numbers and the memory's return may."""
        if not self.cuda:
            return False
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            return not 0.0 <= torch.rand(2, device=self.device).sum().item() <= 2.0
        except Exception:
            return True
