"""The dense matrix as a format: what is left where no sparse one is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.formats.base import Format, check_tensor, kept_of, masked
from sparsebert.ops.dense_linear import dense_linear

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Dense"]


@dataclass(eq=False, repr=False)
class Dense(Format):
    """`values` is the weight `[N, K]` with its zeros."""

    name = "dense"
    op = "dense_linear"

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Self:
        kept = kept_of(weight, mask)
        return cls(masked(weight, kept).detach().contiguous(), _shape(weight), exact=bool(kept.all()))

    def to_dense(self) -> Tensor:
        return self.values.clone()

    def stored(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.bool, device=self.device)

    def check(self) -> None:
        check_tensor("values", self.values, None, self.shape, self.device)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, activation: str = "none", transposed: Sequence[Tensor] = ()
    ) -> Tensor:
        return dense_linear(x, self.values, bias, activation=activation)


def _shape(weight: Tensor) -> tuple[int, int]:
    n, k = weight.shape
    return n, k
