"""A linear layer over n:m weights on a GPU: 2:4 by Triton for few rows of x, by cuSPARSELt for many.

Three ways, `way` picks one by the shape:
- "decoded": a program reads values and positions and makes the dense tile in registers. It saves 7/16 of the weight's
  traffic, which is what a layer of few rows takes; bias and activation are fused.
- "cusparselt": the sparse matrix units through torch, which write y row-major with the bias added; the activation is
  torch's. The weight is packed once for each value it has (`_packed`), the algorithm searched once for each shape.
- "expanded": the dense weight is made, and dense_linear.py's product: for fp32, for shapes that cuSPARSELt does not
  take, and for every other n:m, which no unit multiplies.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from sparsebert.kernels import dense_linear as dense
from sparsebert.kernels._block_rows import activated, capability, power_above
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, dot, triton_type

__all__ = ["cost", "semi_structured_linear", "specimens", "tiles", "way"]

FEW = 128
"""Rows of x up to which a decoded tile is read more cheaply than a dense one."""

# By the storage of the values: what tells whether it is still that weight, and the weight packed.
_weights: dict[tuple[Any, ...], tuple[StorageWeakRef, StorageWeakRef, tuple[Any, ...], Tensor]] = {}
# By shape: the algorithm, or None where cuSPARSELt failed.
_algorithms: dict[tuple[Any, ...], int | None] = {}


def way(m: int, n: int, k: int, dtype: torch.dtype, pattern: tuple[int, int], cusparselt: bool) -> str:
    """How a call is computed: "decoded", "cusparselt" or "expanded"; `cusparselt`: whether torch has it."""
    if pattern == (2, 4) and m <= FEW:
        return "decoded"
    takes = pattern == (2, 4) and dtype != torch.float32 and n % 16 == 0 and k % 16 == 0
    return "cusparselt" if takes and cusparselt else "expanded"


def tiles(m: int, n: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """`(ROWS, TOKENS, GROUPS)`: of the weight, of x, and groups of four columns a step takes."""
    wide = dtype == torch.float32
    rows = min(max(power_above(n), 16), 16 if n < 2048 else 32 if m <= 32 or wide else 64)
    # More is more than the registers hold.
    return rows, min(max(power_above(m), 16), 64), 16 if wide or rows == 64 else 32


@triton.jit
def _decoded(values, positions, row, first, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """The dense `[ROWS, 4 * GROUPS]` of these rows from group `first` on; 0 past the last group."""
    place = first * 2 + tl.arange(0, 2 * GROUPS)
    group = first + tl.arange(0, GROUPS)
    values_at = values + row[:, None] * (2 * groups) + place[None, :]
    codes_at = positions + row[:, None] * ((groups + 1) // 2) + (group // 2)[None, :]
    if EVEN:
        pair = tl.load(values_at)
        code = tl.load(codes_at)
    else:
        pair = tl.load(values_at, (place < 2 * groups)[None, :], other=0)
        code = tl.load(codes_at, (group < groups)[None, :], other=0)
    low, high = tl.split(tl.reshape(pair, (ROWS, GROUPS, 2)))
    # Two bits a position, two groups to a byte: the even one in the lower half.
    code = (code.to(tl.int32) >> ((group % 2) * 4)[None, :])[:, :, None]
    j = tl.arange(0, 4)[None, None, :]
    w = tl.where((code & 3) == j, low[:, :, None], 0.0)
    w = tl.where(((code >> 2) & 3) == j, high[:, :, None], w)
    return tl.reshape(w.to(values.dtype.element_ty), (ROWS, 4 * GROUPS))


@triton.jit
def _linear(
    x, values, positions, bias, y, m, n, groups, across,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) % across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) // across).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    # What lies beyond the edges reads the last row and is not stored.
    read = tl.minimum(row, n - 1)
    column = tl.arange(0, 4 * GROUPS)
    x_rows = x + tl.minimum(token, m - 1)[:, None] * (4 * groups)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, groups, GROUPS):
        w = _decoded(values, positions, read, first, groups, ROWS, GROUPS, EVEN)
        place = first * 4 + column
        if EVEN:
            v = tl.load(x_rows + place[None, :])
        else:
            v = tl.load(x_rows + place[None, :], (place < 4 * groups)[None, :], other=0)
        acc = dot(w, tl.trans(v), acc)
    acc = tl.trans(acc)
    if BIAS:
        acc += tl.load(bias + read).to(tl.float32)[None, :]
    out = activated(acc, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + token[:, None] * n + row[None, :], out, (token < m)[:, None] & (row < n)[None, :])


@triton.jit
def _expand(values, positions, out, n, groups, across, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % across) * GROUPS
    w = _decoded(values, positions, tl.minimum(row, n - 1), first, groups, ROWS, GROUPS, False)
    place = first * 4 + tl.arange(0, 4 * GROUPS)
    tl.store(out + row[:, None] * (4 * groups) + place[None, :], w, (row < n)[:, None] & (place < 4 * groups)[None, :])


def semi_structured_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    pattern: Sequence[int],
    activation: str,
    transposed: Sequence[Tensor],
) -> Tensor:
    """See `sparsebert.ops.semi_structured_linear`."""
    n, k = values.shape[0], values.shape[1] // pattern[0] * pattern[1]
    m = x.numel() // k
    if not m:
        return x.new_empty((*x.shape[:-1], n))
    how = way(m, n, k, x.dtype, (pattern[0], pattern[1]), _has_cusparselt(x.device))
    if how == "decoded":
        return _by_decoding(x, values, positions, bias, activation)
    if how == "cusparselt":
        y = _by_cusparselt(x.reshape(m, k), values, positions, bias)
        if y is not None:
            return dense.activate(y, activation).view(*x.shape[:-1], n)
    return dense.dense_linear(x, _dense_weight(values, positions, pattern), bias, activation)


def _by_decoding(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    n, groups = values.shape[0], values.shape[1] // 2
    y = x.new_empty((*x.shape[:-1], n))
    m = y.numel() // n
    rows, tokens, step = tiles(m, n, x.dtype)
    across = -(-n // rows)
    _linear[(across * -(-m // tokens),)](
        x,
        values,
        positions,
        y if bias is None else bias,
        y,
        m,
        n,
        groups,
        across,
        **_constants(m, n, x.dtype, groups % step == 0, activation, bias is not None),
        num_warps=4,
        num_stages=3,
    )
    return y


def _dense_weight(values: Tensor, positions: Tensor, pattern: Sequence[int]) -> Tensor:
    """The weight `[N, K]` with its zeros."""
    n, m = pattern
    if (n, m) == (2, 4):
        rows, groups = values.shape[0], values.shape[1] // 2
        out = values.new_empty((rows, 4 * groups))
        across = -(-groups // 32)
        _expand[(-(-rows // 16) * across,)](values, positions, out, rows, groups, across, ROWS=16, GROUPS=32)
        return out
    bits = 2 if m <= 4 else 4 if m <= 16 else 8
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)
    unpacked = ((positions[:, :, None] >> places) & ((1 << bits) - 1)).flatten(1)[:, : values.shape[1]]
    column = unpacked + torch.arange(values.shape[1], device=values.device) // n * m
    return values.new_zeros(values.shape[0], values.shape[1] // n * m).scatter_(1, column, values)


def _has_cusparselt(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cusparselt.is_available() and capability(device) >= 80


def _by_cusparselt(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor | None:
    """The layer without its activation, `[M, N]`; None where cuSPARSELt fails at the shape, told once."""
    m = len(x)
    shape = (*values.shape, values.dtype, str(values.device), bias is not None, m.bit_length())
    if _algorithms.get(shape, 0) is None:
        return None
    capturing = values.is_cuda and torch.cuda.is_current_stream_capturing()
    try:
        packed = _packed(values, positions, capturing)
        # It takes rows of x by eights, those past the last computed for nothing, and 16 bytes at a time.
        padded = F.pad(x, (0, 0, 0, -m % 8)) if m % 8 else x.contiguous()
        padded = padded.clone() if padded.data_ptr() % 16 else padded
        if shape not in _algorithms and not capturing:
            _algorithms[shape] = _searched(packed, padded, bias)
        y = _multiplied(packed, padded, bias, _algorithms.get(shape) or 0)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if capturing:
            raise
        _algorithms[shape] = None
        warnings.warn(
            f"semi_structured_linear: cuSPARSELt failed for [{m}, {x.shape[1]}] by {list(values.shape)} "
            f"({str(error).splitlines()[0] if str(error) else error!r}); the dense product runs in its place",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return y[:m]


def _multiplied(packed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    # Transposed, the result is row-major for x: nothing is copied.
    return torch._cslt_sparse_mm(packed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)


def _searched(packed: Tensor, x: Tensor, bias: Tensor | None) -> int:
    """The algorithm that cuSPARSELt finds fastest at this shape, if it computes what the usual one does."""
    found = int(torch._cslt_sparse_mm_search(packed, x.t(), bias=bias, transpose_result=True))
    usual, fast = (_multiplied(packed, x, bias, algorithm).float() for algorithm in (0, found))
    same = (fast - usual).abs().max() <= 0.02 * usual.abs().max() + 1e-6
    return found if bool(same) else 0


def _packed(values: Tensor, positions: Tensor, capturing: bool) -> Tensor:
    """The weight as cuSPARSELt reads it, kept until it changes or goes.

    A storage that is watched by a weak reference gives its place to no other, and a change in place counts its version
    up; then it is packed anew in the same place, where a graph captured earlier reads it. What has no version, and what
    a graph makes while it is captured, is not kept.
    """
    if values.is_inference() or positions.is_inference():
        return torch._cslt_compress(_dense_weight(values, positions, (2, 4)))
    place, index = values.untyped_storage(), positions.untyped_storage()
    key = (place._cdata, values.storage_offset(), tuple(values.shape), values.dtype)
    version = (values._version, index._cdata, positions.storage_offset(), positions._version)
    held = _weights.get(key)
    if held is not None and held[2] == version:
        return held[3]
    # No tensor of inference mode: those cannot be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        packed = torch._cslt_compress(_dense_weight(values, positions, (2, 4)))
        if held is not None and not capturing:
            packed = held[3].copy_(packed)
    if not capturing:
        for other in [other for other, entry in _weights.items() if entry[0].expired() or entry[1].expired()]:
            del _weights[other]
        _weights[key] = (StorageWeakRef(place), StorageWeakRef(index), version, packed)
    return packed


def _constants(m: int, n: int, dtype: torch.dtype, even: bool, activation: str, bias: bool) -> dict[str, Any]:
    rows, tokens, step = tiles(m, n, dtype)
    sizes = {"ROWS": rows, "TOKENS": tokens, "GROUPS": step, "EVEN": even}
    return {**sizes, "ACTIVATION": activation, "BIAS": bias}


def cost(
    m: int, n: int, k: int, item: int = 2, bias: bool = True, activation: str = "none", cusparselt: bool = True
) -> Cost:
    """What a call of 2:4 moves and computes.

    Decoded: values and a quarter byte of positions each, dense FLOPs. cuSPARSELt: the same bytes, half of the FLOPs,
    and a pass over y for an activation. Expanded: the weight written and read besides, and the dense layer.
    """
    dtype = torch.float32 if item == 4 else torch.bfloat16
    stored = n * k // 2 * item + n * -(-k // 8)
    how = way(m, n, k, dtype, (2, 4), cusparselt)
    if how == "expanded":
        return Cost(stored, n * k * item, 0) + dense.cost(m, n, k, item, bias, activation)
    once = Cost((m * k + (n if bias else 0)) * item + stored, m * n * item, m * n * k)
    if how == "cusparselt":
        return once if activation == "none" else once + Cost(m * n * item, m * n * item, 0)
    rows, tokens, _ = tiles(m, n, dtype)
    return Cost(once.read, once.written, 2 * -(-m // tokens) * tokens * -(-n // rows) * rows * k)


def specimens() -> list[Specimen]:
    """The decoding product for few rows of x and narrow and wide weights, and the expansion."""
    found: dict[str, Specimen] = {}
    for dtype, sizes in ((torch.bfloat16, _SIZES), (torch.float16, _SIZES[:1]), (torch.float32, _SIZES[1:])):
        kind = triton_type(dtype)
        for m, n in sizes:
            rows, tokens, step = tiles(m, n, dtype)
            signature = {"x": "*" + kind, "values": "*" + kind, "positions": "*u8", "bias": "*" + kind, "y": "*" + kind}
            signature |= dict.fromkeys(("m", "n", "groups", "across"), "i32")
            label = f"{kind} {rows} x {tokens}, {step} groups"
            constants = _constants(m, n, dtype, True, "gelu", True)
            found.setdefault(label, Specimen(label, _linear, signature, constants, 4, 3, 80, ("n", "groups")))
        signature = {"values": "*" + kind, "positions": "*u8", "out": "*" + kind}
        signature |= dict.fromkeys(("n", "groups", "across"), "i32")
        label = f"{kind} expanded"
        found[label] = Specimen(label, _expand, signature, {"ROWS": 16, "GROUPS": 32}, 4, 3, 80, ("n", "groups"))
    return list(found.values())


_SIZES = ((1, 3072), (16, 768), (128, 3072))
