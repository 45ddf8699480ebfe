"""Which storage format runs a pruned weight fastest on this machine: by measurement, never slower than dense.

Every format that can hold the weight's mask is built and timed in turns with the dense paths, at the numbers of rows
(tokens) that are asked for. Chosen is the one of least total time among those that beat the best dense path at every
one of these, else "dense". What was measured is remembered (`remember`), by machine, versions, shape, dtype and the
mask's structure.

On a GPU a layer is timed as an eager model runs it; for models that run in CUDA graphs give `measure_captured` as the
timer. Nothing is measured while a graph is being captured: "dense" it is then.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.formats import Format, parse_format
from sparsebert.nn import remember as memory
from sparsebert.nn.gpu_timer import measure_events
from sparsebert.nn.structure import Structure, structure_of
from sparsebert.ops._backend import OPS, REFERENCE, failures_raise, is_of_the_kernel
from sparsebert.ops._linear import activate
from sparsebert.ops.dense_linear import dense_linear

__all__ = ["DENSE_PATHS", "GPU_ROWS", "MARGIN", "ROWS", "Choice", "Timer", "choose", "measure"]

ROWS = (16, 512)
"""The default numbers of rows of x on a CPU: one short sentence, and four of 128 tokens."""

GPU_ROWS = (2048, 16384)
"""The default numbers of rows of x on a GPU: 16 sentences of 128 tokens, and 128 of them."""

MARGIN = 0.05
"""A sparse format must be this share faster than the best dense path at every number of rows: noise is no gain."""

DENSE_PATHS = ("F.linear", "dense_linear")

Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]
"""Gets the calls to compare, by name; returns the seconds that one call of each takes, infinity for one it cannot time.

On a GPU a call returns before its work is done; a timer has to wait for that."""

_LEAST_ROUNDS, _MOST_ROUNDS = 7, 99
# Seconds for all rounds together, where the least number of rounds allows it.
_BUDGET = 0.15
# So far behind the quickest, a candidate needs no exact number.
_HOPELESS = 3.0


@dataclass(frozen=True)
class Choice:
    """What was chosen, and every number that decided it; `print` shows a table."""

    format: str
    """The chosen format's spelling, "dense" where no other is sure to be faster."""
    rows: tuple[int, ...]
    seconds: Mapping[str, tuple[float, ...]]
    """Seconds of one call, one number per entry of `rows`: each candidate, and the `DENSE_PATHS`."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Formats that were not timed, and why."""
    remembered: bool = False
    """Whether the numbers are from an earlier measurement of a weight of the same structure."""

    @property
    def dense(self) -> tuple[float, ...]:
        """Seconds of the quicker dense path, per entry of `rows`."""
        if not self.seconds:
            return ()
        return tuple(min(times) for times in zip(*(self.seconds[name] for name in DENSE_PATHS), strict=True))

    @property
    def fastest(self) -> str:
        """The sparse format of least total time, be it slower than dense; "unstructured", which holds all, of none."""
        rivals = {name: sum(times) for name, times in self.seconds.items() if name not in DENSE_PATHS}
        return min(rivals, key=lambda name: rivals[name], default="unstructured")

    @property
    def speedup(self) -> float:
        """The best dense paths' total time over the chosen format's; 1.0 where dense was chosen."""
        return 1.0 if self.format == "dense" else sum(self.dense) / sum(self.seconds[self.format])

    @property
    def reason(self) -> str:
        """The choice in a plain sentence."""
        if self.format != "dense":
            return f"{self.format} is {self.speedup:.2f}x as fast as the best dense path"
        rivals = {name: times for name, times in self.seconds.items() if name not in DENSE_PATHS}
        if not self.seconds:
            return "nothing was measured: a CUDA graph is being captured; choose before that"
        if not rivals:
            return "no sparse format fits the weight" + "".join(f"; {name}: {why}" for name, why in _few(self.left_out))
        name = min(rivals, key=lambda rival: sum(rivals[rival]))
        ratios = [dense / own for dense, own in zip(self.dense, rivals[name], strict=True)]
        listed = ", ".join(f"{ratio:.2f}x at {rows} rows" for ratio, rows in zip(ratios, self.rows, strict=True))
        return (
            f"no sparse format is {MARGIN:.0%} faster than dense at every number of rows; "
            f"the best, {name}, runs at {listed}"
        )

    def __str__(self) -> str:
        heads = ["format", *(f"{rows} rows" for rows in self.rows), ""]
        body = [
            [name, *(f"{second * 1e6:.1f} us" for second in times), "chosen" if name == self.format else ""]
            for name, times in sorted(self.seconds.items(), key=lambda pair: sum(pair[1]))
        ]
        widths = [max(len(row[column]) for row in (heads, *body)) for column in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *body)
        ]
        notes = [f"{name}: left out, {why}" for name, why in self.left_out.items()]
        if self.remembered:
            notes.append("remembered from an earlier measurement; after forget_choices() it is made anew")
        return "\n".join([*(line.rstrip() for line in lines), *notes])


