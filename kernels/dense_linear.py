"""A dense linear layer on a GPU: cuBLAS, or where an activation follows a large product, Triton with it fused.

cuBLAS has no epilogue for erf's GELU: y is written, read and written again, which at 16384 x 3072 takes two thirds of
the product's own time. A Triton product may be that much slower and still gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sparsebert.kernels._block_rows import activated, capability, power_above
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, dot, triton_type

__all__ = ["FASTER", "ProductTiles", "activate", "by_triton", "cost", "dense_linear", "product", "specimens", "tiles"]

FASTER: frozenset[tuple[int, int]] = frozenset()
"""Shapes `(N, K)` whose plain 16-bit product was measured to be faster by Triton than by cuBLAS, at any M; none yet."""
# Rows of x from which the pass that a fused activation saves is more than this product's lag behind cuBLAS, by paper.
MANY = 2048
# Tiles of tokens whose programs follow one another, so that a weight's rows are in the cache for all of them.
TOGETHER = 8


@dataclass(frozen=True)
class ProductTiles:
    """How the product is cut up."""

    tokens: int
    rows: int
    """Rows of the weight."""
    depth: int
    warps: int
    stages: int


def tiles(m: int, n: int, dtype: torch.dtype, arch: int) -> ProductTiles:
    """The tiles for m rows of x and a weight of n rows, on sm_`arch`."""
    wide = dtype == torch.float32
    tokens, rows = min(max(power_above(m), 16), 64 if wide else 128), min(max(power_above(n), 16), 64 if wide else 128)
    if arch >= 90 and not wide and tokens == 128 and n % 256 == 0 and m * n >= 132 * 128 * 256:
        rows = 256
    large = tokens * rows > 64 * 128
    return ProductTiles(tokens, rows, 32 if wide else 64, 8 if large else 4, 3)


def by_triton(m: int, n: int, k: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether Triton does the product; else cuBLAS."""
    return dtype != torch.float32 and ((n, k) in FASTER or (activation != "none" and m >= MANY))


@triton.jit
def _product(
    x, weight, bias, y, m, n, k, down, across,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, TOGETHER: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // (TOGETHER * across)
    inner = tl.program_id(0) % (TOGETHER * across)
    high = tl.minimum(down - group * TOGETHER, TOGETHER)
    first_token = (group * TOGETHER + inner % high).to(tl.int64) * TOKENS
    row = (inner // high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = first_token + tl.arange(0, TOKENS)
    place = tl.arange(0, DEPTH)
    # What lies beyond the edges reads the last row and is not stored.
    x_at = x + tl.minimum(token, m - 1)[:, None] * k + place[None, :]
    w_at = weight + tl.minimum(row, n - 1)[:, None] * k + place[None, :]
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for done in range(0, k, DEPTH):
        if EVEN:
            v = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = (done + place < k)[None, :]
            v = tl.load(x_at, inside, other=0)
            w = tl.load(w_at, inside, other=0)
        acc = dot(v, tl.trans(w), acc)
        x_at += DEPTH
        w_at += DEPTH
    if BIAS:
        acc += tl.load(bias + tl.minimum(row, n - 1)).to(tl.float32)[None, :]
    first_row = (inner // high).to(tl.int64) * ROWS
    _store(acc, y, first_token, first_row, m, n, TOKENS, ROWS, ACTIVATION)


@triton.jit
def _store(acc, y, first_token, first_row, m, n, TOKENS: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr):
    if ROWS > 64:
        # Halves of the columns, which every thread has of its own: fewer registers at a time.
        HALF: tl.constexpr = ROWS // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (TOKENS, 2, HALF)), (0, 2, 1)))
        _store(low, y, first_token, first_row, m, n, TOKENS, HALF, ACTIVATION)
        _store(high, y, first_token, first_row + HALF, m, n, TOKENS, HALF, ACTIVATION)
    else:
        token = first_token + tl.arange(0, TOKENS)
        row = first_row + tl.arange(0, ROWS)
        out = activated(acc, ACTIVATION).to(y.dtype.element_ty)
        tl.store(y + token[:, None] * n + row[None, :], out, (token < m)[:, None] & (row < n)[None, :])


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See `sparsebert.ops.dense_linear`."""
    n, k = weight.shape
    m = x.numel() // max(k, 1)
    if m and by_triton(m, n, k, x.dtype, activation):
        return product(x, weight, bias, activation)
    return activate(F.linear(x, weight, bias), activation)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The layer by Triton; at least one row, column and token."""
    (n, k), x, weight = weight.shape, x.contiguous(), weight.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    m = y.numel() // n
    tile = tiles(m, n, x.dtype, capability(x.device))
    down, across = -(-m // tile.tokens), -(-n // tile.rows)
    _product[(down * across,)](
        x,
        weight,
        y if bias is None else bias,
        y,
        m,
        n,
        k,
        down,
        across,
        **_constants(tile, k % tile.depth == 0, activation, bias is not None),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def activate(y: Tensor, activation: str) -> Tensor:
    """`activation(y)` by torch's own op."""
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "relu":
        return F.relu(y)
    return torch.tanh(y) if activation == "tanh" else y


def _constants(tile: ProductTiles, even: bool, activation: str, bias: bool) -> dict[str, Any]:
    sizes = {"TOKENS": tile.tokens, "ROWS": tile.rows, "DEPTH": tile.depth, "EVEN": even, "TOGETHER": TOGETHER}
    return {**sizes, "ACTIVATION": activation, "BIAS": bias}


def cost(m: int, n: int, k: int, item: int = 2, bias: bool = True, activation: str = "none", arch: int = 90) -> Cost:
    """What a call moves and computes: a fused activation costs nothing, one by torch another pass over y."""
    dtype = torch.float32 if item == 4 else torch.bfloat16
    once = Cost((m * k + n * k + (n if bias else 0)) * item, m * n * item, 2 * m * n * k)
    if by_triton(m, n, k, dtype, activation):
        tile = tiles(m, n, dtype, arch)
        computed = (
            -(-m // tile.tokens) * tile.tokens * -(-n // tile.rows) * tile.rows * -(-k // tile.depth) * tile.depth
        )
        return Cost(once.read, once.written, 2 * computed)
    return once if activation == "none" else once + Cost(m * n * item, m * n * item, 0)


def specimens() -> list[Specimen]:
    """Large products with the activation fused, for Ampere and for Hopper."""
    found: dict[str, Specimen] = {}
    for dtype in (torch.bfloat16, torch.float16):
        for arch in (80, 90):
            for m, n, activation in ((16384, 3072, "gelu"), (2048, 768, "tanh")):
                tile = tiles(m, n, dtype, arch)
                pointers = dict.fromkeys(("x", "weight", "bias", "y"), "*" + triton_type(dtype))
                label = f"{triton_type(dtype)} {tile.tokens} x {tile.rows} x {tile.depth}, {activation}"
                found.setdefault(label, Specimen(
                    label, _product, pointers | dict.fromkeys(("m", "n", "k", "down", "across"), "i32"),
                    _constants(tile, True, activation, True), tile.warps, tile.stages, arch, ("n", "k"),
                ))  # fmt: skip
    return list(found.values())
