"""Triton: the gradient of the stored blocks alone, dY^T X where they lie.

A program holds some rows of a block row times several of its blocks, laid end to end as the forward lays them, and runs
over the tokens; where blocks are too few to fill the device the tokens are split, and the parts, in float32, are added
in order by a second launch: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._block_rows import capability, power_above
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, dot, multiprocessors, triton_type

__all__ = ["GradTiles", "block_sparse_sddmm", "cost", "specimens", "staged", "tiles"]

_ADDED = 1024


@dataclass(frozen=True)
class GradTiles:
    """How the product is cut up."""

    rows: int
    """Rows of a block row a program holds, at least 16."""
    width: int
    """Stored columns a program holds."""
    depth: int
    """Tokens a step takes."""
    splits: int
    """Parts that the tokens are cut into, each a multiple of `depth`."""
    warps: int
    stages: int

    def share(self, m: int) -> int:
        """Tokens of one part."""
        return -(-m // (self.splits * self.depth)) * self.depth


def tiles(
    block: tuple[int, int], shape: tuple[int, int], blocks: int, m: int, dtype: torch.dtype, arch: int, programs: int
) -> GradTiles:
    """The tiles for a weight [N, K] with `blocks` stored blocks of R x C, m tokens, on sm_`arch`.

    `programs` is how many run side by side; tokens are split until there are about two for each, but no part is shorter
    than 512 tokens.
    """
    wide = dtype == torch.float32
    rows = min(max(power_above(block[0]), 16), 64 if wide else 128)
    block_rows = shape[0] // block[0]
    length = -(-blocks * block[1] // block_rows)
    width = 64 if wide or length <= 64 else 256 if length >= 512 and rows <= 64 else 128
    width = min(width, max(power_above(shape[1]), 16))
    parts = block_rows * -(-block[0] // rows) * -(-length // width)
    splits = max(1, min(-(-2 * programs // parts), m // 512))
    cells = rows * width
    warps = 8 if cells > (64 * 128 if arch >= 90 and not wide else 32 * 64) else 4
    # mma.sync wants its operands in registers too.
    depth = 32 if wide or (arch < 90 and cells > 64 * 128) else 64
    return GradTiles(rows, width, depth, splits, warps, 3)


@triton.jit
def _product(
    grad, x, columns, row_starts, out, m, n, k, share, size,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (R + ROWS - 1) // ROWS
    row = tl.program_id(0) // PARTS
    r = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(row_starts + row)
    length = (tl.load(row_starts + row + 1) - begin) * C
    start = begin.to(tl.int64)
    first = tl.program_id(1) * WIDTH
    if first < length:
        flat = first + tl.arange(0, WIDTH)
        # What lies beyond the edges repeats the last row or column and is not stored.
        if C % WIDTH == 0:
            place = tl.load(columns + start + first // C) * C + first % C + tl.arange(0, WIDTH)
            # What the compiler cannot see behind a load and a remainder: the columns are neighbours.
            place = tl.max_contiguous(tl.multiple_of(place, WIDTH), WIDTH)
        elif WIDTH % C == 0:
            place = tl.load(columns + start + tl.minimum(flat // C, length // C - 1)) * C + flat % C
            place = tl.max_contiguous(tl.multiple_of(place, C), C)
        else:
            read = tl.minimum(flat, length - 1)
            place = tl.load(columns + start + read // C) * C + read % C
        r_read = tl.minimum(r, R - 1) if R % ROWS != 0 else r
        token = tl.program_id(2).to(tl.int64) * share + tl.arange(0, DEPTH)
        grad_at = grad + token[:, None] * n + (row.to(tl.int64) * R + r_read)[None, :]
        x_at = x + token[:, None] * k + place[None, :]
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for done in range(0, share, DEPTH):
            inside = (token + done < m)[:, None]
            g = tl.load(grad_at, inside, other=0)
            v = tl.load(x_at, inside, other=0)
            acc = dot(tl.trans(g), v, acc)
            grad_at += DEPTH * n
            x_at += DEPTH * k
        stored = start * (R * C) + (flat // C).to(tl.int64) * (R * C) + flat % C
        at = out + tl.program_id(2).to(tl.int64) * size + stored[None, :] + (r * C)[:, None]
        tl.store(at, acc.to(out.dtype.element_ty), (r < R)[:, None] & (flat < length)[None, :])


@triton.jit
def _add(parts, out, size, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < size
    total = tl.zeros((WIDTH,), tl.float32)
    for _ in range(0, SPLITS):
        total += tl.load(parts + at, inside, other=0)
        parts += size
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def block_sparse_sddmm(grad: Tensor, x: Tensor, columns: Tensor, row_starts: Tensor, block: Sequence[int]) -> Tensor:
    """See `sparsebert.ops.block_sparse_sddmm`."""
    (r, c), blocks = block, columns.numel()
    out = x.new_empty((blocks, r, c))
    m, n = grad.shape
    k, size = x.shape[1], out.numel()
    if not m:
        return out.zero_()
    if not size:
        return out
    tile = tiles((r, c), (n, k), blocks, m, x.dtype, capability(x.device), multiprocessors(x.device))
    parts = out if tile.splits == 1 else x.new_empty((tile.splits, size), dtype=torch.float32)
    _product[(n // r * -(-r // tile.rows), -(-k // tile.width), tile.splits)](
        grad,
        x,
        columns,
        row_starts,
        parts,
        m,
        n,
        k,
        tile.share(m),
        size,
        **_constants((r, c), tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.splits > 1:
        _add[(-(-size // _ADDED),)](parts, out, size, SPLITS=tile.splits, WIDTH=_ADDED)
    return out


def _constants(block: tuple[int, int], tile: GradTiles) -> dict[str, Any]:
    return {"R": block[0], "C": block[1], "ROWS": tile.rows, "WIDTH": tile.width, "DEPTH": tile.depth}


def cost(m: int, n: int, k: int, block: tuple[int, int], blocks: int, item: int = 2, programs: int = 132) -> Cost:
    """What a call moves and computes: dY and x read once, the blocks written, and the parts of a split both ways.

    FLOPs are those of the stored blocks, rows padded; the last tile of a block row computes more, by chance.
    """
    dtype = torch.float32 if item == 4 else torch.bfloat16
    tile = tiles(block, (n, k), blocks, m, dtype, 90, programs)
    size = blocks * block[0] * block[1]
    parts = 4 * size * tile.splits if tile.splits > 1 else 0
    computed = blocks * -(-block[0] // tile.rows) * tile.rows * block[1]
    tokens = tile.share(m) * tile.splits
    return Cost(
        read=m * (n + k) * item + 4 * (blocks + n // block[0] + 1) + parts,
        written=size * item + parts,
        flops=2 * tokens * computed + (size * tile.splits if parts else 0),
        launches=2 if parts else 1,
    )


def staged(m: int, n: int, k: int, block: tuple[int, int], blocks: int, item: int = 2, programs: int = 132) -> int:
    """Bytes that the programs load into shared memory, block rows of the same length taken."""
    dtype = torch.float32 if item == 4 else torch.bfloat16
    tile = tiles(block, (n, k), blocks, m, dtype, 90, programs)
    block_rows = n // block[0]
    count = block_rows * -(-block[0] // tile.rows) * -(-(blocks * block[1]) // (block_rows * tile.width))
    return count * m * (tile.rows + tile.width) * item


def specimens() -> list[Specimen]:
    """Block sizes, densities and numbers of tokens that take each tile."""
    found: dict[str, Specimen] = {}
    for arch in (80, 90):
        for dtype, block, lengths in _COMPILED:
            for m, length in ((300, 32), *((4096, length) for length in lengths)):
                blocks = 3072 // block[0] * max(length // block[1], 1)
                tile = tiles(block, (3072, 3072), blocks, m, dtype, arch, 132)
                one = _specimen(dtype, block, tile, arch)
                key = one.label.replace(f" {tile.splits} splits,", f" {tile.splits > 1}")
                # What both architectures take is compiled for all.
                found[key] = replace(found[key], most=one.most) if key in found else one
    parts = {"parts": "*fp32", "out": "*bf16", "size": "i32"}
    return [*found.values(), Specimen("parts added", _add, parts, {"SPLITS": 4, "WIDTH": _ADDED})]


# Block sizes, with the lengths of block rows that lead to other tiles.
_COMPILED = (
    (torch.bfloat16, (64, 64), (256, 1024)),
    (torch.bfloat16, (32, 32), (1024,)),
    (torch.bfloat16, (128, 128), (256,)),
    (torch.bfloat16, (8, 2), ()),
    (torch.float32, (64, 64), (256,)),
)


def _specimen(dtype: torch.dtype, block: tuple[int, int], tile: GradTiles, least: int) -> Specimen:
    pointer = "*" + triton_type(dtype)
    signature = {"grad": pointer, "x": pointer, "columns": "*i32", "row_starts": "*i32"}
    signature |= {"out": pointer if tile.splits == 1 else "*fp32"}
    signature |= dict.fromkeys(("m", "n", "k", "share", "size"), "i32")
    return Specimen(
        f"{triton_type(dtype)} {block[0]}x{block[1]}, {tile.rows} x {tile.width} x {tile.depth}, {tile.splits} splits, "
        f"{tile.warps} warps, {tile.stages} stages",
        _product,
        signature,
        _constants(block, tile),
        tile.warps,
        tile.stages,
        least,
        ("n", "k", "share", "size"),
        80 if least == 80 else 100,
    )
