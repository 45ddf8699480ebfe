from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.linear_cases import pick_mask
from ops.linears import LinearPromises
from torch import Tensor

from sparsebert.formats import Blocks, Format
from sparsebert.ops import block_sparse_linear


class TestBlockSparseLinear(LinearPromises):
    op = "block_sparse_linear"
    gradients = ("block_sparse_sddmm",)
    transposed_count = 3
    shapes = ((48, 96), (16, 64), (240, 32), (16, 32), (304, 160))
    options = ((8, 2), (16, 2), (4, 2), (1, 1), (16, 16), (8, 1), (2, 32), (16, 1), (1, 4))

    def store(self, weight: Tensor, density: float, option: Any, generator: torch.Generator) -> Format:
        (n, k), (r, c) = weight.shape, option
        kept = pick_mask((n // r, k // c), density, generator)
        return Blocks.from_dense(weight, kept.repeat_interleave(r, 0).repeat_interleave(c, 1), block=option)

    def call(self, stored: Format, x: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(stored, Blocks)
        return block_sparse_linear(x, values, stored.columns, stored.row_starts, bias, shape=stored.shape, **options)

    def empty_option(self) -> Any:
        return (1, 1)


def test_by_hand() -> None:
    """[[0, 0, 1, 2], [0, 0, 3, 4], [5, 6, 0, 0], [7, 8, 0, 0]] in blocks of 2 x 2."""
    values = torch.arange(1.0, 9).view(2, 2, 2)
    columns, row_starts = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    y = block_sparse_linear(torch.tensor([1.0, 10, 100, 1000]), values, columns, row_starts, shape=(4, 4))
    assert y.tolist() == [2100, 4300, 65, 87]


def test_blocks_that_do_not_tile_the_weight_are_refused() -> None:
    columns, row_starts = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    for block, message in (((2, 3), "got 2x3"), ((3, 2), "got 3x2"), ((0, 2), "got 0x2")):
        with pytest.raises(ValueError, match=f"block: expected R x C with R dividing 4 and C dividing 4, {message}"):
            block_sparse_linear(torch.zeros(1, 4), torch.zeros(1, *block), columns, row_starts, shape=(4, 4))
