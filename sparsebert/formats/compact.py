"""A weight without the rows and columns that are wholly pruned: a smaller dense one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.formats.base import Format, check_content, check_tensor, kept_of, masked
from sparsebert.ops._linear import activate
from sparsebert.ops.dense_linear import dense_linear

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Compact"]


@dataclass(eq=False, repr=False)
class Compact(Format):
    """The rows and columns with any kept weight, as a dense `[Nr, Kc]`."""

    kept_rows: Tensor
    """int32 `[Nr]`, ascending; empty where all rows are kept."""
    kept_columns: Tensor
    """int32 `[Kc]`, ascending; empty where all columns are kept."""

    name = "compact"

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Self:
        kept = kept_of(weight, mask)
        n, k = weight.shape
        rows, columns = kept.any(1).nonzero().squeeze(1), kept.any(0).nonzero().squeeze(1)
        values = masked(weight.detach(), kept)[rows][:, columns].contiguous()
        exact = values.numel() == int(kept.sum())
        return cls(values, (n, k), _listed(rows, n), _listed(columns, k), exact=exact)

    def to_dense(self) -> Tensor:
        rows, columns = self._kept()
        return self.values.new_zeros(self.shape).index_put((rows[:, None], columns), self.values)

    def stored(self) -> Tensor:
        rows, columns = self._kept()
        kept = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        kept[rows[:, None], columns] = True
        return kept

    def check(self) -> None:
        check_tensor("values", self.values, None, [None, None], self.device)
        for name, kept, length, total in (
            ("kept_rows", self.kept_rows, self.values.shape[0], self.shape[0]),
            ("kept_columns", self.kept_columns, self.values.shape[1], self.shape[1]),
        ):
            every = length == total and kept.numel() == 0
            check_tensor(name, kept, torch.int32, [0 if every else length], self.device)
            check_content(name, (kept >= 0) & (kept < total), kept, f"0 to {total - 1}")
            check_content(name, kept[1:] > kept[:-1], kept[1:], "ascending numbers")

    def linear(
        self, x: Tensor, bias: Tensor | None = None, activation: str = "none", transposed: Sequence[Tensor] = ()
    ) -> Tensor:
        """As `Format.linear`; an output whose row is gone is `activation(bias)`."""
        n, k = self.shape
        if x.dim() < 1 or x.shape[-1] != k:
            raise ValueError(f"x: expected [..., {k}] to fit the weight [{n}, {k}], got {list(x.shape)}")
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"bias: expected [{n}], got {list(bias.shape)}")
        if self.values.shape[1] != k:
            x = x.index_select(-1, self.kept_columns)
        if self.values.shape[0] == n:
            return dense_linear(x, self.values, bias, activation=activation)
        inner_bias = None if bias is None else bias.index_select(0, self.kept_rows)
        inner = dense_linear(x, self.values, inner_bias, activation=activation)
        # Every activation here takes 0 to 0.
        constant = inner.new_zeros(n) if bias is None else activate(bias.to(inner.dtype), activation)
        # Made whole before it is written to: inductor (torch 2.13) lets the rows of an expanded tensor share memory.
        return constant.repeat(*x.shape[:-1], 1).index_copy(-1, self.kept_rows.long(), inner)

    def _kept(self) -> tuple[Tensor, Tensor]:
        """The numbers of the kept rows and columns, written out, int64."""
        (n, k), (rows, columns) = self.shape, self.values.shape
        return (
            torch.arange(n, device=self.device) if rows == n else self.kept_rows.long(),
            torch.arange(k, device=self.device) if columns == k else self.kept_columns.long(),
        )


def _listed(kept: Tensor, total: int) -> Tensor:
    return kept.new_empty(0, dtype=torch.int32) if len(kept) == total else kept.to(torch.int32)
