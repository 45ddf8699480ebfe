"""An unstructured weight as 2:4, which a GPU's sparse tensor cores take, plus the few weights that do not fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebert.formats.base import kept_of
from sparsebert.formats.semi_structured import SemiStructured
from sparsebert.formats.unstructured import Unstructured
from sparsebert.ops.semi_structured_pack import semi_structured_pack, unpacked
from sparsebert.ops.semi_structured_packed_linear import semi_structured_packed_linear
from sparsebert.ops.semi_structured_residue import packed_residue, unpacked_residue

__all__ = ["PackedTwoFour", "pack_two_four", "split_two_four"]


def split_two_four(weight: Tensor, mask: Tensor | None = None) -> tuple[SemiStructured, Unstructured]:
    """Split a weight `[N, K]`, 4 | K, into a 2:4 part and a residue that add up to it exactly.

    Of each group of 4 the two kept weights of largest magnitude (of equals the leftmost, a NaN before all) are in the
    first part and the others in the residue, so no place is in both. Of a random weight
    with a share d kept, d^3 (1 - d) + d^4 / 2 of all places are left over: 0.1 % at 90 % sparsity, 0.01 % at 95 %,
    9 % at 50 %.

    Args:
        weight: `[N, K]`, float. Kept in its dtype, on its device, and copied.
        mask: bool `[N, K]`, True where a weight is kept; None keeps the weights that are not 0.

    Raises:
        ValueError: a mask or weight that does not fit, or columns that 4 does not divide.
    """
    kept = kept_of(weight, mask)
    n, k = weight.shape
    if k % 4:
        raise ValueError(f"weight: expected a multiple of 4 columns, got {list(weight.shape)}")
    size = torch.where(kept, weight.detach().abs(), -1.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    order = size.view(n, k // 4, 4).argsort(dim=2, descending=True, stable=True)
    first = torch.zeros_like(kept).view(n, k // 4, 4).scatter_(2, order[:, :, :2], True).view(n, k) & kept
    return SemiStructured.from_dense(weight, first, pattern=(2, 4)), Unstructured.from_dense(weight, kept & ~first)


@dataclass(frozen=True, eq=False)
class PackedTwoFour:
    """An unstructured weight to run, not to train or save: 2:4 and a residue, as Hopper's sparse units read them.

    For many rows of x and a sparsity of some 90 % and more: the residue costs about a product of 16 columns for every
    16 of the up to 64 columns that 64 rows have in it. Elsewhere than on an H100 or H200 it runs by its definition.
    """

    packed: Tensor
    """As `semi_structured_pack` makes it."""
    residue: list[Tensor]
    """As `packed_residue` makes it."""
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.numel() * part.element_size() for part in (self.packed, *self.residue))

    def to_dense(self) -> Tensor:
        """The weight `[N, K]`."""
        dtype = self.residue[2].dtype
        return unpacked(self.packed, self.shape, dtype) + unpacked_residue(self.residue, self.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
        """`activation(x @ W^T + bias)`; see `semi_structured_packed_linear`."""
        return semi_structured_packed_linear(
            x, self.packed, bias, shape=self.shape, activation=activation, residue=self.residue
        )


def pack_two_four(weight: Tensor, mask: Tensor | None = None) -> PackedTwoFour:
    """`split_two_four`, packed to run.

    Args:
        weight: `[N, K]`, bfloat16 or float16, 4 | K; on a GPU N and K are to be multiples of 8.
        mask: bool `[N, K]`, True where a weight is kept; None keeps the weights that are not 0.

    Raises:
        ValueError: a mask or weight that does not fit, columns that 4 does not divide, or another dtype.
    """
    semi, rest = split_two_four(weight, mask)
    packed = semi_structured_pack(semi.values, semi.positions)
    return PackedTwoFour(packed, packed_residue(rest.to_dense()), (weight.shape[0], weight.shape[1]))
