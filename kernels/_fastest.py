"""Of several ways to compute a call the fastest: measured once for a shape, and so is that the numbers are right.

A way whose result is not the usual one's is left out, with a warning, as is one that fails.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Question", "fastest", "is_compiled"]

NAMES = {"packed": "our kernel", "clusters": "our kernel", "cusparselt": "cuSPARSELt"}

# By question: the way that is fastest.
chosen: dict[Question, str] = {}


@dataclass(frozen=True)
class Question:
    """What a choice is remembered by."""

    op: str
    shape: tuple[Any, ...]
    device: torch.device

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured: then nothing is measured."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_compiled(op: str) -> bool:
    """Whether there is a CUDA kernel for it; without the compiled library there is no such op at all."""
    known = hasattr(torch.ops.sparsebert, op)
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsebert::{op}", "CUDA")


def fastest(question: Question, ways: Mapping[str, Callable[[], Tensor]], unmeasured: str | None = None) -> Tensor:
    """The call's result by the fastest of `ways`.

    Args:
        question: what it is.
        ways: calls that compute the same; the first is the usual one, by whose numbers the others are checked.
        unmeasured: the one that runs while a graph is captured before anything was measured; None: the usual one.
    """
    usual = next(iter(ways))
    how = chosen.get(question)
    if how is None:
        # What has not been measured has not been seen to be right either.
        return ways[unmeasured or usual]() if question.capturing else _measured(question, ways)
    if how == usual:
        return ways[usual]()
    try:
        return ways[how]()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if question.capturing:
            raise
        _leave_out(question, how, f"failed ({_line(error)})")
        chosen[question] = usual
        return ways[usual]()


def _measured(question: Question, ways: Mapping[str, Callable[[], Tensor]]) -> Tensor:
    """The result by the usual way; which of the ways is fastest is remembered."""
    names = iter(ways)
    usual = next(names)
    result = ways[usual]()
    largest = result.abs().max().float()
    if not bool(largest.isfinite()):
        # By such numbers no way can be told to be right or wrong.
        return result
    calls = {usual: ways[usual]}
    for way in names:
        try:
            wrong = (ways[way]().float() - result.float()).abs().max()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _leave_out(question, way, f"failed ({_line(error)})")
            continue
        if bool(wrong <= 0.02 * largest + 1e-6):
            calls[way] = ways[way]
        else:
            much = f"by {float(wrong):.3g}, where the largest number is {float(largest):.3g}"
            _leave_out(question, way, f"is wrong ({much})")
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(3 if len(calls) > 1 else 0):
        for way, run in calls.items():
            times[way].append(seconds(run, question.device))
    chosen[question] = min(times, key=lambda way: statistics.median(times[way] or [0.0]))
    return result


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """What a call takes, of a few in a row."""
    run()
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(5):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 5000


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def _leave_out(question: Question, way: str, what: str) -> None:
    warnings.warn(
        f"{question.op}: {NAMES.get(way, way)} {what} for {question.shape}; another way runs in its place",
        RuntimeWarning,
        stacklevel=2,
    )
