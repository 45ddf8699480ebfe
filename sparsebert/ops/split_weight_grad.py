"""What the mask's scores and the weight under it want of a dense weight gradient, in one pass over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops.bits import block_sum, check_bits, check_grid, expand_grid, unpack_bits
from sparsebert.ops.masked_weight import COMPUTE_DTYPES

__all__ = ["split_weight_grad", "split_weight_grad_reference"]


def split_weight_grad(
    product: Tensor,
    weight: Tensor,
    bits: Tensor | None,
    grid: Sequence[int],
    need_scores: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """`(P∘weight summed over each block, P∘mask)` for the dense gradient P of a layer with weight W·mask.

    The first is the straight-through gradient of the mask's scores; the second is exactly zero where pruned, whatever P
    is there. Sums are taken in an order fixed by the shapes, so the number of threads does not show.

    Args:
        product: P, `[N, K]`, contiguous.
        weight: `[N, K]`, contiguous; may differ from P in dtype.
        bits: uint8 `[ceil(GN * GK / 8)]`, 1 = kept; needed for the second result only.
        grid: `(GN, GK)`.

    Returns:
        `[GN, GK]` float32 (float64 for float64 weights) and `[N, K]` in weight's dtype; `[0]` for one not needed.

    Raises:
        ValueError: shapes or bits that do not fit.
    """
    if product.shape != weight.shape or product.device != weight.device:
        raise ValueError(
            f"product: expected {list(weight.shape)} on {weight.device} like weight, got {list(product.shape)} on "
            f"{product.device}"
        )
    check_grid(weight.shape, grid)
    if need_weight and bits is None:
        raise ValueError("bits: needed for the weight's gradient")
    if bits is not None:
        check_bits(bits, grid[0] * grid[1])
    fits = weight.dtype in COMPUTE_DTYPES and product.dtype in COMPUTE_DTYPES
    body = _op.pick(product.device, fits and weight.is_contiguous() and product.is_contiguous())
    return body(product, weight, bits, list(grid), need_scores, need_weight)


def split_weight_grad_reference(
    product: Tensor, weight: Tensor, bits: Tensor | None, grid: Sequence[int], need_scores: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """The definition."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    score_grad, weight_grad = weight.new_empty(0, dtype=wide), weight.new_empty(0)
    if need_scores:
        score_grad = block_sum(product.to(wide) * weight.to(wide), grid)
    if need_weight:
        if bits is None:
            raise ValueError("bits: needed for the weight's gradient")
        kept = expand_grid(unpack_bits(bits, tuple(grid)), weight.shape)
        # where, not a product: a NaN in a pruned place must give an exact zero.
        zero = torch.zeros((), dtype=product.dtype, device=product.device)
        weight_grad = torch.where(kept, product, zero).to(weight.dtype)
    return score_grad, weight_grad


def fake_split(weight: Tensor, grid: Sequence[int], need_scores: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the two results."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (
        weight.new_empty(tuple(grid) if need_scores else (0,), dtype=wide),
        weight.new_empty(tuple(weight.shape) if need_weight else (0,)),
    )


_op = Op(
    "split_weight_grad",
    split_weight_grad_reference,
    lambda product, weight, bits, grid, need_scores, need_weight: fake_split(weight, grid, need_scores, need_weight),
)
