"""The gradients of a masked layer: dX by cuBLAS, and dY^T X with the split by mask and weight in its epilogue (Triton).

P = dY^T X, as large as the weight, is then neither written nor read again. The grid's blocks must lie within a tile;
else, and where there are so many tokens that cuBLAS's faster product gains more than a pass over P costs, P is stored
and split_weight_grad.py reads it.

A BERT's weight is 36 to 256 tiles, which seldom fill the multiprocessors: as many whole tiles as fill them evenly are
done at once, and of the few that are left the tokens are split; a second launch adds the parts in order, so that the
bits are the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels import split_weight_grad as split
from sparsebert.kernels._block_rows import power_above
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, dot, multiprocessors, triton_type

__all__ = ["GradTiles", "cost", "fuses", "masked_linear_backward", "specimens", "tiles"]

# For `fuses`, by paper and an H100: the share by which this product is taken to be slower than cuBLAS's, and what a
# launch costs in seconds.
SLOWER = 0.15
LAUNCH = 3e-6
# Rows and columns of a tile, and tokens that a part of one is worth.
SIDE = 128
LEAST = 512

split_tile = split.split_tile


@dataclass(frozen=True)
class GradTiles:
    """How the product is cut up."""

    rows: int
    columns: int
    depth: int
    """Tokens a step takes."""
    whole: int
    """Tiles that a program does whole."""
    rest: int
    """Tiles whose tokens are split."""
    splits: int
    warps: int = 8
    stages: int = 3

    def share(self, m: int) -> int:
        """Tokens of one part."""
        return -(-m // (self.splits * self.depth)) * self.depth

    def added(self, block_rows: int) -> tuple[int, int]:
        """Rows that a program of the second launch adds, and its warps."""
        rows = max(block_rows, 16)
        return rows, 8 if rows * self.columns > 2048 else 4


def tiles(m: int, n: int, k: int, programs: int) -> GradTiles:
    """The tiles for a weight `[n, k]` and m tokens, with `programs` side by side."""
    rows, columns = (min(max(power_above(size), 16), SIDE) for size in (n, k))
    count = -(-n // rows) * -(-k // columns)
    rest = count % programs
    splits = max(1, min(programs // rest, m // LEAST)) if rest else 1
    if splits == 1:
        rest = 0
    return GradTiles(rows, columns, 64, count - rest, rest, splits)


def fuses(m: int, n: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether P stays in registers: by paper faster than cuBLAS's product and a pass over P."""
    if dtype == torch.float32 or not split.divides(block):
        return False
    return SLOWER * 2 * m * n * k / 800e12 <= 4 * n * k / 3e12 + LAUNCH


