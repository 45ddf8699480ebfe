"""Masks as bits: eight kept/pruned decisions to a byte, and how a score grid covers a weight.

Every sparsity pattern is a *grid* on a matrix: a weight `[N, K]` has a score tensor `[GN, GK]` with `GN | N` and
`GK | K`, and entry (i, j) decides the block of `N/GN x K/GK` weights at (i, j). Bits are uint8
`[ceil(GN * GK / 8)]`, row-major over the score tensor, least significant bit first; 1 is kept, padding bits are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["block_sum", "bytes_for", "check_bits", "check_grid", "expand_grid", "pack_bits", "unpack_bits"]


def bytes_for(entries: int) -> int:
    """Bytes that hold `entries` mask bits."""
    return (entries + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bits.

    Args:
        mask: bool, any shape; True is kept.

    Returns:
        uint8 `[ceil(mask.numel() / 8)]`, row-major, least significant bit first, padding bits 0.

    Raises:
        TypeError: `mask` is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}; compare the scores first")
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    # A sum of shifts rather than |: at most 255, so uint8 holds it exactly.
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of `shape` that `pack_bits` made `bits` from.

    Raises:
        ValueError: `bits` is not uint8 `[ceil(prod(shape) / 8)]`.
    """
    entries = math.prod(shape)
    check_bits(bits, entries)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).bool().view(-1)[:entries].view(tuple(shape))


def check_bits(bits: Tensor, entries: int) -> None:
    """Raise ValueError unless `bits` can hold exactly `entries` mask bits."""
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.shape[0] != bytes_for(entries):
        raise ValueError(
            f"bits: expected uint8 [{bytes_for(entries)}] for {entries} entries, got {bits.dtype} {list(bits.shape)}"
        )


def check_grid(shape: Sequence[int], grid: Sequence[int], name: str = "grid") -> tuple[int, int]:
    """Block height and width of `grid` on a matrix of `shape`; ValueError where it does not divide the matrix."""
    if len(shape) != 2 or len(grid) != 2:
        raise ValueError(f"{name}: expected two sizes on a matrix [N, K], got {list(grid)} on {list(shape)}")
    for size, cells in zip(shape, grid, strict=True):
        if (cells < 1 or size % cells) and not (cells == 0 and size == 0):
            raise ValueError(f"{name}: {list(grid)} does not divide the matrix {list(shape)} into equal blocks")
    return shape[0] // max(grid[0], 1), shape[1] // max(grid[1], 1)


def expand_grid(values: Tensor, shape: Sequence[int]) -> Tensor:
    """`[GN, GK]` values repeated over their blocks: a tensor of `shape` `[N, K]`."""
    height, width = check_grid(shape, values.shape)
    return values.repeat_interleave(height, dim=0).repeat_interleave(width, dim=1)


def block_sum(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Sum a matrix `[N, K]` over the blocks of `grid`: `[GN, GK]` in the matrix's dtype."""
    height, width = check_grid(values.shape, grid)
    if height == 1 and width == 1:
        return values
    return values.reshape(grid[0], height, grid[1], width).sum(dim=(1, 3))
