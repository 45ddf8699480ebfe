"""The gradient of `unstructured_linear`'s values: a product computed only where they lie (sampled dense-dense)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import Op
from sparsebert.ops.masked_linear import full_precision
from sparsebert.ops.unstructured_linear import check_structure, stored_places

__all__ = ["unstructured_sddmm", "unstructured_sddmm_reference"]


def unstructured_sddmm(
    grad: Tensor, x: Tensor, offsets: Tensor, rows: Tensor, counts: Tensor, starts: Tensor
) -> Tensor:
    """`(dY^T X)` at the stored places of a weight `[N, K]`, in the order of its values.

    Sums run over the M rows in float32 (float64 for float64), in an order fixed by the shapes, rounded once.

    Args:
        grad: dY, `[M, N]`.
        x: `[M, K]`, grad's dtype.
        offsets, rows, counts, starts: the places, as in `unstructured_linear`.

    Returns:
        `[nnz]` in x's dtype; a constant for autograd.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named.
    """
    n, k = _linear.check_pair(grad, x)
    check_structure(offsets, rows, counts, starts, n, k, offsets.numel(), x.device)
    if not offsets.numel():
        return x.new_empty(0)
    body = _op.pick(x.device, _linear.is_supported(x.dtype))
    with torch.no_grad(), full_precision(x.device.type):
        return body(grad.contiguous(), x.contiguous(), offsets, rows, counts, starts)


def unstructured_sddmm_reference(
    grad: Tensor, x: Tensor, offsets: Tensor, rows: Tensor, counts: Tensor, starts: Tensor
) -> Tensor:
    """The definition: the dense product, read at the stored places."""
    product = _linear.weight_grad_reference(grad, x)
    return product[stored_places(rows, counts, offsets, product.shape)].to(x.dtype)


def _fake(grad: Tensor, x: Tensor, offsets: Tensor, rows: Any, counts: Any, starts: Any) -> Tensor:
    return x.new_empty(offsets.shape)


_op = Op("unstructured_sddmm", unstructured_sddmm_reference, _fake)
