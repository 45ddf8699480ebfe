"""What the block-sparse kernels share: one tile of a layer's result, its activation, and how tiles are chosen.

A tile is `tokens` rows of x times a slice of one block row of W, computed as Y^T = W X^T: the weight's block lies on
the 64 rows of Hopper's tensor-core instruction and the tokens on its wide side, which reads the least shared memory.
The result stays in registers over the whole block row. A step takes `depth` of the row's stored columns, laid end to
end: a part of one block, or several small blocks at once, gathered from x where each of them lies.

The gather sets the pace: with 64 rows of weight a step of depth 64 and 256 tokens moves 40 KiB from the second-level
cache for 512 cycles of products. Wider tokens hardly help (x is most of it); taller block rows do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparsebert.kernels._triton import dot

__all__ = [
    "MOST_SORTED",
    "Tiles",
    "capability",
    "linear_tile",
    "longest_first",
    "power_above",
    "sorted_rows",
    "store_tile",
    "tiles",
]

MOST_SORTED = 64


@dataclass(frozen=True)
class Tiles:
    """How a product over block rows is cut up."""

    rows: int
    """Rows of W a program holds, at least 16; those beyond the block row's are computed for nothing."""
    depth: int
    """Stored columns a step takes."""
    tokens: int
    """Rows of x a program holds."""
    warps: int
    stages: int

    @property
    def swapped(self) -> bool:
        """Whether the weight lies on the tensor core's tall side: Y^T = W X^T."""
        return self.rows >= 64 or self.tokens < 64


@functools.cache
def capability(device: torch.device) -> int:
    """80 for sm_80 and so on; 90 under the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_above(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def sorted_rows(rows: int) -> int:
    """The size of the table in which a program looks for its block row, longest first; 1: rows come as they are."""
    return power_above(rows) if 1 < rows <= MOST_SORTED else 1


def tiles(
    block: tuple[int, int], block_rows: int, blocks: int, m: int, dtype: torch.dtype, arch: int, programs: int = 128
) -> Tiles:
    """The tiles of `block_rows` rows that hold `blocks` blocks of R x C, times m tokens, on sm_`arch`.

    Tokens are as many as leave a program for every multiprocessor of a large device (`programs`). Long block rows
    take the widest tile, one program a multiprocessor; short ones smaller tiles, so that three programs share a
    multiprocessor and one stores while another computes. What is fastest is for measurements to say; this is from the
    bytes and registers that a tile takes.
    """
    wide = dtype == torch.float32
    rows = min(max(power_above(block[0]), 16), 64 if wide else 128)
    depth = 32 if wide else 64
    if block[1] % depth and block[1] > depth // 2 and block[1] % (depth // 2) == 0:
        depth //= 2
    long = blocks * block[1] >= 512 * block_rows
    tokens = min(256 if long and rows >= 64 and not wide else 128, max(power_above(m), 16))
    if wide:
        tokens = min(tokens, 64)
    elif arch < 90 and rows > 64:
        # mma.sync wants its operands in registers too.
        tokens = min(tokens, 128)
    parts = block_rows * -(-block[0] // rows)
    while tokens > 64 and parts * -(-m // tokens) < programs:
        tokens //= 2
    cells = rows * tokens
    if arch < 90:
        return Tiles(rows, depth, tokens, 8 if cells > 64 * 64 else 4, 3)
    if wide:
        return Tiles(rows, depth, tokens, 8 if cells > 32 * 64 else 4, 3)
    return Tiles(rows, depth, tokens, 8 if cells > 64 * 128 else 4, 4 if tokens == 256 else 3)


@triton.jit
def _tanh(v):
    # Near 0 the quotient has no digits left.
    square = v * v
    series = v * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(v) < 0.1, series, 1 - 2 / (1 + tl.exp(2 * v)))


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """float32 `v` activated; NaN stays NaN."""
    if ACTIVATION == "gelu":
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        v = v / (1 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
    elif ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "tanh":
        v = _tanh(v)
    return v


@triton.jit
def longest_first(row_starts, place, block_rows, SORTED: tl.constexpr):
    """The block row with the `place`-th most blocks; `place` itself where SORTED, the table's size, is 1."""
    row = place
    if SORTED > 1:
        i = tl.arange(0, SORTED)
        inside = i < block_rows
        length = tl.load(row_starts + 1 + i, inside, other=0) - tl.load(row_starts + i, inside, other=0)
        key = tl.where(inside, length, -1) * SORTED + (SORTED - 1 - i)
        rank = tl.sum((key[None, :] > key[:, None]).to(tl.int32), axis=1)
        row = tl.sum(tl.where(rank == place, i, 0), axis=0)
    return row


@triton.jit
def _ahead(index, start, length, step, C: tl.constexpr, DEPTH: tl.constexpr):
    """The entries of `index` for a step's blocks: one, or where it takes several blocks one for each of its columns."""
    if C % DEPTH == 0:
        block = step // (C // DEPTH)
        entry = tl.load(index + start + block, block < length, other=0)
    else:
        block = (step * DEPTH + tl.arange(0, DEPTH)) // C
        entry = tl.load(index + start + block, block < length, other=0)
    return entry


