"""What the bitmap ops move, from their own tiles and plan (csrc/bitmap.h)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsebert.kernels._cost import Cost

__all__ = ["FEW_ROWS", "Plan", "bitmap_decode", "bitmap_gather", "bitmap_linear", "plan", "stored_bytes"]

TILE_ROWS, TILE_COLS, WARPS = 16, 64, 8
FEW_ROWS = 256
"""Rows of x up to which blocks decode what they multiply; with more the weight is decoded once and cuBLAS multiplies.

Each block of 64 rows decodes the weight anew, at some 8 instructions for 32 weights: for 3072x768 some 0.7 us of an
H100 to 64 rows. Decoding it all costs about 2.5 us (a launch, 1.3 MB in and 4.7 MB out), and then cuBLAS takes as long
as for a dense weight in cache: at 256 rows the two are about even.
"""
# An H100's, as an H200's.
PROCESSORS = 132


@dataclass(frozen=True)
class Plan:
    """How a product with few rows is spread over blocks, as `bitmap_plan` says."""

    row_tiles: int
    col_tiles: int
    per_block: int
    groups: int
    token_tiles: int
    splits: int

    @property
    def blocks(self) -> int:
        return -(-self.row_tiles // self.per_block) * self.token_tiles * self.splits


def plan(n: int, k: int, rows: int, processors: int = PROCESSORS) -> Plan:
    """The plan for a weight `[n, k]` and x `[rows, k]`."""
    row_tiles, col_tiles = -(-n // TILE_ROWS), -(-k // TILE_COLS)
    groups = next((count for count in (1, 2, 4) if rows <= 8 * count), 8)
    token_tiles = -(-rows // (8 * groups))
    per_block = 4 if row_tiles >= 4 * processors else 2 if row_tiles >= 2 * processors else 1
    blocks = -(-row_tiles // per_block) * token_tiles
    splits = max(min(processors // blocks, col_tiles // 16), 1)
    return Plan(row_tiles, col_tiles, per_block, groups, token_tiles, splits)


def stored_bytes(n: int, k: int, nnz: int) -> int:
    """Bytes of a bitmap: 2 to a value, a bit to a place, 8 to a tile."""
    tiles = -(-n // TILE_ROWS) * -(-k // TILE_COLS)
    return 2 * nnz + tiles * TILE_ROWS * TILE_COLS // 8 + 8 * (tiles + 1)


def bitmap_linear(n: int, k: int, nnz: int, rows: int, *, bias: bool = True) -> Cost:
    """One `bitmap_linear`.

    With few rows the weight comes from device memory once: what the blocks of other rows of x read of it again, and x,
    which every row of tiles reads, are the second-level cache's. Products count for all weights, kept or not, and for
    whole groups of rows: that is what the tensor cores do.
    """
    x, y, shift = 2 * rows * k, 2 * rows * n, 2 * n if bias else 0
    if rows > FEW_ROWS:
        return bitmap_decode(n, k, nnz) + Cost(x + 2 * n * k + shift, y, 2 * rows * n * k)
    own = plan(n, k, rows)
    flops = 2 * 8 * own.groups * own.token_tiles * own.row_tiles * TILE_ROWS * own.col_tiles * TILE_COLS
    first = Cost(stored_bytes(n, k, nnz) + x, y, flops)
    if own.splits == 1:
        return Cost(first.read + shift, y, flops)
    partial = 4 * own.splits * rows * n
    return Cost(first.read, partial, flops) + Cost(partial + shift, y, 0)


def bitmap_decode(n: int, k: int, nnz: int) -> Cost:
    """One `bitmap_decode`."""
    return Cost(stored_bytes(n, k, nnz), 2 * n * k, 0)


def bitmap_gather(n: int, k: int, nnz: int) -> Cost:
    """One `bitmap_gather`."""
    return Cost(stored_bytes(n, k, nnz) - 2 * nnz + 2 * n * k, 2 * nnz, 0)
