"""Triton: a linear layer over stored blocks; a program holds a slice of a block row for a tile of tokens.

Every block size runs on the one kernel: a block row is padded to the next 16, 32, 64 or 128 rows (taller ones are cut),
small blocks are gathered until a product is 32 or 64 deep. So 48 x 16 computes a quarter for nothing and 8 x 2 a half,
right all the same; made for are 64 x 64 and 128 x 128. On Hopper, blocks of 64 x 64 and at most 768 columns go by
_block_panel.py where there are tokens enough; and with many tokens `block_cluster_linear` (CUDA C++) is measured beside
that once for a shape, and taken where it is faster.

Programs of one tile of tokens follow one another, longest block row first: its rows of x are then read from memory
once, and what is left at the end of the launch is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._block_panel import MOST_COLUMNS, MOST_ROWS, PANEL, groups, panel_product
from sparsebert.kernels._block_rows import (
    Tiles,
    capability,
    linear_tile,
    longest_first,
    power_above,
    sorted_rows,
    tiles,
)
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._fastest import Question, fastest, is_compiled
from sparsebert.kernels._triton import Specimen, multiprocessors, triton_type
from sparsebert.ops._backend import forced_backend
from sparsebert.ops.block_cluster_linear import MOST_K, SIZES

__all__ = [
    "block_sparse_linear",
    "by_panels",
    "clusters_there",
    "cost",
    "may_cluster",
    "product",
    "specimens",
    "staged",
    "uses_panel",
]

LEAST_TOKENS = 1024
"""Below so many there are too few tiles for clusters on every multiprocessor."""


@triton.jit
def _forward(
    x, values, permutation, columns, row_starts, bias, y, m, n, k, block_rows,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, TOKENS: tl.constexpr,
    SWAPPED: tl.constexpr, TURNED: tl.constexpr, SORTED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (R + ROWS - 1) // ROWS
    program = tl.program_id(0)
    panel = program // (block_rows * PARTS)
    rest = program % (block_rows * PARTS)
    row = longest_first(row_starts, rest // PARTS, block_rows, SORTED)
    linear_tile(
        x, values, permutation, columns, row_starts, bias, y, row, rest % PARTS, panel.to(tl.int64) * TOKENS, m, n, k,
        R, C, ROWS, DEPTH, TOKENS, SWAPPED, TURNED, ACTIVATION, BIAS,
    )  # fmt: skip


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
    transposed: Sequence[Tensor],
) -> Tensor:
    """See `sparsebert.ops.block_sparse_linear`."""
    n, k = shape
    block, m = (values.shape[1], values.shape[2]), x.numel() // k

    def by_triton() -> Tensor:
        return product(x, values, None, columns, row_starts, bias, shape, block, activation)

    if not may_cluster(block, k, m, x.dtype) or not clusters_there(x.device):
        return by_triton()
    # The numbers of rows and of blocks count by their power of two.
    many = (n, k, block, len(values).bit_length(), x.dtype, bias is not None, activation, m.bit_length())
    op = torch.ops.sparsebert.block_cluster_linear
    ways = {"Triton": by_triton, "clusters": lambda: op(x, values, columns, row_starts, bias, [n, k], activation)}
    return fastest(Question("block_sparse_linear", many, x.device), ways)


def may_cluster(block: tuple[int, int], k: int, m: int, dtype: torch.dtype) -> bool:
    """Whether `block_cluster_linear` takes such a call and there are tokens enough for its clusters."""
    square = block[0] == block[1] and block[0] in SIZES
    return square and k <= MOST_K and dtype != torch.float32 and m >= LEAST_TOKENS


def clusters_there(device: torch.device) -> bool:
    """Whether it runs here; where Triton was forced, it does not."""
    if device.type != "cuda" or forced_backend() is not None:
        return False
    return capability(device) == 90 and is_compiled("block_cluster_linear")


def product(
    x: Tensor,
    values: Tensor,
    permutation: Tensor | None,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    block: tuple[int, int],
    activation: str,
) -> Tensor:
    """`activation(x W^T + bias)`; with `permutation` block b of W is `values[permutation[b]]` transposed."""
    n, k = shape
    y = x.new_empty((*x.shape[:-1], n))
    m = y.numel() // n
    if not m:
        return y
    block_rows = n // block[0]
    arch = capability(x.device)
    if uses_panel(block, block_rows, k, columns.numel(), m, x.dtype, arch):
        return by_panels(x, values, permutation, columns, row_starts, bias, y, activation)
    tile = tiles(block, block_rows, columns.numel(), m, x.dtype, arch)
    parts = -(-block[0] // tile.rows)
    _forward[(block_rows * parts * -(-m // tile.tokens),)](
        x,
        values,
        columns if permutation is None else permutation,
        columns,
        row_starts,
        y if bias is None else bias,
        y,
        m,
        n,
        k,
        block_rows,
        **_constants(block, tile, block_rows, permutation is not None, activation, bias is not None),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def uses_panel(
    block: tuple[int, int], block_rows: int, k: int, blocks: int, m: int, dtype: torch.dtype, arch: int
) -> bool:
    """Whether x stays in shared memory: for Hopper's, and where there are tokens enough for every multiprocessor."""
    fits = block == (64, 64) and k <= 64 * MOST_COLUMNS and block_rows <= MOST_ROWS and dtype != torch.float32
    return fits and blocks > 0 and 90 <= arch < 100 and m >= 2048


