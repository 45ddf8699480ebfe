"""What the kernels of block-sparse attention share: how a program finds its tile, and walks a list of blocks.

A list's blocks, one after the other, are its *slots*: slot x is element `x % UNIT` of the block named by entry
`x // UNIT`, for blocks of UNIT. A step takes STEP slots: a part of a block, a block, or several that may lie anywhere,
so that small blocks fill the tensor cores too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsebert.kernels._triton import dot

__all__ = ["below", "bits_of", "blocks_of", "offsets", "place_of", "product", "sequence_of", "slots"]


@triton.jit
def place_of(order, blocks, heads, list_b, list_h, UNIT: tl.constexpr, TILE: tl.constexpr):
    """This program's `(batch, head, row of the lists, block, first element of its tile in that block)`.

    Tiles of a head follow each other, so that its operands stay in the cache, those with most work first, so that
    none of them is left over at the end.
    """
    parts: tl.constexpr = UNIT // TILE
    tiles = blocks * parts
    program = tl.program_id(0)
    both = program // tiles
    rank = program % tiles // parts
    batch = (both // heads).to(tl.int64)
    head = (both % heads).to(tl.int64)
    first_row = (batch * list_b + head * list_h) * blocks
    block = rank
    if order is not None:
        block = tl.load(order + first_row + rank)
    return batch, head, first_row + block, block, program % parts * TILE


@triton.jit
def sequence_of(cu_seqlens, batch, length):
    """`(its first token, its length)`; `(0, length)` where all are as long, else `length` is that of all tokens.

    Nobody has looked at `cu_seqlens` on a GPU: whatever they say, no sequence leaves the tokens.
    """
    start = (batch * 0).to(tl.int64)
    if cu_seqlens is not None:
        start = tl.maximum(tl.load(cu_seqlens + batch).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens + batch + 1).to(tl.int64), length)
        length = tl.maximum(end - start, 0).to(tl.int32)
    return start, length


@triton.jit
def below(columns, begin, end, limit):
    """How many of the entries from `begin` to `end`, which ascend, are below `limit`."""
    total = begin * 0
    for i in range(begin, end, 128):
        entry = i + tl.arange(0, 128)
        total += tl.sum((tl.load(columns + entry, mask=entry < end, other=limit) < limit).to(tl.int32), axis=0)
    return total


@triton.jit
def blocks_of(columns, begin, end, step, UNIT: tl.constexpr, STEP: tl.constexpr):
    """The block, or `[STEP]` blocks, of a step over entries from `begin` to before `end`; any past the end.

    Loops ask for them a step ahead: operands whose place was loaded within the same step would not be loaded while
    the step before is computed.
    """
    slot = step * STEP
    if STEP > UNIT:
        slot += tl.arange(0, STEP)
    entry = begin + slot // UNIT
    return tl.load(columns + entry, mask=entry < end, other=0)


@triton.jit
def slots(block, begin, end, step, UNIT: tl.constexpr, STEP: tl.constexpr):
    """`(elements [STEP], base, their entries, whether there are such entries)` of a step, of whose `blocks_of`.

    The entry is one for all, and always there, where a step is not longer than a block. `base` is for `offsets`.
    """
    if STEP <= UNIT:
        entry = begin + step * STEP // UNIT
        base = block * UNIT + step * STEP % UNIT
        element = base + tl.arange(0, STEP)
        there = element >= 0
    else:
        slot = step * STEP + tl.arange(0, STEP)
        entry = begin + slot // UNIT
        there = entry < end
        base = block * UNIT + slot % UNIT
        element = base
    return element, base, entry, there


@triton.jit
def offsets(base, stride, UNIT: tl.constexpr, STEP: tl.constexpr):
    """int64 `[STEP]`: the elements times `stride`, with as little left to do in the loop as there can be."""
    offset = base.to(tl.int64) * stride
    if STEP <= UNIT:
        offset = offset + tl.arange(0, STEP).to(tl.int64) * stride
    return offset


@triton.jit
def bits_of(bits, block, rows, keys, there, BQ: tl.constexpr, BK: tl.constexpr):
    """bool, `rows` against `keys` as they broadcast: what a partial block's bits say.

    `block` counts the blocks of bits from the first one in memory; `rows` and `keys` count within a block, or from the
    sequence's start.
    """
    byte = (block.to(tl.int64) * BQ + rows % BQ) * (BK // 8) + keys % BK // 8
    return (tl.load(bits + byte, mask=there, other=0) >> (keys % 8).to(tl.uint8)) & 1 != 0


@triton.jit
def product(a, b, a_rows, b_rows, a_there, b_there, D: tl.constexpr, CHUNK: tl.constexpr):
    """`a @ b^T` in float32, of tiles `[rows, D]`; what is not there counts as 0.

    With a CHUNK of D the tiles are taken as they are. Else, for float32, they are loaded again from where their rows
    begin, a chunk of the width at a time: of whole tiles the high and low halves, which its three products take, would
    not fit the registers.
    """
    found = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    if CHUNK == D:
        found = dot(a, tl.trans(b), found)
    else:
        for at in range(0, D, CHUNK):
            dims = at + tl.arange(0, CHUNK)[None, :]
            left = tl.load(a_rows[:, None] + dims, mask=a_there[:, None], other=0.0)
            right = tl.load(b_rows[:, None] + dims, mask=b_there[:, None], other=0.0)
            found = dot(left, tl.trans(right), found)
    return found
