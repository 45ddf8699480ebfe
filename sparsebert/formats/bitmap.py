"""Weights stored one by one beside a bit for each place, as `sparsebert.ops.bitmap_linear` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.formats.base import Format, check_content, check_tensor, kept_of
from sparsebert.ops.bitmap_linear import (
    LANES,
    TILE_COLS,
    TILE_ROWS,
    bitmap_linear,
    decoded,
    from_tiles,
    in_tiles,
    kept_in_tiles,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Bitmap"]


@dataclass(eq=False, repr=False)
class Bitmap(Format):
    """Any weight: 1 bit beside each place, kept or not, and 8 bytes for each tile of 16x64. Fast on CUDA alone."""

    bits: Tensor
    """int32 `[ceil(N / 16), ceil(K / 64), 32]`: which weights are kept, a word to a lane."""
    starts: Tensor
    """int64 `[tiles + 1]`: each tile's first value."""

    name = "bitmap"
    # No `op`: which dtypes the kernels take is not as for the other layers, so calls go through `bitmap_linear`.

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Self:
        kept = kept_of(weight, mask)
        tiles = in_tiles(kept)
        powers = torch.arange(32, device=kept.device)
        # A sum of shifts in 64 bits, whose lower half is the word.
        bits = (tiles.long() << powers).sum(3).to(torch.int32)
        return cls(in_tiles(weight.detach())[tiles], (weight.shape[0], weight.shape[1]), bits, _starts(tiles))

    def to_dense(self) -> Tensor:
        return decoded(self.values, self.bits, self.shape)

    def stored(self) -> Tensor:
        return from_tiles(kept_in_tiles(self.bits), self.shape)

    def check(self) -> None:
        rows, cols = -(-self.shape[0] // TILE_ROWS), -(-self.shape[1] // TILE_COLS)
        check_tensor("values", self.values, None, [None], self.device)
        check_tensor("bits", self.bits, torch.int32, [rows, cols, LANES], self.device)
        check_tensor("starts", self.starts, torch.int64, [rows * cols + 1], self.device)
        tiles = kept_in_tiles(self.bits)
        inside = in_tiles(torch.ones(self.shape, dtype=torch.bool, device=self.device))
        check_content("bits", (inside | ~tiles).all(3), self.bits, "zeros beyond the weight's edges")
        total = int(tiles.sum())
        if total != self.nnz:
            raise ValueError(f"bits: expected {self.nnz} of them set, as many as values, got {total}")
        expected = _starts(tiles)
        check_content("starts", self.starts == expected, self.starts, "the sums of bits before each tile")

    def linear(
        self, x: Tensor, bias: Tensor | None = None, activation: str = "none", transposed: Sequence[Tensor] = ()
    ) -> Tensor:
        return bitmap_linear(x, self.values, self.bits, self.starts, bias, shape=self.shape, activation=activation)


def _starts(tiles: Tensor) -> Tensor:
    """The first value of each tile, and their total, from the kept places by tile, lane and bit."""
    counts = tiles.sum((2, 3)).flatten()
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))
