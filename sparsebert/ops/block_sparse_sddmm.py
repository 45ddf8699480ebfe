"""The gradient of `block_sparse_linear`'s blocks: a product computed only where they lie (sampled dense-dense)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import Op
from sparsebert.ops.block_sparse_linear import block_rows, check_structure
from sparsebert.ops.masked_linear import full_precision

__all__ = ["block_sparse_sddmm", "block_sparse_sddmm_reference"]


def block_sparse_sddmm(grad: Tensor, x: Tensor, columns: Tensor, row_starts: Tensor, block: Sequence[int]) -> Tensor:
    """`(dY^T X)` in the stored blocks of a weight `[N, K]`, in the order of its values.

    Sums run over the M rows in float32 (float64 for float64), in an order fixed by the shapes, rounded once.

    Args:
        grad: dY, `[M, N]`.
        x: `[M, K]`, grad's dtype.
        columns, row_starts: where the blocks lie, as in `block_sparse_linear`.
        block: `(R, C)`.

    Returns:
        `[B, R, C]` in x's dtype; a constant for autograd.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named.
    """
    shape, (r, c) = _linear.check_pair(grad, x), block
    check_structure(columns, row_starts, shape, (r, c), columns.numel(), x.device)
    if not columns.numel():
        return x.new_empty((0, r, c))
    body = _op.pick(x.device, _linear.is_supported(x.dtype, x.device.type))
    with torch.no_grad(), full_precision(x.device.type):
        return body(grad.contiguous(), x.contiguous(), columns, row_starts, [r, c])


def block_sparse_sddmm_reference(
    grad: Tensor, x: Tensor, columns: Tensor, row_starts: Tensor, block: Sequence[int]
) -> Tensor:
    """The definition: the dense product, read in the stored blocks."""
    r, c = block
    n, k = grad.shape[1], x.shape[1]
    grid = _linear.weight_grad_reference(grad, x).reshape(n // r, r, k // c, c).transpose(1, 2)
    return grid[block_rows(columns, row_starts), columns.long()].to(x.dtype)


def _fake(grad: Tensor, x: Tensor, columns: Tensor, row_starts: Any, block: Sequence[int]) -> Tensor:
    return x.new_empty((columns.shape[0], *block))


_op = Op("block_sparse_sddmm", block_sparse_sddmm_reference, _fake)
