"""The dense weight of a bitmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops.bitmap_linear import DTYPES, check_structure, decoded

__all__ = ["bitmap_decode", "bitmap_decode_reference"]


def bitmap_decode(values: Tensor, bits: Tensor, starts: Tensor, *, shape: Sequence[int]) -> Tensor:
    """The weight `[N, K]`, 0 where nothing is kept; values of any float dtype, their bits unchanged.

    Args:
        values, bits, starts: a bitmap, as in `bitmap_linear`.
        shape: `(N, K)`.

    Returns:
        `[N, K]` in the dtype of values; a constant for autograd.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named.
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"values: expected float [nnz], got {values.dtype} {list(values.shape)}")
    n, k = shape
    check_structure(bits, starts, n, k, values.device)
    if not (n and k):
        return values.new_zeros(n, k)
    with torch.no_grad():
        return _op.pick(values.device, values.dtype in DTYPES)(values.contiguous(), bits, starts, [n, k])


def bitmap_decode_reference(values: Tensor, bits: Tensor, starts: Tensor, shape: Sequence[int]) -> Tensor:
    """The definition."""
    return decoded(values, bits, shape)


def _fake(values: Tensor, bits: Any, starts: Any, shape: Sequence[int]) -> Tensor:
    return values.new_empty(tuple(shape))


_op = Op("bitmap_decode", bitmap_decode_reference, _fake)
