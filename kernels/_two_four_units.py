"""2:4 products with many rows of x on the sparse matrix units: our kernel, or cuSPARSELt's, or none.

Which is fastest for a shape is measured when it is first called, and so is that the numbers are right: a unit whose
result is not the dense product's is left out, with a warning. The weight is packed once for each value it has
(`_packed`), cuSPARSELt's algorithm searched once for each shape.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from sparsebert.kernels import dense_linear as dense
from sparsebert.kernels._block_rows import capability

__all__ = ["Call", "fastest", "there"]

NAMES = {"packed": "our kernel", "cusparselt": "cuSPARSELt"}

# By unit and the storage of the values: what tells whether it is still that weight, and the weight packed.
_weights: dict[tuple[Any, ...], tuple[StorageWeakRef, StorageWeakRef, tuple[Any, ...], Tensor]] = {}
# By shape: the way that is fastest; cuSPARSELt's algorithm.
_chosen: dict[tuple[Any, ...], str] = {}
_algorithms: dict[tuple[Any, ...], int] = {}


@dataclass(frozen=True)
class Call:
    """A layer `activation(x @ W^T + bias)`: x `[M, K]`, and W as `semi_structured_linear` stores it."""

    x: Tensor
    values: Tensor
    positions: Tensor
    bias: Tensor | None
    activation: str
    expand: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
    """Makes the dense weight of values, positions and pattern."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """What a choice is remembered by: the number of rows counts by its power of two."""
        bias, rows = self.bias is not None, len(self.x).bit_length()
        return *self.values.shape, self.values.dtype, str(self.values.device), bias, self.activation, rows

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured: then nothing is measured, searched or kept."""
        return self.values.is_cuda and torch.cuda.is_current_stream_capturing()


def there(device: torch.device) -> tuple[str, ...]:
    """Which units there are: "packed" on Hopper with the compiled kernels, "cusparselt" where torch has it."""
    if device.type != "cuda":
        return ()
    sm = capability(device)
    found = ["packed"] if sm == 90 and _is_compiled("semi_structured_packed_linear") else []
    return (*found, *(["cusparselt"] if sm >= 80 and torch.backends.cusparselt.is_available() else []))


def _is_compiled(op: str) -> bool:
    """Whether there is a CUDA kernel for it; without the compiled library there is no such op at all."""
    known = hasattr(torch.ops.sparsebert, op)
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsebert::{op}", "CUDA")


def fastest(ways: Sequence[str], call: Call, expanded: Callable[[], Tensor]) -> Tensor:
    """The layer's `[M, N]`, by the fastest of `ways`: the units', and "expanded", which `expanded` computes."""
    how = _chosen.get(call.shape)
    if how is None:
        if call.capturing:
            # What has not been measured has not been seen to be right either.
            how = "cusparselt" if "cusparselt" in ways else "expanded"
        else:
            return _measured(ways, call, expanded)
    if how == "expanded":
        return expanded()
    try:
        return _BY[how](call)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if call.capturing:
            raise
        _leave_out(how, call, "failed", _line(error))
        _chosen[call.shape] = "expanded"
        return expanded()


def _measured(ways: Sequence[str], call: Call, expanded: Callable[[], Tensor]) -> Tensor:
    """The layer by the dense product; which of the ways is fastest is remembered."""
    usual = expanded()
    largest = usual.abs().max().float()
    if not bool(largest.isfinite()):
        # By such numbers no unit can be told to be right or wrong.
        return usual
    calls: dict[str, Callable[[], Tensor]] = {"expanded": expanded}
    for way in ways:
        if way == "expanded":
            continue
        try:
            wrong = (_BY[way](call).float() - usual.float()).abs().max()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _leave_out(way, call, "failed", _line(error))
            continue
        if bool(wrong <= 0.02 * largest + 1e-6):
            calls[way] = lambda by=_BY[way]: by(call)
        else:
            much = f"by {float(wrong):.3g}, where the largest number is {float(largest):.3g}"
            _leave_out(way, call, "is wrong", much)
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(3 if len(calls) > 1 else 0):
        for way, run in calls.items():
            times[way].append(_seconds(run, call.values.device))
    _chosen[call.shape] = min(times, key=lambda way: statistics.median(times[way] or [0.0]))
    return usual


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
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


