"""Weights stored as dense blocks, as `sparsebert.ops.block_sparse_linear` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.formats.base import Format, check_content, check_tensor, is_pair, kept_of, masked
from sparsebert.ops.block_sparse_linear import block_rows, block_sparse_linear

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Blocks"]


@dataclass(eq=False, repr=False)
class Blocks(Format):
    """The blocks of R x C that hold a kept weight, R | N and C | K: 4 bytes beside each."""

    columns: Tensor
    """int32 `[B]`: each block's block column, ascending within a block row."""
    row_starts: Tensor
    """int32 `[N / R + 1]`: the first block of each block row, and B."""
    block: tuple[int, int]
    """`(R, C)`."""

    name = "blocks"
    op = "block_sparse_linear"
    option_names = ("block",)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None, block: Sequence[int] = (16, 16)) -> Self:
        """As `Format.from_dense`, in blocks of `(R, C)`.

        A block with any kept weight is stored whole, its pruned weights as zeros; `exact` is False where there are any.
        """
        kept = kept_of(weight, mask)
        (n, k), (r, c) = weight.shape, _checked(block, tuple(weight.shape))
        any_kept = kept.reshape(n // r, r, k // c, c).any(3).any(1)
        row, column = any_kept.nonzero(as_tuple=True)
        grid = masked(weight.detach(), kept).reshape(n // r, r, k // c, c).transpose(1, 2)
        values = grid[row, column].contiguous()
        exact = len(row) * r * c == int(kept.sum())
        starts = _row_starts(any_kept.sum(1))
        return cls(values, (n, k), column.to(torch.int32), starts, (r, c), exact=exact)

    def to_dense(self) -> Tensor:
        (n, k), (r, c) = self.shape, self.block
        grid = self.values.new_zeros(n // r, k // c, r, c).index_put(self._places(), self.values)
        return grid.transpose(1, 2).reshape(n, k)

    def stored(self) -> Tensor:
        (n, k), (r, c) = self.shape, self.block
        kept = torch.zeros(n // r, k // c, dtype=torch.bool, device=self.device)
        kept[self._places()] = True
        return kept.repeat_interleave(r, 0).repeat_interleave(c, 1)

    def check(self) -> None:
        (n, k), (r, c) = self.shape, _checked(self.block, self.shape)
        check_tensor("values", self.values, None, [None, r, c], self.device)
        blocks = len(self.values)
        check_tensor("columns", self.columns, torch.int32, [blocks], self.device)
        check_tensor("row_starts", self.row_starts, torch.int32, [n // r + 1], self.device)
        ends = [int(self.row_starts[0]), int(self.row_starts[-1])]
        if ends != [0, blocks]:
            raise ValueError(f"row_starts: expected to begin with 0 and end with {blocks}, got {ends[0]} and {ends[1]}")
        starts = self.row_starts
        check_content("row_starts", starts[1:] >= starts[:-1], starts[1:], "numbers that never fall")
        inside = (self.columns >= 0) & (self.columns < k // c)
        check_content("columns", inside, self.columns, f"0 to {k // c - 1}")
        row = block_rows(self.columns, starts)
        rising = (self.columns[1:] > self.columns[:-1]) | (row[1:] != row[:-1])
        check_content("columns", rising, self.columns[1:], "ascending numbers within a block row")

    def linear(
        self, x: Tensor, bias: Tensor | None = None, activation: str = "none", transposed: Sequence[Tensor] = ()
    ) -> Tensor:
        return block_sparse_linear(
            x,
            self.values,
            self.columns,
            self.row_starts,
            bias,
            shape=self.shape,
            activation=activation,
            transposed=transposed,
        )

    def transposed(self) -> list[Tensor]:
        columns = self.shape[1] // self.block[1]
        row, column = self._places()
        # Blocks are in the order of (row, column); a stable sort by column puts them in that of (column, row).
        permutation = column.argsort(stable=True)
        return [permutation, row[permutation].to(torch.int32), _row_starts(torch.bincount(column, minlength=columns))]

    @property
    def spelling(self) -> str:
        return f"{self.name}:{self.block[0]}x{self.block[1]}"

    def _places(self) -> tuple[Tensor, Tensor]:
        return block_rows(self.columns, self.row_starts), self.columns.long()


def _checked(block: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    if not is_pair(block) or min(block) < 1:
        raise ValueError(f"block: expected (R, C) with both at least 1, got {block!r}")
    r, c = int(block[0]), int(block[1])
    if shape[0] % r or shape[1] % c:
        raise ValueError(f"block: {r}x{c} does not divide the weight [{shape[0]}, {shape[1]}]")
    return r, c


def _row_starts(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
