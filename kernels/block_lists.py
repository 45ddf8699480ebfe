"""Lists of a map's blocks in Triton: a row's columns, sorted by what they are, in one launch.

A row's full blocks come first, then its partial ones, then those left out, each ascending. Where a block goes follows
from how many of each kind are before it and in all: two passes over a row, which the cache holds, and no sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen

__all__ = ["block_lists", "cost", "launch", "lists_specimen", "specimens", "tiles"]

_WARPS = 4
SIZES = ("rows", "width")
"""Numbers that change with a batch's lengths: no kernel is compiled again because one of them is 1 or divides by 16."""


@triton.jit
def _kinds(full, partial, placed, at, there):
    """What the blocks `at` are, int32: -1 left out, 0 full, above 0 partial."""
    if placed is not None:
        kind = tl.load(placed + at, mask=there, other=-1)
    else:
        kind = (tl.load(full + at, mask=there, other=0) != 0).to(tl.int32) - 1
        if partial is not None:
            some = tl.load(partial + at, mask=there, other=0) != 0
            kind = tl.where(some & (kind < 0), 1, kind)
    return kind


@triton.jit
def _counted(kind):
    """1 for a full block and 2^16 for a partial one: both are counted in one sum, of fewer than 2^16 blocks."""
    return tl.where(kind == 0, 1, tl.where(kind > 0, 65536, 0))


@triton.jit(do_not_specialize=SIZES)
def lists_kernel(
    full, partial, placed, columns, full_counts, counts, places, rows, width, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """`ROWS` rows of `width` blocks a program; of two maps, or of `placed` and then with the `places` of its partial
    ones."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    start = (row * width)[:, None]
    place = tl.arange(0, CHUNK)[None, :]
    fulls = tl.zeros([ROWS], tl.int32)
    partials = tl.zeros([ROWS], tl.int32)
    for first in range(0, width, CHUNK):
        there = inside[:, None] & (place < width - first)
        both = tl.sum(_counted(_kinds(full, partial, placed, start + first + place, there)), 1)
        fulls += both & 65535
        partials += both >> 16
    tl.store(full_counts + row, fulls, mask=inside)
    tl.store(counts + row, fulls + partials, mask=inside)
    # Where the next one of each kind goes.
    full_end = tl.zeros([ROWS], tl.int32)
    partial_end = fulls
    rest_end = fulls + partials
    for first in range(0, width, CHUNK):
        there = inside[:, None] & (place < width - first)
        kind = _kinds(full, partial, placed, start + first + place, there)
        counted = _counted(kind)
        upto = tl.cumsum(counted, 1)
        upto_full, upto_partial = upto & 65535, upto >> 16
        goes = rest_end[:, None] + place - upto_full - upto_partial
        goes = tl.where(kind == 0, full_end[:, None] + upto_full - 1, goes)
        goes = tl.where(kind > 0, partial_end[:, None] + upto_partial - 1, goes)
        tl.store(columns + start + goes, first + place + tl.zeros_like(goes), mask=there)
        if places is not None:
            tl.store(places + start + goes, tl.maximum(kind - 1, 0), mask=there)
        both = tl.sum(counted, 1)
        full_end += both & 65535
        partial_end += both >> 16
        rest_end += CHUNK - (both & 65535) - (both >> 16)


def tiles(width: int) -> tuple[int, int]:
    """`(rows, columns taken at a time)` of a program."""
    return (4, 64) if width <= 64 else (1, 256)


def block_lists(full: Tensor, partial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`(columns, full_counts, counts)`, as the op's reference."""
    return launch(full.contiguous(), None if partial is None else partial.contiguous())


def launch(
    blocks: Tensor, partial: Tensor | None = None, places: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(columns, full_counts, counts)` of contiguous maps; with `places`, which are filled, `blocks` is int32: 0 for
    full ones, i + 1 for the partial one i, else -1."""
    rows, width = blocks.shape[:3].numel(), blocks.shape[3]
    columns = torch.empty(blocks.shape, dtype=torch.int32, device=blocks.device)
    full_counts, counts = (torch.empty(blocks.shape[:3], dtype=torch.int32, device=blocks.device) for _ in range(2))
    if rows > 0:
        each, chunk = tiles(width)
        full, placed = (blocks, None) if places is None else (None, blocks)
        lists_kernel[(triton.cdiv(rows, each),)](
            full, partial, placed, columns, full_counts, counts, places, rows, width,
            ROWS=each, CHUNK=chunk, num_warps=_WARPS,
        )  # fmt: skip
    return columns, full_counts, counts


def specimens() -> list[Specimen]:
    """Both tiles, of one map and of two."""
    return [lists_specimen(width, kinds) for width in (64, 256) for kinds in (("full",), ("full", "partial"))]


def lists_specimen(width: int, given: tuple[str, ...]) -> Specimen:
    """The kernel for rows of `width` blocks of the maps `given`, "full" and "partial", or of "placed"."""
    rows, chunk = tiles(width)
    kinds = {"full": "*i1", "partial": "*i1", "placed": "*i32", "places": "*i32"}
    given = (*given, "places") if "placed" in given else given
    signature = {name: kinds[name] for name in given}
    signature |= {**dict.fromkeys(("columns", "full_counts", "counts"), "*i32"), **dict.fromkeys(SIZES, "i32")}
    absent = dict.fromkeys(set(kinds) - set(given))
    label = f"lists of {', '.join(given)}: {rows}x{chunk}"
    return Specimen(label, lists_kernel, signature, {**absent, "ROWS": rows, "CHUNK": chunk}, _WARPS)


def cost(rows: int, width: int, maps: int = 1) -> Cost:
    """Of `rows` rows of blocks, all batches' and heads', with one map or two; the second pass finds them cached."""
    return Cost(maps * rows * width, 4 * rows * (width + 2), 0)