def choose(
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    rows: Sequence[int] | None = None,
    trainable: bool = False,
    timer: Timer | None = None,
    use_memory: bool = True,
) -> Choice:
    """Find the fastest format for `weight`, with torch's present number of threads.

    Takes a fraction of a second for a matrix of a BERT when nothing is remembered. Processes that must agree (ranks of
    a distributed run) should choose in one and give the format's spelling to the others.

    Args:
        weight: `[N, K]` float; its dtype is the dtype measured.
        mask: bool `[N, K]`, True where kept; None: where `weight` is not zero.
        bias: `[N]` or None.
        activation: what follows, see `sparsebert.ops.dense_linear`.
        rows: numbers of rows of x `[rows, K]` that matter; None: `ROWS`, on a GPU `GPU_ROWS`.
        trainable: measure forward and backward, among the formats that store no pruned weight.
        timer: measures the calls; None: `measure`, on a GPU `measure_events`.
        use_memory: False to measure anew, and to leave what is remembered as it is. To measure anew for good, as
            after a measurement on a busy machine, call `forget_choices()` first.

    Raises:
        UserError: `rows` that are no positive numbers. ValueError, TypeError: a weight or mask that does not fit.
    """
    on_gpu = weight.is_cuda
    counts = checked_rows(rows if rows is not None else GPU_ROWS if on_gpu else ROWS)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        # Not even the mask can be looked at, let alone a time be taken.
        return Choice("dense", counts, {})
    structure = structure_of(weight, mask)
    key = _key(structure, weight, bias is not None, activation, counts, trainable, timer)
    known = _from_json(memory.recall(key)) if use_memory else None
    if known is not None:
        return known
    usual = measure_events if on_gpu else measure
    found = _measured(structure, weight, bias, activation, counts, trainable, timer or usual)
    if use_memory:
        memory.remember(key, _to_json(found))
    return found


def measure(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of one call of each: the least of rounds in which all of them take turns, one call at a time.

    So each call finds the cache as the others left it, as a layer of a model does, rather than warm from itself. The
    least, since whatever else the machine does can only add to a call's time.
    """
    for call in calls.values():
        call()
    seconds = {name: min(_seconds(call), _seconds(call)) for name, call in calls.items()}
    quickest = min(seconds.values())
    names = [name for name in calls if seconds[name] <= _HOPELESS * quickest]
    rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(_BUDGET / sum(seconds[name] for name in names))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        # Everyone follows everyone: after the slowest the cache is emptier than after the quickest.
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order if turn % 2 == 0 else reversed(order):
            samples[name].append(_seconds(calls[name]))
    return {**seconds, **{name: min(times) for name, times in samples.items()}}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def checked_rows(rows: Sequence[int]) -> tuple[int, ...]:
    """`rows` in order, each once; a UserError where they are no positive numbers."""
    counts = tuple(rows) if isinstance(rows, Sequence) and not isinstance(rows, str) else ()
    if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
        raise UserError(f"rows: expected numbers of rows of x, at least one and each at least 1, got {rows!r}")
    return tuple(sorted(set(counts)))


def _measured(
    structure: Structure,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    rows: tuple[int, ...],
    trainable: bool,
    timer: Timer,
) -> Choice:
    """Builds the candidates and times them."""
    with _plain_torch(weight.device, trainable):
        mask = structure.mask
        # A copy, so that neither NaN in a pruned place nor the user's own gradients come in.
        dense = torch.where(mask, weight.detach(), 0.0).requires_grad_(trainable)
        shift = None if bias is None else bias.detach().to(dense.dtype).clone().requires_grad_(trainable)
        formats, left_out = _built(structure, dense, trainable)
        seconds: dict[str, list[float]] = {name: [] for name in (*DENSE_PATHS, *formats)}
        for count in rows:
            calls = _calls(formats, dense, shift, activation, count, trainable)
            for name in [name for name in formats if name in calls]:
                if (why := _trial(calls[name], dense.is_cuda)) is not None:
                    left_out[name] = why
                    del calls[name], formats[name], seconds[name]
            for name, second in timer(calls).items():
                seconds[name].append(float(second))
                if name in formats and not math.isfinite(second):
                    left_out[name] = "the timer could not time it"
                    del formats[name], seconds[name]
    times = {name: tuple(numbers) for name, numbers in seconds.items()}
    return Choice(_best(times), rows, times, left_out)


@contextlib.contextmanager
def _plain_torch(device: torch.device, trainable: bool) -> Iterator[None]:
    """Neither the caller's autocast nor its gradient mode or current GPU changes what is measured."""
    # Events are recorded, and waited for, on the current GPU alone.
    there = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with (
        there,
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.set_grad_enabled(trainable),
    ):
        yield


def _built(structure: Structure, dense: Tensor, trainable: bool) -> tuple[dict[str, Format], dict[str, str]]:
    """Each candidate's weight in its format, and why others are none."""
    candidates, left_out = structure.candidates(dense.dtype, trainable)
    formats = {}
    for spelling in candidates:
        cls, options = parse_format(spelling)
        if (why := _no_gpu_kernel(cls, dense)) is not None:
            left_out[spelling] = why
            continue
        try:
            formats[spelling] = cls.from_dense(dense.detach(), structure.mask, **options)
        except ValueError as error:
            left_out[spelling] = str(error)
    return formats, left_out


def _no_gpu_kernel(cls: type[Format], weight: Tensor) -> str | None:
    """Why a format would run on the reference alone on a GPU, where that costs far more than dense, or None."""
    if not weight.is_cuda or cls.op is None:
        return None
    try:
        body = OPS[cls.op].choose("cuda", True)
    except ValueError as error:
        return str(error)
    return "it has no GPU kernel here" if body.namespace == REFERENCE else None


def _calls(
    formats: Mapping[str, Format], dense: Tensor, bias: Tensor | None, activation: str, rows: int, trainable: bool
) -> dict[str, Callable[[], object]]:
    """What is timed: each layer on the same random x, and in training its backward too."""
    generator = torch.Generator(dense.device).manual_seed(rows)
    x = torch.randn(rows, dense.shape[1], generator=generator, device=dense.device).to(dense)
    x.requires_grad_(trainable)

    def layer(stored: Format) -> Callable[[], Tensor]:
        transposed = stored.transposed() if trainable else ()
        return lambda: stored.linear(x, bias, activation, transposed)

    layers: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "F.linear": (lambda: activate(F.linear(x, dense, bias), activation), dense),
        "dense_linear": (lambda: dense_linear(x, dense, bias, activation=activation), dense),
    }
    for spelling, stored in formats.items():
        stored.values.requires_grad_(trainable)
        layers[spelling] = (layer(stored), stored.values)
    return {
        name: _step(run, [x, values] + ([] if bias is None else [bias])) if trainable else run
        for name, (run, values) in layers.items()
    }


