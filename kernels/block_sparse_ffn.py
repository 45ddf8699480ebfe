"""Triton: a feed-forward layer of two block-sparse weights whose intermediate stays in the second-level cache.

The tokens go through in chunks; launch i computes the first layer of chunk i and the second of chunk i - 1, side by
side, and the two halves of a buffer take turns. It is overwritten before it need ever be written to memory: of device
memory only x, the blocks and y are moved, and the long rows of the second layer run beside the short ones of the first.

Why not one launch with the intermediate on chip: what a program computes for T tokens it multiplies by all of the
second layer's blocks, so that y's accumulators are T x N in float32: 64 x 768 are 192 KiB of the 256 KiB of registers,
and Triton cannot pick a tile of registers at run time. Were it possible, every block would be loaded for 64 tokens
alone, 64 bytes a cycle and multiprocessor from the second-level cache, which gives about 25 to 30; the tiles here ask
for 96 (64 rows x 128 tokens). So on paper the cache's rate binds either way, not the ceiling of 1 / density and 11 that
memory and products alone leave. What would lift it is blocks sent to several multiprocessors at once.

`plan` compares on paper with two launches, whose tiles are wider, keep x in shared memory or go by clusters, but whose
intermediate goes to memory and back where it is larger than half the cache. For BERT-base and 16k tokens on an H100 the
two launches win at density 0.25 (86 us, dense 193), chunks at 0.1 (66 us).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels import block_sparse_linear as linear
from sparsebert.kernels._block_rows import Tiles, capability, linear_tile, longest_first, sorted_rows, tiles
from sparsebert.kernels._cluster_costs import traffic
from sparsebert.kernels._cost import CEILINGS, Cost
from sparsebert.kernels._triton import Specimen, triton_type

__all__ = ["block_sparse_ffn", "chunked", "cost", "plan", "seconds", "specimens", "staged", "staged_in_chunks"]

# From the second-level cache to all multiprocessors of an H100, bytes a second.
_CACHE_RATE = 5.5e12
_CACHE = 50 * 2**20
_STEP = 128


@triton.jit
def _both(
    x, up_values, up_columns, up_row_starts, up_bias, written, read, down_values, down_columns, down_row_starts,
    down_bias, y, up_m, down_m, n, inner, k, up_rows, down_rows, down_programs,
    UP_R: tl.constexpr, UP_C: tl.constexpr, UP_ROWS: tl.constexpr, UP_DEPTH: tl.constexpr, UP_SORTED: tl.constexpr,
    UP_BIAS: tl.constexpr, DOWN_R: tl.constexpr, DOWN_C: tl.constexpr, DOWN_ROWS: tl.constexpr,
    DOWN_DEPTH: tl.constexpr, DOWN_SORTED: tl.constexpr, DOWN_BIAS: tl.constexpr, TOKENS: tl.constexpr,
    UP_SWAPPED: tl.constexpr, DOWN_SWAPPED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < down_programs:
        # The longer ones first.
        parts = down_rows * ((DOWN_R + DOWN_ROWS - 1) // DOWN_ROWS)
        rest = program % parts
        row = longest_first(down_row_starts, rest % down_rows, down_rows, DOWN_SORTED)
        linear_tile(
            read, down_values, down_columns, down_columns, down_row_starts, down_bias, y, row, rest // down_rows,
            (program // parts).to(tl.int64) * TOKENS, down_m, n, inner, DOWN_R, DOWN_C, DOWN_ROWS, DOWN_DEPTH, TOKENS,
            DOWN_SWAPPED, False, "none", DOWN_BIAS,
        )  # fmt: skip
    else:
        other = program - down_programs
        pieces = up_rows * ((UP_R + UP_ROWS - 1) // UP_ROWS)
        left = other % pieces
        up_row = longest_first(up_row_starts, left % up_rows, up_rows, UP_SORTED)
        linear_tile(
            x, up_values, up_columns, up_columns, up_row_starts, up_bias, written, up_row, left // up_rows,
            (other // pieces).to(tl.int64) * TOKENS, up_m, inner, k, UP_R, UP_C, UP_ROWS, UP_DEPTH, TOKENS,
            UP_SWAPPED, False, ACTIVATION, UP_BIAS,
        )  # fmt: skip


def block_sparse_ffn(
    x: Tensor,
    up_values: Tensor,
    up_columns: Tensor,
    up_row_starts: Tensor,
    up_bias: Tensor | None,
    down_values: Tensor,
    down_columns: Tensor,
    down_row_starts: Tensor,
    down_bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
) -> Tensor:
    """See `sparsebert.ops.block_sparse_ffn`."""
    n, inner, k = shape
    up, down = (up_values, up_columns, up_row_starts, up_bias), (down_values, down_columns, down_row_starts, down_bias)
    m = x.numel() // k
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size if x.is_cuda else _CACHE
    chunk = plan(
        m,
        (n, inner, k),
        tuple(up_values.shape),
        tuple(down_values.shape),
        x.element_size(),
        capability(x.device),
        cache,
    )
    if chunk:
        return chunked(x, up, down, (n, inner, k), activation, chunk)
    hidden = linear.block_sparse_linear(x, *up, (inner, k), activation, [])
    return linear.block_sparse_linear(hidden, *down, (n, inner), "none", [])


_Layer = tuple[Tensor, Tensor, Tensor, "Tensor | None"]
_Size = tuple[int, int, int]


def chunked(x: Tensor, up: _Layer, down: _Layer, shape: _Size, activation: str, chunk: int) -> Tensor:
    """The layer for `chunk` tokens at a time, in one launch more than there are chunks."""
    n, inner, k = shape
    y = x.new_empty((*x.shape[:-1], n))
    m = x.numel() // k
    rows, out = x.view(m, k), y.view(m, n)
    arch = capability(x.device)
    blocks = tuple(up[0].shape[1:]), tuple(down[0].shape[1:])
    up_tile = _tile(blocks[0], inner // blocks[0][0], chunk, x.dtype, arch)
    down_tile = _tile(blocks[1], n // blocks[1][0], chunk, x.dtype, arch)
    buffer = x.new_empty((2, min(chunk, m), inner))
    constants = _constants(
        blocks, (up_tile, down_tile), (inner, n), activation, (up[3] is not None, down[3] is not None)
    )
    up_parts, down_parts = _parts(inner, blocks[0], up_tile), _parts(n, blocks[1], down_tile)
    for i in range(-(-m // chunk) + 1):
        first, before = i * chunk, (i - 1) * chunk
        up_m, down_m = max(min(chunk, m - first), 0), min(chunk, m - before) if i else 0
        down_programs = down_parts * -(-down_m // up_tile.tokens)
        _both[(down_programs + up_parts * -(-up_m // up_tile.tokens),)](
            rows[first:] if up_m else rows,
            *up[:3],
            y if up[3] is None else up[3],
            buffer[i % 2],
            buffer[1 - i % 2],
            *down[:3],
            y if down[3] is None else down[3],
            out[before:] if i else out,
            up_m,
            down_m,
            n,
            inner,
            k,
            inner // blocks[0][0],
            n // blocks[1][0],
            down_programs,
            **constants,
            num_warps=max(up_tile.warps, down_tile.warps),
            num_stages=min(up_tile.stages, down_tile.stages),
        )
    return y


def _tile(block: tuple[int, int], block_rows: int, m: int, dtype: torch.dtype, arch: int) -> Tiles:
    """The tile of one layer: as for short block rows, so that several programs share a multiprocessor."""
    return tiles(block, block_rows, 0, m, dtype, arch, programs=0)


def _parts(size: int, block: tuple[int, int], tile: Tiles) -> int:
    return size // block[0] * -(-block[0] // tile.rows)


def _constants(
    blocks: tuple[Any, Any], both: tuple[Tiles, Tiles], sizes: tuple[int, int], activation: str, bias: tuple[bool, bool]
) -> dict[str, Any]:
    found: dict[str, Any] = {"TOKENS": both[0].tokens, "ACTIVATION": activation}
    for i, name in enumerate(("UP", "DOWN")):
        found |= {f"{name}_R": blocks[i][0], f"{name}_C": blocks[i][1], f"{name}_ROWS": both[i].rows}
        found |= {f"{name}_DEPTH": both[i].depth, f"{name}_SORTED": sorted_rows(sizes[i] // blocks[i][0])}
        found |= {f"{name}_BIAS": bias[i], f"{name}_SWAPPED": both[i].swapped}
    return found


@functools.cache
def plan(m: int, shape: _Size, up: _Size, down: _Size, item: int, arch: int, cache: int) -> int:
    """Tokens of a chunk, or 0 for one launch a layer; `up` and `down` are the shapes [B, R, C] of the values.

    Both halves of the buffer take half of the cache. Two launches where the whole intermediate does, and where they are
    faster on paper.
    """
    inner = shape[1]
    most = max(cache // (4 * inner * item) // _STEP, 1) * _STEP
    if m * inner * item <= cache // 2 or m <= most:
        return 0
    chunks = -(-m // most)
    chunk = -(-m // (chunks * _STEP)) * _STEP
    pair, fused = (seconds(m, shape, up, down, item, arch, size) for size in (0, chunk))
    return chunk if fused < pair else 0


def seconds(
    m: int, shape: _Size, up: _Size, down: _Size, item: int, arch: int, chunk: int, device: str = "H100"
) -> float:
    """The least time on paper: of memory, products and what the programs load from the cache, the one that binds.

    `chunk` 0: one launch a layer, each by itself, the intermediate in memory.
    """
    n, inner, k = shape
    if chunk:
        loaded = staged_in_chunks(shape, up, down, m, chunk, item, arch)
        return max(cost(m, shape, up, down, item, chunk).seconds(CEILINGS[device]), loaded / _CACHE_RATE)
    total = 0.0
    for rows, width, (blocks, r, c) in ((inner, k, up), (n, inner, down)):
        one = linear.cost(m, rows, width, (r, c), blocks, item)
        total += max(one.seconds(CEILINGS[device]), staged(m, rows, width, (r, c), blocks, item, arch) / _CACHE_RATE)
    return total


def staged_in_chunks(shape: _Size, up: _Size, down: _Size, m: int, chunk: int, item: int = 2, arch: int = 90) -> int:
    """Bytes that the programs of all chunks load from the cache."""
    n, inner, _ = shape
    dtype = torch.float32 if item == 4 else torch.bfloat16
    loaded = 0
    for size, (blocks, r, c) in ((inner, up), (n, down)):
        tile = _tile((r, c), size // r, chunk, dtype, arch)
        loaded += -(-m // tile.tokens) * blocks * -(-r // tile.rows) * c * (tile.rows + tile.tokens) * item
    return loaded


def staged(m: int, n: int, k: int, block: tuple[int, int], blocks: int, item: int = 2, arch: int = 90) -> int:
    """Bytes that one launch for a layer [n, k] loads from the cache: Triton's, or with clusters where that is less."""
    found = linear.staged(m, n, k, block, blocks, item, arch)
    dtype = torch.float32 if item == 4 else torch.bfloat16
    if arch == 90 and linear.may_cluster(block, k, m, dtype):
        return min(found, traffic(m, n, k, block[0], blocks))
    return found


