"""Triton: what the mask's scores and the weight under it want of a dense weight gradient P.

`split_tile` does it for a tile of P that is in registers: the epilogue of masked_linear_backward.py's product, and
here of one that was stored. Blocks that do not divide a tile (whole rows, 3 x 5) are a program each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._block_rows import power_above
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, triton_type

__all__ = ["LARGEST", "cost", "divides", "outputs", "specimens", "split_tile", "split_weight_grad"]

LARGEST = 64
"""Rows and columns of the largest block that lies in one tile."""
# Entries of a tile that are looked at together, for the sake of registers.
_MOST = tl.constexpr(4096)


@triton.jit
def _split_piece(
    p, row, column, weight, bits, score_grad, weight_grad, n, k, cells,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORES: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    i = row + tl.arange(0, ROWS).to(tl.int64)
    j = column + tl.arange(0, COLUMNS)
    inside = (i < n)[:, None] & (j < k)[None, :]
    at = i[:, None] * k + j[None, :]
    if SCORES:
        s = p * tl.load(weight + at, inside, other=0).to(tl.float32)
        if R * C == 1:
            tl.store(score_grad + at, s, inside)
        else:
            # The grid divides the matrix: a block lies inside it or not at all.
            s = tl.sum(tl.sum(tl.reshape(s, (ROWS // R, R, COLUMNS // C, C)), axis=3), axis=1)
            gi = row // R + tl.arange(0, ROWS // R).to(tl.int64)
            gj = column // C + tl.arange(0, COLUMNS // C)
            tl.store(score_grad + gi[:, None] * cells + gj[None, :], s, (gi * R < n)[:, None] & (gj < cells)[None, :])
    if WEIGHT:
        cell = (i // R)[:, None] * cells + (j // C)[None, :]
        byte = tl.load(bits + (cell >> 3), inside, other=0).to(tl.int32)
        kept = ((byte >> (cell & 7).to(tl.int32)) & 1) != 0
        # Selected, not multiplied: a NaN in a pruned place gives 0.
        tl.store(weight_grad + at, tl.where(kept, p, 0.0).to(weight_grad.dtype.element_ty), inside)


@triton.jit
def split_tile(
    p, row, column, weight, bits, score_grad, weight_grad, n, k, cells,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORES: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """Stores what is wanted of `p`, float32 `[ROWS, COLUMNS]` of P from (row, column) on; R x C divide the tile.

    `cells` is the grid's width K / C. Sums are taken in an order fixed by the tile.
    """
    if ROWS * COLUMNS > _MOST and COLUMNS > 32 and COLUMNS > C:
        # Halves of the columns, which every thread has of its own.
        HALF: tl.constexpr = COLUMNS // 2
        low, high = tl.split(tl.permute(tl.reshape(p, (ROWS, 2, HALF)), (0, 2, 1)))
        split_tile(
            low, row, column, weight, bits, score_grad, weight_grad, n, k, cells, R, C, ROWS, HALF, SCORES, WEIGHT
        )  # fmt: skip
        split_tile(
            high, row, column + HALF, weight, bits, score_grad, weight_grad, n, k, cells, R, C, ROWS, HALF, SCORES,
            WEIGHT,
        )  # fmt: skip
    else:
        _split_piece(
            p, row, column, weight, bits, score_grad, weight_grad, n, k, cells, R, C, ROWS, COLUMNS, SCORES, WEIGHT
        )  # fmt: skip


@triton.jit
def _tiles(
    product, weight, bits, score_grad, weight_grad, n, k, cells, across,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORES: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS
    column = (tl.program_id(0) % across) * COLUMNS
    i = row + tl.arange(0, ROWS).to(tl.int64)
    j = column + tl.arange(0, COLUMNS)
    p = tl.load(product + i[:, None] * k + j[None, :], (i < n)[:, None] & (j < k)[None, :], other=0).to(tl.float32)
    split_tile(
        p, row, column, weight, bits, score_grad, weight_grad, n, k, cells, R, C, ROWS, COLUMNS, SCORES, WEIGHT
    )  # fmt: skip


@triton.jit
def _cells(
    product, weight, bits, score_grad, weight_grad, k, cells, r, c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCORES: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64)
    first = cell // cells * r * k + cell % cells * c
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    kept = True
    if WEIGHT:
        kept = ((tl.load(bits + (cell >> 3)).to(tl.int32) >> (cell & 7).to(tl.int32)) & 1) != 0
    for row in range(0, r, ROWS):
        for column in range(0, c, COLUMNS):
            inside = (row + i < r)[:, None] & (column + j < c)[None, :]
            at = first + (row + i).to(tl.int64)[:, None] * k + (column + j)[None, :]
            p = tl.load(product + at, inside, other=0).to(tl.float32)
            if SCORES:
                total += p * tl.load(weight + at, inside, other=0).to(tl.float32)
            if WEIGHT:
                tl.store(weight_grad + at, tl.where(kept, p, 0.0).to(weight_grad.dtype.element_ty), inside)
    if SCORES:
        tl.store(score_grad + cell, tl.sum(total))


def split_weight_grad(
    product: Tensor, weight: Tensor, bits: Tensor | None, grid: Sequence[int], need_scores: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """See `sparsebert.ops.split_weight_grad`."""
    if need_weight and bits is None:
        raise ValueError("bits: needed for the weight's gradient")
    score_grad, weight_grad = outputs(weight, grid, need_scores, need_weight)
    if not weight.numel() or not (need_scores or need_weight):
        return score_grad, weight_grad
    n, k = weight.shape
    block = (n // grid[0], k // grid[1])
    tensors = (product, weight, weight if bits is None else bits, score_grad, weight_grad)
    wanted = {"SCORES": need_scores, "WEIGHT": need_weight}
    if divides(block):
        tile = _tile(block)
        across = -(-k // tile["COLUMNS"])
        _tiles[(-(-n // tile["ROWS"]) * across,)](
            *tensors, n, k, grid[1], across, R=block[0], C=block[1], **tile, **wanted, num_warps=_warps(tile)
        )
    else:
        tile = _part(block)
        _cells[(grid[0] * grid[1],)](*tensors, k, grid[1], *block, **tile, **wanted, num_warps=_warps(tile))
    return score_grad, weight_grad


def outputs(weight: Tensor, grid: Sequence[int], need_scores: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """The two results, not written yet; `[0]` for one not needed."""
    scores = tuple(grid) if need_scores else (0,)
    return (
        weight.new_empty(scores, dtype=torch.float32),
        weight.new_empty(tuple(weight.shape) if need_weight else (0,)),
    )


def divides(block: tuple[int, int]) -> bool:
    """Whether blocks of this size divide every tile that is as large as they are."""
    return all(size <= LARGEST and size == power_above(size) for size in block)


def _tile(block: tuple[int, int]) -> dict[str, int]:
    return {"ROWS": max(block[0], 8), "COLUMNS": max(block[1], 128)}


def _part(block: tuple[int, int]) -> dict[str, int]:
    columns = min(power_above(block[1]), 512)
    return {"ROWS": min(power_above(block[0]), max(4096 // columns, 1)), "COLUMNS": columns}


def _warps(tile: dict[str, int]) -> int:
    return 8 if tile["ROWS"] * tile["COLUMNS"] > 4096 else 4


def cost(
    n: int,
    k: int,
    block: tuple[int, int],
    item: int = 4,
    weight_item: int = 4,
    scores: bool = True,
    weight: bool = True,
) -> Cost:
    """What a call moves and computes: P and the weight read once, both results written; `item` is P's."""
    size, cells = n * k, n * k // (block[0] * block[1])
    return Cost(
        read=size * item + (size * weight_item if scores else 0) + (-(-cells // 8) if weight else 0),
        written=(4 * cells if scores else 0) + (size * weight_item if weight else 0),
        flops=2 * size if scores else 0,
    )


def specimens() -> list[Specimen]:
    """Every kernel for bits of single weights and of blocks, all results wanted."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for block in ((1, 1), (4, 32), (64, 64)):
            tile, wanted = _tile(block), {"SCORES": True, "WEIGHT": True}
            signature = _signature(dtype) | dict.fromkeys(("n", "k", "cells", "across"), "i32")
            constants = {"R": block[0], "C": block[1], **tile, **wanted}
            label = f"{triton_type(dtype)} {block[0]}x{block[1]}, {tile['ROWS']} x {tile['COLUMNS']}"
            found.append(Specimen(label, _tiles, signature, constants, _warps(tile), divisible_by_16=("n", "k")))
        part = _part((1, 768))
        signature = _signature(dtype) | dict.fromkeys(("k", "cells", "r", "c"), "i32")
        constants = {**part, "SCORES": True, "WEIGHT": True}
        found.append(Specimen(f"{triton_type(dtype)} a block a program", _cells, signature, constants, _warps(part)))
    return found


def _signature(dtype: torch.dtype) -> dict[str, Any]:
    pointers = {"product": "*" + triton_type(dtype), "weight": "*fp32", "bits": "*u8"}
    return pointers | {"score_grad": "*fp32", "weight_grad": "*fp32"}
