"""The order of a head's rows of blocks in Triton, those with most blocks first, in one launch.

A row's place is the number of rows that go before it: those with more blocks, and those with as many above it. Every
row is held against every other, which for as many rows as a sequence has blocks is less work than a sort's launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen

__all__ = ["block_order", "cost", "specimens"]

_ROWS, _CHUNK, _WARPS = 16, 128, 4


@triton.jit(do_not_specialize=("blocks",))
def order_kernel(counts, order, blocks, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """`ROWS` of a head's rows a program."""
    tiles = (blocks + ROWS - 1) // ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64) * blocks
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    own = tl.load(counts + head + row, mask=row < blocks, other=0)[:, None]
    before = tl.zeros([ROWS], tl.int32)
    for first in range(0, blocks, CHUNK):
        other = first + tl.arange(0, CHUNK)[None, :]
        # What is past the last row has less than any.
        theirs = tl.load(counts + head + other, mask=other < blocks, other=-2147483648)
        before += tl.sum(((theirs > own) | ((theirs == own) & (other < row[:, None]))).to(tl.int32), 1)
    tl.store(order + head + before, row, mask=row < blocks)


def block_order(counts: Tensor) -> Tensor:
    """int32 `[Bm, Hm, QB]`, as the op's reference."""
    counts = counts.contiguous()
    order = torch.empty_like(counts)
    batches, heads, blocks = counts.shape
    programs = batches * heads * triton.cdiv(blocks, _ROWS)
    if programs > 0:
        order_kernel[(programs,)](counts, order, blocks, ROWS=_ROWS, CHUNK=_CHUNK, num_warps=_WARPS)
    return order


def specimens() -> list[Specimen]:
    """The one kernel."""
    signature = {"counts": "*i32", "order": "*i32", "blocks": "i32"}
    return [Specimen(f"order: {_ROWS}x{_CHUNK}", order_kernel, signature, {"ROWS": _ROWS, "CHUNK": _CHUNK}, _WARPS)]


def cost(heads: int, blocks: int) -> Cost:
    """Of `heads` heads' `blocks` rows, all batches'; a head's counts stay in the cache."""
    return Cost(4 * heads * blocks, 4 * heads * blocks, 0)
