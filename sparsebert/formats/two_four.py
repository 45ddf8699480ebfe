"""An unstructured weight as 2:4, which a GPU's sparse matrix units take, and the few weights that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.formats.base import Format, check_content, check_tensor, kept_of
from sparsebert.formats.semi_structured import SemiStructured
from sparsebert.ops.two_four_linear import dense_weight, stored_places, two_four_linear

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TwoFour"]


@dataclass(eq=False, repr=False)
class TwoFour(Format):
    """Any weight, 4 | K: the two largest of every four as 2:4, the others one by one. Fast on an H100 or H200 alone.

    Of a random weight with a share d kept, d^3 (1 - d) + d^4 / 2 of all places are left over: 0.1 % at 90 % sparsity,
    0.01 % at 95 %, 9 % at 50 %.
    """

    positions: Tensor
    """uint8 `[N, ceil(K / 8)]`: where the first N * K / 2 values lie, as in `SemiStructured`."""
    places: Tensor
    """int64 `[r]`, ascending: row * K + column of each value after these."""

    name = "two_four"
    op = "two_four_linear"

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Self:
        """As `Format.from_dense`; a ValueError where 4 does not divide the columns.

        In 2:4 are the two kept weights of largest magnitude of each four, of equals the leftmost and a NaN before all.
        A four with fewer is filled up with zeros; `exact` is False where there is one.
        """
        kept = kept_of(weight, mask)
        n, k = weight.shape
        if k % 4:
            raise ValueError(f"weight: expected a multiple of 4 columns, got {list(weight.shape)}")
        size = torch.where(kept, weight.detach().abs(), -1.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
        order = size.view(n, k // 4, 4).argsort(dim=2, descending=True, stable=True)
        first = torch.zeros_like(kept).view(n, k // 4, 4).scatter_(2, order[:, :, :2], True).view(n, k) & kept
        semi = SemiStructured.from_dense(weight, first, pattern=(2, 4))
        places = (kept & ~first).flatten().nonzero()[:, 0]
        values = torch.cat((semi.values.flatten(), weight.detach().flatten()[places]))
        return cls(values, (n, k), semi.positions, places, exact=semi.exact)

    def to_dense(self) -> Tensor:
        return dense_weight(self.values, self.positions, self.places, self.shape)

    def stored(self) -> Tensor:
        kept = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.device)
        return kept.scatter_(0, stored_places(self.positions, self.places, self.shape), True).view(self.shape)

    def check(self) -> None:
        n, k = self.shape
        if k % 4:
            raise ValueError(f"shape: expected a multiple of 4 columns, got {list(self.shape)}")
        check_tensor("places", self.places, torch.int64, [None], self.device)
        check_tensor("values", self.values, None, [n * k // 2 + len(self.places)], self.device)
        self.semi_structured().check()
        check_content("places", (self.places >= 0) & (self.places < n * k), self.places, f"0 to {n * k - 1}")
        check_content("places", self.places[1:] > self.places[:-1], self.places[1:], "ascending ones")
        taken = torch.zeros(n * k, dtype=torch.bool, device=self.device)
        taken[stored_places(self.positions, self.places[:0], self.shape)] = True
        check_content("places", ~taken[self.places], self.places, "none that is a position of 2:4")

    def semi_structured(self) -> SemiStructured:
        """The 2:4 part, over the same tensors."""
        n, k = self.shape
        return SemiStructured(self.values[: n * k // 2].view(n, k // 2), self.shape, self.positions, (2, 4))

    def residue(self) -> Tensor:
        """What is beside it, `[N, K]` with zeros."""
        n, k = self.shape
        return self.values.new_zeros(n * k).scatter(0, self.places, self.values[n * k // 2 :]).view(n, k)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, activation: str = "none", transposed: Sequence[Tensor] = ()
    ) -> Tensor:
        return two_four_linear(
            x, self.values, self.positions, self.places, bias, shape=self.shape, activation=activation
        )
