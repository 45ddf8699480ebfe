"""LayerNorm of a sum of two in Triton: each operand is read once, the result written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, triton_type

__all__ = ["add_layer_norm", "cost", "specimens", "tiles"]

_TILE = 4096
_MANY = 1024


@triton.jit(do_not_specialize=("rows",))
def _forward(
    x, residual, weight, bias, out, rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ROWS` whole rows a program. The width is a constant: from it follows how much may be loaded at a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    there = (row < rows)[:, None] & within[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    total = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    total += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    # Before the sums, so that nothing waits for memory twice.
    slope = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=within, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / WIDTH
    centred = tl.where(there, total - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / WIDTH
    scale = tl.rsqrt(variance + eps)
    result = centred * scale[:, None] * slope[None, :] + shift[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=there)


def tiles(rows: int, width: int) -> tuple[int, int, int]:
    """`(rows, columns, warps)` of a program.

    Of many rows it takes several, that enough loads are on their way; of few rows one, that no multiprocessor idles.
    """
    block = triton.next_power_of_2(width)
    if rows >= _MANY:
        return max(1, _TILE // block), block, 4 if block <= _TILE else 8
    return max(1, 256 // block), block, min(8, max(1, block // 256))


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As the op's reference."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    width = x.shape[-1]
    rows = x.numel() // width
    tile, block, warps = tiles(rows, width)
    _forward[(-(-rows // tile),)](
        x, residual, weight, bias, out, rows, eps, WIDTH=width, ROWS=tile, BLOCK=block, num_warps=warps
    )
    return out


def cost(rows: int, width: int, bytes_each: int = 2) -> Cost:
    """`rows` of `width` elements of `bytes_each` bytes; weight and bias stay in the cache: they are counted once."""
    size = rows * width * bytes_each
    return Cost(2 * size + 2 * width * bytes_each, size, 8 * rows * width)


CASES = (
    *((dtype, rows, 768) for dtype in (torch.bfloat16, torch.float16, torch.float32) for rows in (16384, 128)),
    *((torch.bfloat16, 16384, width) for width in (128, 312, 1024, 1031, 2048, 4096, 8192)),
    *((torch.float32, rows, 8192) for rows in (16384, 128)),
    *((torch.float32, 128, width) for width in (128, 4096)),
)
"""The cases to compile: `(dtype, rows, width)`, every number of warps, and widths that allow wide loads or do not."""


def specimens() -> list[Specimen]:
    """See CASES."""
    return [_specimen(*case) for case in CASES]


def _specimen(dtype: torch.dtype, rows: int, width: int) -> Specimen:
    tile, block, warps = tiles(rows, width)
    word = triton_type(dtype)
    signature = {name: f"*{word}" for name in ("x", "residual", "weight", "bias", "out")}
    return Specimen(
        f"{word}, width {width}: {tile}x{block}",
        _forward,
        {**signature, "rows": "i32", "eps": "fp32"},
        {"WIDTH": width, "ROWS": tile, "BLOCK": block},
        warps,
    )