def _leave_out(way: str, call: Call, what: str, why: str) -> None:
    warnings.warn(
        f"semi_structured_linear: {NAMES[way]} {what} for {list(call.x.shape)} by {list(call.values.shape)} ({why}); "
        "another way runs in its place",
        RuntimeWarning,
        stacklevel=2,
    )


def _by_packed(call: Call) -> Tensor:
    weight = _packed("packed", call)
    shape = [len(call.values), call.x.shape[1]]
    op = torch.ops.sparsebert.semi_structured_packed_linear
    return op(call.x, weight, call.bias, [], shape, call.activation)


def _by_cusparselt(call: Call) -> Tensor:
    m, x = len(call.x), call.x
    weight = _packed("cusparselt", call)
    # It takes rows of x by eights, those past the last computed for nothing, and 16 bytes at a time.
    padded = F.pad(x, (0, 0, 0, -m % 8)) if m % 8 else x.contiguous()
    padded = padded.clone() if padded.data_ptr() % 16 else padded
    if call.shape not in _algorithms and not call.capturing:
        _algorithms[call.shape] = _searched(weight, padded, call.bias)
    y = _multiplied(weight, padded, call.bias, _algorithms.get(call.shape, 0))
    return dense.activate(y[:m], call.activation)


_BY = {"packed": _by_packed, "cusparselt": _by_cusparselt}


def _multiplied(packed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    # Transposed, the result is row-major for x: nothing is copied.
    return torch._cslt_sparse_mm(packed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)


def _searched(packed: Tensor, x: Tensor, bias: Tensor | None) -> int:
    """The algorithm that cuSPARSELt finds fastest at this shape, if it computes what the usual one does."""
    found = int(torch._cslt_sparse_mm_search(packed, x.t(), bias=bias, transpose_result=True))
    usual, fast = (_multiplied(packed, x, bias, algorithm).float() for algorithm in (0, found))
    same = (fast - usual).abs().max() <= 0.02 * usual.abs().max() + 1e-6
    return found if bool(same) else 0


def _pack(unit: str, call: Call) -> Tensor:
    if unit == "packed":
        return torch.ops.sparsebert.semi_structured_pack(call.values, call.positions)
    return torch._cslt_compress(call.expand(call.values, call.positions, (2, 4)))


def _packed(unit: str, call: Call) -> Tensor:
    """The weight as `unit` reads it, kept until it changes or goes.

    A storage that is watched by a weak reference gives its place to no other, and a change in place counts its version
    up; then it is packed anew in the same place, where a graph captured earlier reads it. What has no version, and what
    a graph makes while it is captured, is not kept.
    """
    values, positions = call.values, call.positions
    if values.is_inference() or positions.is_inference():
        return _pack(unit, call)
    place, index = values.untyped_storage(), positions.untyped_storage()
    key = (unit, place._cdata, values.storage_offset(), tuple(values.shape), values.dtype)
    version = (values._version, index._cdata, positions.storage_offset(), positions._version)
    held = _weights.get(key)
    if held is not None and held[2] == version:
        return held[3]
    # No tensor of inference mode: those cannot be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        packed = _pack(unit, call)
        if held is not None and not call.capturing:
            packed = held[3].copy_(packed)
    if not call.capturing:
        for other in [other for other, entry in _weights.items() if entry[0].expired() or entry[1].expired()]:
            del _weights[other]
        _weights[key] = (StorageWeakRef(place), StorageWeakRef(index), version, packed)
    return packed