def cost(m: int, shape: _Size, up: _Size, down: _Size, item: int = 2, chunk: int = 0) -> Cost:
    """What a call moves and computes, with both biases; `chunk` as from `plan`: the intermediate then moves nothing."""
    n, inner, k = shape
    both = linear.cost(m, inner, k, up[1:], up[0], item) + linear.cost(m, n, inner, down[1:], down[0], item)
    if not chunk:
        return both
    hidden = m * inner * item
    # The blocks are read once: they stay in the cache, as the buffer does.
    return Cost(both.read - hidden, both.written - hidden, both.flops, -(-m // chunk) + 1)


def specimens() -> list[Specimen]:
    """The blocks of both layers alike, on each architecture's tiles."""
    found: dict[str, Specimen] = {}
    for arch in (80, 90):
        for dtype, block in _COMPILED:
            tile = _tile(block, 768 // block[0], 2048, dtype, arch)
            pointer = "*" + triton_type(dtype)
            names = (*_both.arg_names[: _both.arg_names.index("UP_R")],)
            integers = ("up_m", "down_m", "n", "inner", "k", "up_rows", "down_rows", "down_programs")
            signature = {
                name: "i32" if name in integers else "*i32" if name.endswith(("columns", "row_starts")) else pointer
                for name in names
            }
            label = f"{triton_type(dtype)} {block[0]}x{block[1]}, {tile.rows} x {tile.tokens} x {tile.depth}, "
            label += f"{tile.warps} warps"
            constants = _constants((block, block), (tile, tile), (3072, 768), "gelu", (True, True))
            one = Specimen(label, _both, signature, constants, tile.warps, tile.stages, arch, ("n", "inner", "k"))
            found.setdefault(label, one)
    return list(found.values())


_COMPILED = (
    (torch.bfloat16, (64, 64)),
    (torch.bfloat16, (32, 32)),
    (torch.bfloat16, (128, 128)),
    (torch.float32, (64, 64)),
)
