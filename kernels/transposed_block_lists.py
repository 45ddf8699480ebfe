"""The lists of blocks by key blocks in Triton, of those by block rows, in three launches.

What is listed is first placed in a map, already transposed; the lists of its rows are then made as those of any map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen
from sparsebert.kernels.block_lists import launch, lists_specimen
from sparsebert.kernels.block_order import block_order
from sparsebert.kernels.block_order import cost as order_cost

__all__ = ["cost", "specimens", "transposed_block_lists"]

# Eight rows lie side by side in the transposed map: 32 bytes, what a cache line is written in.
_ROWS, _CHUNK, _WARPS = 8, 64, 4
_SIZES = ("rows", "blocks", "room", "keys")


@triton.jit(do_not_specialize=_SIZES)
def place_kernel(
    columns, full_counts, counts, placed, rows, blocks, room, keys, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """`ROWS` block rows a program: in `placed` `[.., keys, blocks]` 0 for full ones, i + 1 for the partial one i, else
    -1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    start = placed + row // blocks * keys * blocks + row % blocks
    for first in range(0, keys, CHUNK):
        key = first + tl.arange(0, CHUNK)[:, None]
        at = start[None, :] + key.to(tl.int64) * blocks
        tl.store(at, tl.full([CHUNK, ROWS], -1, tl.int32), mask=inside[None, :] & (key < keys))
    # The program's other threads may have written what is written again here.
    tl.debug_barrier()
    full = tl.load(full_counts + row, mask=inside, other=0)
    count = tl.minimum(tl.load(counts + row, mask=inside, other=0), room)
    for first in range(0, tl.max(count, 0), CHUNK):
        entry = first + tl.arange(0, CHUNK)[None, :]
        column = tl.load(columns + (row * room)[:, None] + entry, mask=entry < count[:, None], other=-1)
        at = start[:, None] + column.to(tl.int64) * blocks
        # Nobody has looked at the columns on a GPU: none leaves the map.
        there = (column >= 0) & (column < keys)
        tl.store(at, tl.maximum(entry - full[:, None] + 1, 0), mask=there)


def transposed_block_lists(
    columns: Tensor, full_counts: Tensor, counts: Tensor, keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(columns, full_counts, counts, places, key_order)`, as the op's reference."""
    batches, heads, blocks, room = columns.shape
    placed = torch.empty((batches, heads, keys, blocks), dtype=torch.int32, device=columns.device)
    if placed.numel() > 0:
        rows = batches * heads * blocks
        place_kernel[(triton.cdiv(rows, _ROWS),)](
            columns.contiguous(), full_counts.contiguous(), counts.contiguous(), placed, rows, blocks, room, keys,
            ROWS=_ROWS, CHUNK=_CHUNK, num_warps=_WARPS,
        )  # fmt: skip
    places = torch.empty_like(placed)
    turned, fulls, all_of_them = launch(placed, places=places)
    return turned, fulls, all_of_them, places, block_order(all_of_them)


def specimens() -> list[Specimen]:
    """Every kernel of its own, with both tiles of the lists."""
    signature = dict.fromkeys(("columns", "full_counts", "counts", "placed"), "*i32") | dict.fromkeys(_SIZES, "i32")
    place = Specimen(f"place: {_ROWS}x{_CHUNK}", place_kernel, signature, {"ROWS": _ROWS, "CHUNK": _CHUNK}, _WARPS)
    return [place, *(lists_specimen(width, ("placed",)) for width in (64, 256))]


def cost(heads: int, blocks: int, keys: int, listed: int) -> Cost:
    """Of `heads` heads, all batches', with `listed` blocks in all; the map that is placed is written and read."""
    whole = 4 * heads * blocks * keys
    place = Cost(4 * (listed + 2 * heads * blocks), whole + 4 * listed, 0)
    lists = Cost(whole, 2 * whole + 8 * heads * keys, 0)
    return place + lists + order_cost(heads, keys)