@triton.jit
def _step(
    acc, column, source, x_rows, w_rows, start, length, step,
    R: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, TURNED: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    flat = step * DEPTH + tl.arange(0, DEPTH)
    block = source
    if C % DEPTH == 0:
        # Within one block: nothing to mask.
        if not TURNED:
            block = start + step // (C // DEPTH)
        inner = (step % (C // DEPTH)) * DEPTH + tl.arange(0, DEPTH)
        x = tl.load(x_rows + (column * C + inner)[None, :])
        if TURNED:
            w = tl.load(w_rows + block * (R * C) + (inner * R)[:, None])
        else:
            w = tl.load(w_rows + block * (R * C) + inner[None, :])
    else:
        if not TURNED:
            block = start + flat // C
        inner = flat % C
        inside = flat < length * C
        place = column * C + inner
        if C >= 8 and DEPTH % C == 0:
            # What the compiler cannot see behind a load: a block's columns are neighbours.
            place = tl.max_contiguous(tl.multiple_of(place, C), C)
        x = tl.load(x_rows + place[None, :], inside[None, :], other=0)
        if TURNED:
            w = tl.load(w_rows + (block * (R * C) + inner * R)[:, None], inside[:, None], other=0)
        else:
            w = tl.load(w_rows + (block * (R * C) + inner)[None, :], inside[None, :], other=0)
    if not TURNED:
        w = tl.trans(w)
    return dot(tl.trans(w), tl.trans(x), acc) if SWAPPED else dot(x, w, acc)


@triton.jit
def linear_tile(
    x, values, permutation, columns, row_starts, bias, y, row, part, first_token, m, n, k,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, TOKENS: tl.constexpr,
    SWAPPED: tl.constexpr, TURNED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of `activation(x W^T + bias)`: ROWS rows of block row `row`, from part * ROWS on, of TOKENS tokens.

    x `[m, k]` and y `[m, n]` are contiguous. TURNED: block b of this product is the transpose of block permutation[b]
    of `values`, which lie as C x R.
    """
    start = tl.load(row_starts + row)
    length = tl.load(row_starts + row + 1) - start
    start = start.to(tl.int64)
    r = part * ROWS + tl.arange(0, ROWS)
    token = first_token + tl.arange(0, TOKENS).to(tl.int64)
    # What lies beyond the edges reads the last row and is not stored: no loop pays for a mask.
    r_read = tl.minimum(r, R - 1) if R % ROWS != 0 else r
    x_rows = x + tl.minimum(token, m - 1)[:, None] * k
    w_rows = values + (r_read[None, :] if TURNED else (r_read * C)[:, None])
    acc = tl.zeros((ROWS, TOKENS), tl.float32) if SWAPPED else tl.zeros((TOKENS, ROWS), tl.float32)
    steps = length * (C // DEPTH) if C % DEPTH == 0 else tl.cdiv(length * C, DEPTH)
    # Where the next blocks lie is known a step ahead: else two loads would wait for one another.
    column = _ahead(columns, start, length, 0, C, DEPTH)
    source = _ahead(permutation, start, length, 0, C, DEPTH) if TURNED else start
    for step in range(0, steps):
        next_column = _ahead(columns, start, length, step + 1, C, DEPTH)
        next_source = _ahead(permutation, start, length, step + 1, C, DEPTH) if TURNED else start
        acc = _step(acc, column, source, x_rows, w_rows, start, length, step, R, C, DEPTH, TURNED, SWAPPED)
        column = next_column
        source = next_source
    if SWAPPED:
        acc = tl.trans(acc)
    if BIAS:
        acc += tl.load(bias + row * R + r_read).to(tl.float32)[None, :]
    y_columns = y + (row.to(tl.int64) * R + r)[None, :]
    store_tile(acc, y_columns, first_token, m, n, (r < R)[None, :], TOKENS, ROWS, ACTIVATION, 8192)


@triton.jit
def store_tile(
    acc, y_columns, first_token, m, n, inside, TOKENS: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """`activation(acc)`, `[TOKENS, ROWS]`, into y; at most MOST entries at a time, for the sake of registers."""
    if TOKENS * ROWS > MOST:
        HALF: tl.constexpr = TOKENS // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (2, HALF, ROWS)), (1, 2, 0)))
        store_tile(low, y_columns, first_token, m, n, inside, HALF, ROWS, ACTIVATION, MOST)
        store_tile(high, y_columns, first_token + HALF, m, n, inside, HALF, ROWS, ACTIVATION, MOST)
    else:
        token = first_token + tl.arange(0, TOKENS).to(tl.int64)
        y = activated(acc, ACTIVATION).to(y_columns.dtype.element_ty)
        tl.store(y_columns + token[:, None] * n, y, (token < m)[:, None] & inside)