def by_panels(
    x: Tensor,
    values: Tensor,
    permutation: Tensor | None,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
) -> Tensor:
    """`product` into y, contiguous, with x in shared memory; at least one block, of 64 x 64."""
    n, k = y.shape[-1], x.shape[-1]
    m, block_rows = y.numel() // n, n // 64
    group_rows = -(-block_rows // groups(m, block_rows, multiprocessors(x.device)))
    panel_product[(-(-m // PANEL), -(-block_rows // group_rows))](
        x,
        values,
        columns if permutation is None else permutation,
        columns,
        row_starts,
        y if bias is None else bias,
        y,
        m,
        n,
        k,
        block_rows,
        group_rows,
        **_panel_constants(k, block_rows, permutation is not None, activation, bias is not None),
        num_warps=4,
        num_stages=3,
    )
    return y


def _panel_constants(k: int, block_rows: int, turned: bool, activation: str, bias: bool) -> dict[str, Any]:
    constants = {"COLUMNS": k // 64, "TABLE": power_above(block_rows), "TOKENS": PANEL, "TURNED": turned}
    return {**constants, "ACTIVATION": activation, "BIAS": bias, "STAGES": 3}


def _constants(
    block: tuple[int, int], tile: Tiles, block_rows: int, turned: bool, activation: str, bias: bool
) -> dict[str, Any]:
    return {
        "R": block[0],
        "C": block[1],
        "ROWS": tile.rows,
        "DEPTH": tile.depth,
        "TOKENS": tile.tokens,
        "SWAPPED": tile.swapped,
        "TURNED": turned,
        "SORTED": sorted_rows(block_rows),
        "ACTIVATION": activation,
        "BIAS": bias,
    }


def cost(
    m: int, n: int, k: int, block: tuple[int, int], blocks: int, item: int = 2, bias: bool = True, programs: int = 132
) -> Cost:
    """What a call moves and computes on an sm_90 with `programs` multiprocessors; `item` bytes a number.

    x, the blocks and their index are read from memory once, y is written. FLOPs are those of whole tiles: the rows that
    a block row is padded to, and the first product with every part of a panel. Between the second-level cache and the
    multiprocessors more is moved: see `staged`.
    """
    dtype, block_rows = torch.float32 if item == 4 else torch.bfloat16, n // block[0]
    if uses_panel(block, block_rows, k, blocks, m, dtype, 90):
        panels = -(-m // PANEL)
        computed = panels * PANEL * (blocks * 64 + _group_count(m, block_rows, programs) * k) * 64
    else:
        tile = tiles(block, block_rows, blocks, m, dtype, 90)
        padded = -(-block[0] // tile.rows) * tile.rows
        computed = -(-m // tile.tokens) * tile.tokens * blocks * padded * block[1]
    index = 4 * (blocks + block_rows + 1)
    stored = blocks * block[0] * block[1] * item
    return Cost(
        read=m * k * item + stored + index + (n * item if bias else 0),
        written=m * n * item,
        flops=2 * computed,
    )


def _group_count(m: int, block_rows: int, programs: int) -> int:
    return -(-block_rows // -(-block_rows // groups(m, block_rows, programs)))


def staged(
    m: int, n: int, k: int, block: tuple[int, int], blocks: int, item: int = 2, arch: int = 90, programs: int = 132
) -> int:
    """Bytes that the programs load into shared memory: per tile of tokens, each block with the rows of x it meets."""
    dtype, block_rows = torch.float32 if item == 4 else torch.bfloat16, n // block[0]
    if uses_panel(block, block_rows, k, blocks, m, dtype, arch):
        # Once a group the whole panel, and one block more.
        count = _group_count(m, block_rows, programs)
        return -(-m // PANEL) * (count * (PANEL * k + 64 * 64) + blocks * 64 * 64) * item
    tile = tiles(block, block_rows, blocks, m, dtype, arch)
    parts = -(-block[0] // tile.rows)
    return -(-m // tile.tokens) * blocks * parts * block[1] * (tile.rows + tile.tokens) * item


def specimens(turned: bool = False) -> list[Specimen]:
    """Block sizes, densities and numbers of tokens that take each tile."""
    found: dict[str, Specimen] = {}
    for arch in (80, 90):
        for dtype, block, sizes in _COMPILED:
            block_rows = 3072 // block[0]
            for m, length in sizes:
                tile = tiles(block, block_rows, block_rows * length // block[1], m, dtype, arch)
                one = _specimen(dtype, block, tile, block_rows, turned, arch)
                found.setdefault(one.label, one)
    return [*found.values(), _panel_specimen(turned)]


def _panel_specimen(turned: bool) -> Specimen:
    signature = {"x": "*bf16", "values": "*bf16", "permutation": "*i64" if turned else "*i32", "columns": "*i32"}
    signature |= {"row_starts": "*i32", "bias": "*bf16", "y": "*bf16"}
    signature |= dict.fromkeys(("m", "n", "k", "block_rows", "group_rows"), "i32")
    constants = _panel_constants(768, 48, turned, "none" if turned else "gelu", not turned)
    label = f"bf16 64x64{' turned' if turned else ''}, panel of {PANEL} x 768, 4 warps"
    return Specimen(label, panel_product, signature, constants, 4, 3, 90, ("n", "k"), most=90)


# Block sizes, with the tokens and lengths of block rows that lead to other tiles.
_COMPILED = (
    (torch.bfloat16, (64, 64), ((1, 256), (64, 256), (16384, 256), (16384, 1024))),
    (torch.bfloat16, (32, 32), ((16384, 256),)),
    (torch.bfloat16, (128, 128), ((1, 256), (16384, 256), (16384, 1024))),
    (torch.bfloat16, (48, 16), ((16384, 256),)),
    (torch.bfloat16, (8, 2), ((1, 256), (16384, 256))),
    (torch.float32, (64, 64), ((1, 256), (16384, 256))),
    (torch.float32, (16, 16), ((16384, 256),)),
)


def _specimen(
    dtype: torch.dtype, block: tuple[int, int], tile: Tiles, block_rows: int, turned: bool, least: int
) -> Specimen:
    pointer = "*" + triton_type(dtype)
    signature = {"x": pointer, "values": pointer, "permutation": "*i64" if turned else "*i32"}
    signature |= {"columns": "*i32", "row_starts": "*i32", "bias": pointer, "y": pointer}
    signature |= dict.fromkeys(("m", "n", "k", "block_rows"), "i32")
    activation = "none" if turned else "tanh" if tile.tokens == 16 else "gelu"
    return Specimen(
        f"{triton_type(dtype)} {block[0]}x{block[1]}{' turned' if turned else ''}, {tile.rows} x {tile.tokens} x "
        f"{tile.depth}, {tile.warps} warps, {tile.stages} stages",
        _forward,
        signature,
        _constants(block, tile, block_rows, turned, activation, not turned),
        tile.warps,
        tile.stages,
        least,
        ("n", "k"),
    )
