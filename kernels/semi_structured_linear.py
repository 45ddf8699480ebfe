"""A linear layer over n:m weights on a GPU: 2:4 by Triton for few rows of x, by the sparse matrix units for many.

The ways, of which `ways` names those that a shape can go:
- "decoded": a program reads values and positions and makes the dense tile in registers. It saves 7/16 of the weight's
  traffic, which is what a layer of few rows takes; bias and activation are fused.
- "packed": our kernel for Hopper's sparse matrix units (csrc/two_four.h), bias and activation fused.
- "cusparselt": the sparse matrix units through torch, which write y row-major with the bias added; the activation is
  torch's.
- "expanded": the dense weight is made, and dense_linear.py's product: for fp32, for shapes that no unit takes, and for
  every other n:m, which no unit multiplies.
Where there is more than one for many rows, all are measured once for a shape, and the fastest is kept
(_two_four_units.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels import _two_four_units as units
from sparsebert.kernels import dense_linear as dense
from sparsebert.kernels._block_rows import activated, power_above
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, dot, triton_type

__all__ = [
    "cost",
    "expanded_weight",
    "packed_traffic",
    "residue_cost",
    "semi_structured_linear",
    "specimens",
    "tiles",
    "ways",
]

FEW = 128
"""Rows of x up to which a decoded tile is read more cheaply than a dense one."""


def ways(m: int, n: int, k: int, dtype: torch.dtype, pattern: tuple[int, int], there: Sequence[str]) -> tuple[str, ...]:
    """How a call may be computed; `there`: what there is here of "packed" and "cusparselt"."""
    if pattern == (2, 4) and m <= FEW:
        return ("decoded",)
    if pattern != (2, 4) or dtype == torch.float32:
        return ("expanded",)
    of = {"packed": 8, "cusparselt": 16}
    return (*(unit for unit in there if n % of[unit] == 0 and k % of[unit] == 0), "expanded")


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
    found = ways(m, n, k, x.dtype, (pattern[0], pattern[1]), units.there(x.device))
    if found == ("decoded",):
        return _by_decoding(x, values, positions, bias, activation)

    def expanded() -> Tensor:
        return dense.dense_linear(x, expanded_weight(values, positions, pattern), bias, activation)

    if found == ("expanded",):
        return expanded()
    call = units.Call(x.reshape(m, k), values, positions, bias, activation, expanded_weight)
    return units.fastest(found, call, expanded).view(*x.shape[:-1], n)


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


def expanded_weight(values: Tensor, positions: Tensor, pattern: Sequence[int]) -> Tensor:
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


def _constants(m: int, n: int, dtype: torch.dtype, even: bool, activation: str, bias: bool) -> dict[str, Any]:
    rows, tokens, step = tiles(m, n, dtype)
    sizes = {"ROWS": rows, "TOKENS": tokens, "GROUPS": step, "EVEN": even}
    return {**sizes, "ACTIVATION": activation, "BIAS": bias}


def cost(
    m: int, n: int, k: int, item: int = 2, bias: bool = True, activation: str = "none", how: str | None = None
) -> Cost:
    """What a call of 2:4 moves and computes.

    Decoded: values and a quarter byte of positions each, dense FLOPs. Packed: the same bytes of whole tiles and half of
    the FLOPs, which Hopper's units do at up to twice the rate. cuSPARSELt: the same, and a pass over y for an
    activation. Expanded: the weight written and read besides, and the dense layer.

    Args:
        m, n, k: rows of x, the weight's shape.
        item: bytes of an entry.
        bias, activation: what follows the product.
        how: the way; by default the first that the shape can go on an H100.
    """
    dtype = torch.float32 if item == 4 else torch.bfloat16
    stored = n * k // 2 * item + n * -(-k // 8)
    how = how or ways(m, n, k, dtype, (2, 4), ("packed", "cusparselt"))[0]
    if how == "expanded":
        return Cost(stored, n * k * item, 0) + dense.cost(m, n, k, item, bias, activation)
    beside = m * k * item + (n * item if bias else 0)
    if how == "packed":
        tall, wide, blocks = -(-n // 128), -(-k // 64), -(-m // 128)
        return Cost(beside + tall * wide * 9216, m * n * item, 128 * tall * 64 * wide * 128 * blocks)
    once = Cost(beside + stored, m * n * item, m * n * k)
    if how == "cusparselt":
        return once if activation == "none" else once + Cost(m * n * item, m * n * item, 0)
    rows, tokens, _ = tiles(m, n, dtype)
    return Cost(once.read, once.written, 2 * -(-m // tokens) * tokens * -(-n // rows) * rows * k)


def residue_cost(m: int, n: int, chunks: int, products: int) -> Cost:
    """What a residue adds to "packed": its values once, and its products of 16 slots for every 64 rows and 128 tokens.

    The columns are gathered out of what has been fetched for the rest.
    """
    groups, blocks = 2 * -(-n // 128), -(-m // 128)
    each = groups * chunks * products
    return Cost(each * 64 * 16 * 2, 0, 2 * each * 64 * 16 * 128 * blocks, 0)


def packed_traffic(m: int, n: int, k: int) -> int:
    """Bytes that the blocks of "packed" fetch, mostly from the second-level cache (csrc/two_four.h).

    A block of 128 x 128 fetches its share of x, common to `down` blocks, and of the weight, common to `across`.
    """
    tall, wide, blocks = -(-n // 128), -(-k // 64), -(-m // 128)
    down = next(size for size in (4, 2, 1) if tall % size == 0)
    across = 8 // down
    while across > 1 and -blocks % across * 8 > blocks:
        across //= 2
    return tall * (blocks + -blocks % across) * wide * (9216 // across + 128 * 128 // down)


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
