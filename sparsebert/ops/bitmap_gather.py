"""The elements of a dense matrix at a bitmap's places: the gradient of its values out of the weight's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops.bitmap_linear import DTYPES, check_structure, in_tiles, kept_in_tiles

__all__ = ["bitmap_gather", "bitmap_gather_reference"]


def bitmap_gather(dense: Tensor, bits: Tensor, starts: Tensor, *, nnz: int) -> Tensor:
    """`dense` at the kept places, in the order of a bitmap's values; the inverse of `bitmap_decode`.

    Args:
        dense: `[N, K]`, float.
        bits, starts: a bitmap's, as in `bitmap_linear`.
        nnz: the number of its values.

    Returns:
        `[nnz]` in dense's dtype; a constant for autograd.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named.
    """
    if dense.dim() != 2 or not dense.is_floating_point():
        raise ValueError(f"dense: expected float [N, K], got {dense.dtype} {list(dense.shape)}")
    if not 0 <= nnz <= dense.numel():
        raise ValueError(f"nnz: expected 0 to {dense.numel()}, got {nnz}")
    check_structure(bits, starts, dense.shape[0], dense.shape[1], dense.device)
    if not nnz:
        return dense.new_empty(0)
    with torch.no_grad():
        return _op.pick(dense.device, dense.dtype in DTYPES)(dense.contiguous(), bits, starts, nnz)


def bitmap_gather_reference(dense: Tensor, bits: Tensor, starts: Tensor, nnz: int) -> Tensor:
    """The definition."""
    return in_tiles(dense)[kept_in_tiles(bits)]


def _fake(dense: Tensor, bits: Any, starts: Any, nnz: int) -> Tensor:
    return dense.new_empty(nnz)


_op = Op("bitmap_gather", bitmap_gather_reference, _fake)