@triton.jit
def _product(
    grad, x, weight, bits, score_grad, weight_grad, parts, m, n, k, cells, across, whole, share,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, SCORES: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program
    first = 0
    last = m
    if SPLITS > 1:
        rest = tl.maximum(program - whole, 0)
        tile = tl.minimum(program, whole) + rest // SPLITS
        # A whole tile's share is all tokens, and its part the first.
        mine = tl.where(program < whole, m, share)
        first = (rest % SPLITS) * mine
        last = tl.minimum(first + mine, m)
    row = (tile // across).to(tl.int64) * ROWS
    column = (tile % across) * COLUMNS
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    token = tl.arange(0, DEPTH)
    grad_at = grad + (first + token).to(tl.int64)[:, None] * n + i[None, :]
    x_at = x + (first + token).to(tl.int64)[:, None] * k + j[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(first, last, DEPTH):
        inside = (done + token < last)[:, None]
        if EVEN:
            g = tl.load(grad_at, inside, other=0)
            v = tl.load(x_at, inside, other=0)
        else:
            g = tl.load(grad_at, inside & (i < n)[None, :], other=0)
            v = tl.load(x_at, inside & (j < k)[None, :], other=0)
        acc = dot(tl.trans(g), v, acc)
        grad_at += DEPTH * n
        x_at += DEPTH * k
    if SPLITS > 1:
        if program >= whole:
            inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            tl.store(parts + (program - whole).to(tl.int64) * (ROWS * COLUMNS) + inner, acc)
        else:
            split_tile(
                acc, row, column, weight, bits, score_grad, weight_grad, n, k, cells, R, C, ROWS, COLUMNS, SCORES,
                WEIGHT,
            )  # fmt: skip
    else:
        split_tile(
            acc, row, column, weight, bits, score_grad, weight_grad, n, k, cells, R, C, ROWS, COLUMNS, SCORES, WEIGHT
        )  # fmt: skip


@triton.jit
def _add(
    parts, weight, bits, score_grad, weight_grad, n, k, cells, across, whole,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    ADDED: tl.constexpr, SCORES: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    rest = tl.program_id(0) // (ROWS // ADDED)
    offset = (tl.program_id(0) % (ROWS // ADDED)) * ADDED
    tile = whole + rest
    row = (tile // across).to(tl.int64) * ROWS + offset
    column = (tile % across) * COLUMNS
    inner = (offset + tl.arange(0, ADDED))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = parts + rest.to(tl.int64) * (SPLITS * ROWS * COLUMNS) + inner
    acc = tl.load(at)
    for _ in range(1, SPLITS):
        at += ROWS * COLUMNS
        acc += tl.load(at)
    split_tile(
        acc, row, column, weight, bits, score_grad, weight_grad, n, k, cells, R, C, ADDED, COLUMNS, SCORES, WEIGHT
    )  # fmt: skip


def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    bits: Tensor | None,
    grid: Sequence[int],
    need_x: bool,
    need_scores: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sparsebert.ops.masked_linear`."""
    if need_weight and bits is None:
        raise ValueError("bits: needed for the weight's gradient")
    n, k = weight.shape
    rows = grad.reshape(-1, n)
    grad_x = (rows @ masked_weight).reshape(x.shape) if need_x else x.new_empty(0)
    if not (need_scores or need_weight):
        return grad_x, *split.outputs(weight, grid, False, False)
    columns = x.reshape(-1, k)
    block = (n // grid[0], k // grid[1])
    if not fuses(len(rows), n, k, block, x.dtype):
        return grad_x, *split.split_weight_grad(rows.t() @ columns, weight, bits, grid, need_scores, need_weight)
    return grad_x, *_fused(rows.contiguous(), columns.contiguous(), weight, bits, grid, need_scores, need_weight)


def _fused(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bits: Tensor | None,
    grid: Sequence[int],
    need_scores: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    (m, n), k = grad.shape, x.shape[1]
    block = (n // grid[0], k // grid[1])
    tile = tiles(m, n, k, multiprocessors(x.device))
    score_grad, weight_grad = split.outputs(weight, grid, need_scores, need_weight)
    parts = score_grad
    if tile.rest:
        parts = x.new_empty((tile.rest * tile.splits, tile.rows, tile.columns), dtype=torch.float32)
    across = -(-k // tile.columns)
    tensors = (weight, weight if bits is None else bits, score_grad, weight_grad)
    constants = _constants(block, tile, need_scores, need_weight)
    _product[(tile.whole + tile.rest * tile.splits,)](
        grad,
        x,
        *tensors,
        parts,
        m,
        n,
        k,
        grid[1],
        across,
        tile.whole,
        tile.share(m),
        **constants,
        DEPTH=tile.depth,
        EVEN=n % tile.rows == 0 and k % tile.columns == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.rest:
        added, warps = tile.added(block[0])
        _add[(tile.rest * (tile.rows // added),)](
            parts, *tensors, n, k, grid[1], across, tile.whole, **constants, ADDED=added, num_warps=warps
        )
    return score_grad, weight_grad


def _constants(block: tuple[int, int], tile: GradTiles, scores: bool, weight: bool) -> dict[str, Any]:
    sizes = {"R": block[0], "C": block[1], "ROWS": tile.rows, "COLUMNS": tile.columns, "SPLITS": tile.splits}
    return {**sizes, "SCORES": scores, "WEIGHT": weight}


def cost(
    m: int,
    n: int,
    k: int,
    block: tuple[int, int] = (1, 1),
    item: int = 2,
    weight_item: int = 4,
    need_x: bool = True,
    scores: bool = True,
    weight: bool = False,
    programs: int = 132,
) -> Cost:
    """What a call moves and computes, `item` bytes an activation, `weight_item` one of the unmasked weight.

    dX reads dY and the masked weight. P is counted whole tiles; its parts are written and read, or P itself where it
    is stored.
    """
    total = Cost(0, 0, 0, 0)
    if need_x:
        total += Cost(read=(m * n + n * k) * item, written=m * k * item, flops=2 * m * n * k)
    if not (scores or weight):
        return total
    if not fuses(m, n, k, block, torch.float32 if item == 4 else torch.bfloat16):
        product = Cost(read=m * (n + k) * item, written=n * k * item, flops=2 * m * n * k)
        return total + product + split.cost(n, k, block, item, weight_item, scores, weight)
    tile = tiles(m, n, k, programs)
    size = tile.rows * tile.columns
    parts = 4 * tile.rest * tile.splits * size
    steps = -(-m // tile.depth) * tile.whole + tile.share(m) // tile.depth * tile.splits * tile.rest
    # Of what the split of a stored P moves all but P.
    epilogue = split.cost(n, k, block, 0, weight_item, scores, weight)
    product = Cost(m * (n + k) * item + parts, parts, 2 * steps * tile.depth * size, 2 if parts else 1)
    return total + product + Cost(epilogue.read, epilogue.written, epilogue.flops, 0)


def specimens() -> list[Specimen]:
    """Whole tiles alone and with split ones, bits of single weights and of blocks."""
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        for block in ((1, 1), (64, 64)) if dtype == torch.bfloat16 else ((1, 1),):
            for shape in ((4096, 3072, 768), (256, 768, 768)):
                found.append(_specimen(dtype, block, tiles(*shape, 132)))
    return [*found, *(_added((r, r), tiles(4096, 768, 768, 132)) for r in (1, 64))]


def _specimen(dtype: torch.dtype, block: tuple[int, int], tile: GradTiles) -> Specimen:
    pointer = "*" + triton_type(dtype)
    signature = {"grad": pointer, "x": pointer, **_SPLIT, "parts": "*fp32"}
    signature |= dict.fromkeys(("m", "n", "k", "cells", "across", "whole", "share"), "i32")
    return Specimen(
        f"{triton_type(dtype)} {block[0]}x{block[1]}, {tile.rows} x {tile.columns} x {tile.depth}, "
        f"{tile.splits} splits, {tile.warps} warps, {tile.stages} stages",
        _product,
        signature,
        {**_constants(block, tile, True, True), "DEPTH": tile.depth, "EVEN": True},
        tile.warps,
        tile.stages,
        divisible_by_16=("n", "k"),
    )


def _added(block: tuple[int, int], tile: GradTiles) -> Specimen:
    signature = {"parts": "*fp32", **_SPLIT, **dict.fromkeys(("n", "k", "cells", "across", "whole"), "i32")}
    added, warps = tile.added(block[0])
    constants = {**_constants(block, tile, True, True), "ADDED": added}
    return Specimen(f"{tile.splits} parts added, {block[0]}x{block[1]}", _add, signature, constants, warps)


_SPLIT = {"weight": "*fp32", "bits": "*u8", "score_grad": "*fp32", "weight_grad": "*fp32"}
