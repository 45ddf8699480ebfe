"""A linear layer over 2:4 and a residue on a GPU: our kernel for Hopper's sparse matrix units, or the dense product.

Which of the two is measured once for a shape (_two_four_units.py); the dense product alone where the units are not
there, for fp32, and for sizes that 8 does not divide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsebert.kernels import _two_four_units as units
from sparsebert.kernels import dense_linear as dense
from sparsebert.kernels._triton import Specimen
from sparsebert.kernels.semi_structured_linear import expanded_weight

__all__ = ["specimens", "two_four_linear"]


def two_four_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    places: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
    transposed: Sequence[Tensor],
) -> Tensor:
    """See `sparsebert.ops.two_four_linear`."""
    n, k = shape
    m, first = x.numel() // k, n * k // 2
    if not m:
        return x.new_empty((*x.shape[:-1], n))
    semi, rest = values[:first].view(n, k // 2), values[first:]

    def expanded() -> Tensor:
        weight = expanded_weight(semi, positions, (2, 4))
        weight.view(-1)[places] = rest
        return dense.dense_linear(x, weight, bias, activation)

    if x.dtype == torch.float32 or n % 8 or k % 8 or "packed" not in units.there(x.device):
        return expanded()
    call = units.Call(x.reshape(m, k), semi, positions, bias, activation, expanded_weight, (rest, places))
    return units.fastest(("packed", "expanded"), call, expanded).view(*x.shape[:-1], n)


def specimens() -> list[Specimen]:
    """None of its own: what it launches is compiled CUDA, or other ops'."""
    return []