def _step(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def step() -> None:
        y = run()
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    return step


def _trial(call: Callable[[], object], on_gpu: bool) -> str | None:
    """Why a candidate does not run here, or None; a kernel that fails is not to fall back here."""
    try:
        with failures_raise():
            call()
            if on_gpu:
                torch.cuda.synchronize()
    except Exception as error:
        # Triton's own errors are no RuntimeErrors.
        if not isinstance(error, (RuntimeError, ValueError)) and not is_of_the_kernel(error):
            raise
        return f"it does not run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def _best(seconds: Mapping[str, tuple[float, ...]]) -> str:
    dense = [min(times) for times in zip(*(seconds[name] for name in DENSE_PATHS), strict=True)]
    faster = [
        name
        for name, times in seconds.items()
        if name not in DENSE_PATHS and all(own <= (1 - MARGIN) * best for own, best in zip(times, dense, strict=True))
    ]
    return min(faster, key=lambda name: sum(seconds[name]), default="dense")


def _key(
    structure: Structure,
    weight: Tensor,
    has_bias: bool,
    activation: str,
    rows: tuple[int, ...],
    trainable: bool,
    timer: Timer | None,
) -> str:
    parts: dict[str, Any] = {
        **memory.machine(weight.device),
        "shape": list(weight.shape),
        "dtype": str(weight.dtype),
        "bias": has_bias,
        "activation": activation,
        "rows": list(rows),
        "trainable": trainable,
        "structure": structure.bucket(weight.dtype, trainable),
    }
    if timer is not None:
        parts["timer"] = f"{getattr(timer, '__module__', '')}.{getattr(timer, '__qualname__', type(timer).__name__)}"
    return json.dumps(parts, sort_keys=True)


def _to_json(choice: Choice) -> dict[str, Any]:
    seconds = {name: list(times) for name, times in choice.seconds.items()}
    return {"rows": list(choice.rows), "seconds": seconds, "left_out": dict(choice.left_out)}


def _from_json(entry: dict[str, Any] | None) -> Choice | None:
    """The remembered choice, made anew from its numbers; None for an entry that is none."""
    try:
        rows = tuple(int(count) for count in entry["rows"])  # type: ignore[index]
        seconds = {str(k): tuple(float(s) for s in v) for k, v in entry["seconds"].items()}  # type: ignore[index]
        left_out = {str(name): str(why) for name, why in entry["left_out"].items()}  # type: ignore[index]
        if not rows or any(len(s) != len(rows) or not all(0 < t < math.inf for t in s) for s in seconds.values()):
            return None
        for name in seconds:
            if name not in DENSE_PATHS:
                parse_format(name)
        return replace(Choice("dense", rows, seconds, left_out, remembered=True), format=_best(seconds))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _few(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    return list(reasons.items())[:3]
