"""A linear layer over blocks of 64 x 64 or 128 x 128 with many rows of x, by clusters of Hopper's multiprocessors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.errors import unknown
from sparsebert.ops import _linear
from sparsebert.ops._backend import Op
from sparsebert.ops.block_sparse_linear import block_sparse_linear_reference, check_structure
from sparsebert.ops.semi_structured_pack import DTYPES, on_hopper

__all__ = ["MOST_K", "SIZES", "block_cluster_linear", "block_cluster_linear_reference"]

# csrc/block_cluster.h has the same numbers.
SIZES, MOST_K = (64, 128), 8192


def block_cluster_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """`activation(x @ W^T + bias)` over blocks; what `block_sparse_linear` calls for many rows where it is faster.

    Products are summed in float32, bias and activation applied there, and the result rounded once. The kernel runs on
    an H100 or H200 (compute capability 9.0), for at most 8192 columns; all else is the reference's. In the kernel a NaN
    or infinity in x reaches only the outputs that store a block in its columns, in the reference all of its row.

    Args:
        x: `[..., K]`, bfloat16 or float16.
        values: `[B, 64, 64]` or `[B, 128, 128]`, x's dtype.
        columns, row_starts: int32, as in `block_sparse_linear`; their content is taken on trust.
        bias: `[N]` in x's dtype, or None.
        shape: `(N, K)`.
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".

    Returns:
        `[..., N]` in x's dtype; no gradient flows through it.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named; an argument that requires a gradient.
    """
    n, k = shape
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected bfloat16 or float16, got {x.dtype}")
    _linear.check_operands(x, values, bias, n, k)
    if activation not in _linear.ACTIVATIONS:
        raise unknown("activation", activation, _linear.ACTIVATIONS)
    if values.dim() != 3 or values.shape[1] != values.shape[2] or values.shape[1] not in SIZES:
        raise ValueError(f"values: expected [B, 64, 64] or [B, 128, 128], got {list(values.shape)}")
    block = (values.shape[1], values.shape[2])
    check_structure(columns, row_starts, (n, k), block, len(values), values.device)
    leaves = [part for part in (x, values, bias) if part is not None]
    if torch.is_grad_enabled() and any(part.requires_grad for part in leaves):
        raise ValueError("x, values, bias: no gradient flows through this op; use block_sparse_linear")
    takes = min(n, k) > 0 and k <= MOST_K and (not x.is_cuda or on_hopper(x.device.index))
    with torch.no_grad():
        return _op.pick(x.device, takes)(
            x.contiguous(), values.contiguous(), columns, row_starts, bias, [n, k], activation
        )


def block_cluster_linear_reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
) -> Tensor:
    """The definition, `block_sparse_linear`'s."""
    return block_sparse_linear_reference(x, values, columns, row_starts, bias, shape, activation, [])


def _fake(x: Tensor, values: Any, columns: Any, row_starts: Any, bias: Any, shape: Any, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


_op = Op("block_cluster_linear", block_cluster_linear_reference, _fake)
