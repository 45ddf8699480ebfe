"""2:4 products with many rows of x on the sparse matrix units: our kernel, or cuSPARSELt's, or none.

What a weight has beside its 2:4 (`two_four_linear`) our kernel multiplies too.

Which is fastest for a shape is measured when it is first called (_fastest.py). The weight is packed once for each value
it has (`_packed`), cuSPARSELt's algorithm searched once for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from sparsebert.kernels import dense_linear as dense
from sparsebert.kernels._block_rows import capability
from sparsebert.kernels._fastest import Question, is_compiled
from sparsebert.kernels._fastest import fastest as fastest_way
from sparsebert.ops.semi_structured_residue import packed_residue

__all__ = ["Call", "fastest", "there"]

# By unit and the storage of the values: the storages it was made of, what tells whether it is still that weight, and
# the weight packed.
_weights: dict[tuple[Any, ...], tuple[list[StorageWeakRef], tuple[Any, ...], list[Tensor]]] = {}
# By shape: cuSPARSELt's algorithm.
_algorithms: dict[Question, int] = {}


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
    rest: tuple[Tensor, Tensor] | None = None
    """What W has beside: values, and their places as `two_four_linear` stores them."""

    @property
    def question(self) -> Question:
        """What a choice is remembered by: the numbers of rows and of weights beside count by their power of two."""
        bias, rows = self.bias is not None, len(self.x).bit_length()
        beside = () if self.rest is None else (len(self.rest[0]).bit_length(),)
        shape = (*self.values.shape, self.values.dtype, bias, self.activation, rows, *beside)
        op = "semi_structured_linear" if self.rest is None else "two_four_linear"
        return Question(op, shape, self.values.device)

    @property
    def index(self) -> tuple[Tensor, ...]:
        """Where the values lie."""
        return (self.positions,) if self.rest is None else (self.positions, self.rest[1])

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured: then nothing is searched or kept."""
        return self.question.capturing


def there(device: torch.device) -> tuple[str, ...]:
    """Which units there are: "packed" on Hopper with the compiled kernels, "cusparselt" where torch has it."""
    if device.type != "cuda":
        return ()
    sm = capability(device)
    found = ["packed"] if sm == 90 and is_compiled("semi_structured_packed_linear") else []
    return (*found, *(["cusparselt"] if sm >= 80 and torch.backends.cusparselt.is_available() else []))


def fastest(ways: Sequence[str], call: Call, expanded: Callable[[], Tensor]) -> Tensor:
    """The layer's `[M, N]`, by the fastest of `ways`: the units', and "expanded", which `expanded` computes."""
    if call.rest is not None and call.capturing and _held("packed", call) is None:
        # To pack a residue the GPU is asked what there is of it, which a graph cannot do.
        return expanded()
    calls: dict[str, Callable[[], Tensor]] = {"expanded": expanded}
    for way in ways:
        if way != "expanded":
            calls[way] = lambda by=_BY[way]: by(call)
    return fastest_way(call.question, calls, "cusparselt" if "cusparselt" in ways else None)


def _by_packed(call: Call) -> Tensor:
    weight, *residue = _packed("packed", call)
    shape = [len(call.values), call.x.shape[1]]
    op = torch.ops.sparsebert.semi_structured_packed_linear
    return op(call.x, weight, call.bias, residue, shape, call.activation)


def _by_cusparselt(call: Call) -> Tensor:
    m, x = len(call.x), call.x
    (weight,) = _packed("cusparselt", call)
    # It takes rows of x by eights, those past the last computed for nothing, and 16 bytes at a time.
    padded = F.pad(x, (0, 0, 0, -m % 8)) if m % 8 else x.contiguous()
    padded = padded.clone() if padded.data_ptr() % 16 else padded
    if call.question not in _algorithms and not call.capturing:
        _algorithms[call.question] = _searched(weight, padded, call.bias)
    y = _multiplied(weight, padded, call.bias, _algorithms.get(call.question, 0))
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


def _pack(unit: str, call: Call) -> list[Tensor]:
    if unit == "cusparselt":
        return [torch._cslt_compress(call.expand(call.values, call.positions, (2, 4)))]
    packed = torch.ops.sparsebert.semi_structured_pack(call.values, call.positions)
    return [packed] if call.rest is None else [packed, *_residue(call, *call.rest)]


def _residue(call: Call, values: Tensor, places: Tensor) -> list[Tensor]:
    shape = (len(call.values), call.x.shape[1])
    dense, kept = values.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=values.device)
    dense.view(-1)[places], kept.view(-1)[places] = values, True
    # By the places rather than by what is not 0 now: packed anew it has the same sizes.
    return packed_residue(dense, kept)


def _key(unit: str, call: Call) -> tuple[Any, ...]:
    values, place = call.values, call.values.untyped_storage()._cdata
    return unit, call.rest is None, place, values.storage_offset(), tuple(values.shape), values.dtype


def _version(call: Call) -> tuple[Any, ...]:
    """What changes with the weight."""
    index = [(part.untyped_storage()._cdata, part.storage_offset(), part._version) for part in call.index]
    return call.values._version, *index


def _held(unit: str, call: Call) -> list[Tensor] | None:
    """The weight as it was packed, if it is still that weight."""
    if any(part.is_inference() for part in (call.values, *call.index)):
        return None
    held = _weights.get(_key(unit, call))
    return held[2] if held is not None and held[1] == _version(call) else None


def _packed(unit: str, call: Call) -> list[Tensor]:
    """The weight as `unit` reads it, kept until it changes or goes.

    A storage that is watched by a weak reference gives its place to no other, and a change in place counts its version
    up; then it is packed anew in the same place, where a graph captured earlier reads it. What has no version, and what
    a graph makes while it is captured, is not kept.
    """
    parts = (call.values, *call.index)
    if any(part.is_inference() for part in parts):
        return _pack(unit, call)
    packed = _held(unit, call)
    if packed is not None:
        return packed
    key, held = _key(unit, call), _weights.get(_key(unit, call))
    # No tensor of inference mode: those cannot be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        packed = _pack(unit, call)
        if held is not None and not call.capturing and [part.shape for part in held[2]] == [p.shape for p in packed]:
            packed = [old.copy_(new) for old, new in zip(held[2], packed, strict=True)]
    if not call.capturing:
        for other in [other for other, entry in _weights.items() if any(ref.expired() for ref in entry[0])]:
            del _weights[other]
        _weights[key] = ([StorageWeakRef(part.untyped_storage()) for part in parts], _version(call), packed)
    return packed
