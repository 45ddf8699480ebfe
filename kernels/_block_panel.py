"""The product over blocks of 64 x 64 with all of x's rows of a program in shared memory, for Hopper, up to 768 columns.

A program holds 128 tokens of x, at most 192 KiB, and lets the blocks of many block rows pass by, one after the other as
they lie in memory. For 256 cycles of products it loads one block, 8 KiB: a third of what gathering x for every block
costs, which is what binds there. A kernel cannot pick among tiles at run time by their number, so that a tree of
branches leads to the one a block meets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsebert.kernels._block_rows import store_tile
from sparsebert.kernels._triton import dot

__all__ = ["MOST_COLUMNS", "MOST_ROWS", "PANEL", "groups", "panel_product"]

PANEL = 128
MOST_COLUMNS = 12
MOST_ROWS = 256


def groups(m: int, block_rows: int, programs: int) -> int:
    """Groups that the block rows are cut into, each with a panel of its own: the fewest rounds of work on paper.

    A group reads the panel again, which is taken to cost an eighth of the whole work on it.
    """
    panels = -(-m // PANEL)
    return min(range(1, min(block_rows, 16) + 1), key=lambda g: -(-panels * g // programs) * (1 / g + 1 / 8))


@triton.jit
def _times(w, panel, column, acc, LOW: tl.constexpr, HIGH: tl.constexpr):
    if HIGH - LOW == 1:
        acc = dot(w, tl.trans(panel[LOW]), acc)
    else:
        MIDDLE: tl.constexpr = (LOW + HIGH) // 2
        if column < MIDDLE:
            acc = _times(w, panel, column, acc, LOW, MIDDLE)
        else:
            acc = _times(w, panel, column, acc, MIDDLE, HIGH)
    return acc


@triton.jit
def _finish(acc, bias, y, row, first_token, m, n, TOKENS: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr):
    place = row.to(tl.int64) * 64 + tl.arange(0, 64)
    acc = tl.trans(acc)
    if BIAS:
        acc += tl.load(bias + place).to(tl.float32)[None, :]
    inside = (tl.arange(0, 64) < 64)[None, :]
    store_tile(acc, y + place[None, :], first_token, m, n, inside, TOKENS, 64, ACTIVATION, 2048)


@triton.jit
def panel_product(
    x, values, permutation, columns, row_starts, bias, y, m, n, k, block_rows, group_rows,
    COLUMNS: tl.constexpr, TABLE: tl.constexpr, TOKENS: tl.constexpr, TURNED: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`activation(x W^T + bias)` for one panel of tokens and `group_rows` block rows; TABLE: the block rows, padded."""
    inner = tl.arange(0, 64)
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    x_at = x + tl.minimum(first_token + tl.arange(0, TOKENS), m - 1)[:, None] * k + inner[None, :]
    panel = (tl.load(x_at),)
    for j in tl.static_range(1, COLUMNS):
        panel = panel + (tl.load(x_at + j * 64),)  # noqa: RUF005
    first_row = tl.program_id(1) * group_rows
    last_row = tl.minimum(first_row + group_rows, block_rows)
    begin = tl.load(row_starts + first_row)
    end = tl.load(row_starts + last_row)
    w_at = values + inner[:, None] * 64 + inner[None, :]
    # A product with each part of x outside the branches puts it into shared memory for good; it is not looked at.
    w = tl.load(w_at)
    unused = tl.zeros((64, TOKENS), tl.float32)
    for j in tl.static_range(0, COLUMNS):
        unused = dot(w, tl.trans(panel[j]), unused)
    if m < 0:
        _finish(unused, bias, y, first_row, first_token, m, n, TOKENS, "none", False)
    i = tl.arange(0, TABLE)
    ends = tl.load(row_starts + 1 + i, i < block_rows, other=0x7FFFFFFF)
    row = tl.sum((ends <= begin).to(tl.int32), axis=0)
    row_end = tl.min(tl.where(ends > begin, ends, 0x7FFFFFFF), axis=0)
    acc = tl.zeros((64, TOKENS), tl.float32)
    column = tl.load(columns + begin, begin < end, other=0)
    source = tl.load(permutation + begin, begin < end, other=0).to(tl.int64) if TURNED else begin.to(tl.int64)
    for block in tl.range(begin, end, num_stages=STAGES):
        more = block + 1 < end
        next_column = tl.load(columns + block + 1, more, other=0)
        if TURNED:
            next_source = tl.load(permutation + block + 1, more, other=0).to(tl.int64)
            w = tl.trans(tl.load(w_at + source * 4096))
        else:
            next_source = source + 1
            w = tl.load(w_at + source * 4096)
        acc = _times(w, panel, column, acc, 0, COLUMNS)
        column = next_column
        source = next_source
        if block + 1 == row_end:
            _finish(acc, bias, y, row, first_token, m, n, TOKENS, ACTIVATION, BIAS)
            acc = tl.zeros((64, TOKENS), tl.float32)
            row = tl.sum((ends <= row_end).to(tl.int32), axis=0)
            row_end = tl.min(tl.where(ends > row_end, ends, 0x7FFFFFFF), axis=0)
    # Rows without any block.
    starts = tl.load(row_starts + i, i < block_rows, other=-1)
    if tl.max((starts == ends).to(tl.int32), axis=0) > 0:
        for offset in range(0, last_row - first_row):
            empty = first_row + offset
            if tl.load(row_starts + empty) == tl.load(row_starts + empty + 1):
                zero = tl.zeros((64, TOKENS), tl.float32)
                _finish(zero, bias, y, empty, first_token, m, n, TOKENS, ACTIVATION, BIAS)
