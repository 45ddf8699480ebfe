"""Weights stored one by one, in the tiles of `sparsebert.ops.unstructured_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.formats.base import Format, check_content, check_tensor, kept_of
from sparsebert.ops.unstructured_linear import PANEL, STRIP, entry_tiles, stored_places, unstructured_linear

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Unstructured", "tiles"]


@dataclass(eq=False, repr=False)
class Unstructured(Format):
    """Any weight: 1 byte beside each stored weight, and 2 for each row of a panel of columns."""

    offsets: Tensor
    """uint8 `[nnz]`: each value's column within its panel."""
    rows: Tensor
    """uint8 `[panels * N]`: each entry's row within its strip."""
    counts: Tensor
    """uint8 `[panels * N]`: each entry's number of values."""
    starts: Tensor
    """int64 `[strips * panels + 1]`: each tile's first value."""

    name = "unstructured"
    op = "unstructured_linear"

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Self:
        kept = kept_of(weight, mask)
        n, k = weight.shape
        values, offsets, rows, counts, starts = tiles(weight.detach(), kept)
        return cls(values, (n, k), offsets, rows, counts, starts)

    def to_dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).index_put(self._places(), self.values)

    def stored(self) -> Tensor:
        kept = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        kept[self._places()] = True
        return kept

    def check(self) -> None:
        n, k = self.shape
        panels, strips, device = -(-k // PANEL), -(-n // STRIP), self.device
        check_tensor("values", self.values, None, [None], device)
        check_tensor("offsets", self.offsets, torch.uint8, [self.nnz], device)
        check_tensor("rows", self.rows, torch.uint8, [panels * n], device)
        check_tensor("counts", self.counts, torch.uint8, [panels * n], device)
        check_tensor("starts", self.starts, torch.int64, [strips * panels + 1], device)
        strip, panel = entry_tiles(self.shape, device)
        tile, width = strip * panels + panel, (k - panel * PANEL).clamp(max=PANEL)
        check_content("counts", self.counts <= width, self.counts, "at most the columns of the panel")
        total = int(self.counts.sum())
        if total != self.nnz:
            raise ValueError(f"counts: expected a sum of {self.nnz} like values, got {total}")
        expected = _starts(self.counts, tile, strips * panels)
        check_content("starts", self.starts == expected, self.starts, "the sums of counts before each tile")
        self._check_rows(tile)
        self._check_offsets(width)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, activation: str = "none", transposed: Sequence[Tensor] = ()
    ) -> Tensor:
        return unstructured_linear(
            x,
            self.values,
            self.offsets,
            self.rows,
            self.counts,
            self.starts,
            bias,
            shape=self.shape,
            activation=activation,
            transposed=transposed,
        )

    def transposed(self) -> list[Tensor]:
        return transposed_tiles(*self._places(), self.shape)

    def _places(self) -> tuple[Tensor, Tensor]:
        return stored_places(self.rows, self.counts, self.offsets, self.shape)

    def _check_rows(self, tile: Tensor) -> None:
        if not len(tile):
            return
        # Sorted by (count, row) within a tile: then the keys strictly ascend.
        key = self.counts.long() * STRIP + self.rows
        ordered = torch.cat((key.new_ones(1, dtype=torch.bool), (key[1:] > key[:-1]) | (tile[1:] != tile[:-1])))
        check_content("rows", ordered, self.rows, "the entries of each tile in the order of (count, row)")
        # A tile has as many entries as its strip has rows: all of them in the strip, none twice, is each row once.
        height = (self.shape[0] - tile // -(-self.shape[1] // PANEL) * STRIP).clamp(max=STRIP)
        place = tile * STRIP + self.rows
        times = torch.bincount(place)[place]
        once = (self.rows < height) & (times == 1)
        check_content("rows", once, self.rows, "each row of its strip once in a tile")

    def _check_offsets(self, width: Tensor) -> None:
        # Whatever is as long as `offsets` is kept in bytes: this is most of what loading a model takes.
        counts = self.counts.long()
        ends = counts.cumsum(0)
        rising = self.offsets[1:] > self.offsets[:-1]
        first = (ends - counts)[(counts > 0) & (ends > counts)]
        rising[first - 1] = True
        last = self.offsets[ends[counts > 0] - 1]
        if bool(rising.all()) and bool((last < width[counts > 0]).all()):
            return
        entry = torch.repeat_interleave(counts, output_size=self.nnz)
        check_content("offsets", self.offsets < width[entry], self.offsets, "less than the columns of the panel")
        check_content("offsets", rising, self.offsets[1:], "ascending columns within a row")


def tiles(matrix: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(values, offsets, rows, counts, starts)` of the kept elements of a matrix `[N, K]` of any dtype."""
    n, k = matrix.shape
    device = matrix.device
    panels, strips = -(-k // PANEL), -(-n // STRIP)
    # Row-major first: that is the order of the entries by (row, panel). Counted in float32, which is exact and fast.
    by_panel = torch.nn.functional.pad(kept.float(), (0, panels * PANEL - k)).view(n, panels, PANEL)
    lengths = by_panel.sum(2).long().flatten()
    places = kept.flatten().nonzero().squeeze(1)
    row = torch.arange(n, device=device)[:, None]
    panel = torch.arange(panels, device=device)
    tile = (row // STRIP) * panels + panel
    order = ((tile * (PANEL + 1) + lengths.view(n, panels)) * STRIP + row % STRIP).flatten().argsort()
    counts = lengths[order]
    # The elements of an entry move together, from where it began in row-major order to where it begins now.
    moved = (lengths.cumsum(0) - lengths)[order] - (counts.cumsum(0) - counts)
    corner = (row * k + panel * PANEL).flatten()[order]
    entry = torch.repeat_interleave(counts, output_size=len(places))
    places = places.index_select(0, moved[entry].add_(torch.arange(len(places), device=device)))
    return (
        matrix.flatten().index_select(0, places),
        (places - corner[entry]).to(torch.uint8),
        (row % STRIP).expand(n, panels).flatten()[order].to(torch.uint8),
        counts.to(torch.uint8),
        _starts(counts, tile.flatten()[order], strips * panels),
    )


def transposed_tiles(row: Tensor, column: Tensor, shape: tuple[int, int]) -> list[Tensor]:
    """`[permutation, offsets, rows, counts, starts]` of W^T for values that lie at (row, column) of W."""
    n, k = shape
    numbers = torch.arange(len(row), dtype=torch.int32 if len(row) < 2**31 else torch.int64, device=row.device)
    number = numbers.new_full((k * n,), -1).index_copy_(0, column * n + row, numbers).view(k, n)
    permutation, *index = tiles(number, number >= 0)
    return [permutation.long(), *index]


def _starts(counts: Tensor, tile: Tensor, number: int) -> Tensor:
    """The first value of each of `number` tiles, and their total, from the counts of their entries."""
    sums = torch.zeros(number + 1, dtype=torch.int64, device=counts.device)
    sums.index_add_(0, tile + 1, counts.long())
    return sums.cumsum(0)
