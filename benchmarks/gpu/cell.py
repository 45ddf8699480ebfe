"""What a cell is, how its result is checked, and small helpers of both."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsebert.kernels._cost import Cost

__all__ = ["Call", "Cell", "Check", "Red", "Skip", "first_line", "own_cost", "relative_error", "tensors_of"]

Call = Callable[[Any], Any]


class Skip(Exception):
    """A cell or candidate that cannot be measured here, and why."""


class Red(Exception):
    """A wrong result: no speed is reported."""


@dataclass(frozen=True)
class Cell:
    """One measurement of a part: `run(bench, **settings)`, or with `small` in their place in the rehearsal."""

    name: str
    run: Callable[..., None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    ops: tuple[str, ...] = ()
    """The ops that must have a kernel for the GPU; without one the cell is skipped."""
    seconds: float = 150.0
    """After which it is taken to hang."""

    def case(self) -> dict[str, Any]:
        """Its settings, for a row that says that it was skipped or failed."""
        return {name: _word(value) for name, value in self.settings.items() if name != "targets"}


@dataclass(frozen=True)
class Check:
    """How a candidate is held to be right, all called with one set of inputs.

    Each output of `ours` must be as near to that of `exact` as `like` (torch's own way in the same dtype) is, times
    `factor`, or within `least`.
    """

    exact: Call
    like: Call | None = None
    factor: float = 2.0
    least: float = 1e-6
    ours: Call | None = None
    """In place of the timed call, where that gives no tensors."""


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor inside tuples, lists, mappings, and objects with fields."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_of(item)]
    if isinstance(value, torch.nn.Module):
        return [*value.parameters(), *value.buffers()]
    return [t for item in vars(value).values() for t in tensors_of(item)] if hasattr(value, "__dict__") else []


def relative_error(out: Tensor, exact: Tensor) -> float:
    """`‖out - exact‖ / ‖exact‖`, in float64; NaN where there is one."""
    difference, size = 0.0, 0.0
    # By slices: a copy of all in float64 may not fit.
    for a, b in zip(*(t.detach().reshape(-1).split(1 << 26) for t in (out, exact)), strict=True):
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    if size == 0.0:
        return math.sqrt(difference)
    return math.sqrt(difference / size)


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def own_cost(op: str, function: str = "cost", **known: Any) -> Cost | None:
    """`kernels.<op>.cost` of what is known, by the names of its parameters; None where it does not fit."""
    try:
        cost = getattr(importlib.import_module(f"sparsebert.kernels.{op}"), function)
        wanted = inspect.signature(cost).parameters
        found = cost(**{name: value for name, value in known.items() if name in wanted})
    except Exception:
        return None
    return found if isinstance(found, Cost) else None


def _word(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return "x".join(map(str, value)) if all(isinstance(item, int) for item in value) else f"{len(value)} of them"
    return str(value)
