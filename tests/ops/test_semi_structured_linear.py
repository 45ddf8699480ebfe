from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.linears import LinearPromises
from torch import Tensor

from sparsebert.formats import Format, SemiStructured
from sparsebert.ops import semi_structured_linear
from sparsebert.ops.semi_structured_linear import stored_columns


class TestSemiStructuredLinear(LinearPromises):
    op = "semi_structured_linear"
    gradients = ("unstructured_linear",)
    transposed_count = 5
    shapes = ((7, 32), (1, 16), (19, 48), (270, 144))
    options = ((2, 4), (1, 4), (4, 8), (2, 2), (5, 16), (1, 1), (3, 4), (1, 2))

    def store(self, weight: Tensor, density: float, option: Any, generator: torch.Generator) -> Format:
        """At most n of m, at random; the fewer, the lower the density."""
        (rows, k), (n, m) = weight.shape, option
        rank = torch.rand(rows, k // m, m, generator=generator).argsort(-1).argsort(-1)
        kept = (rank < n).view(rows, k) & (torch.rand(rows, k, generator=generator) < 2 * density)
        return SemiStructured.from_dense(weight, kept, pattern=option)

    def call(self, stored: Format, x: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(stored, SemiStructured)
        return semi_structured_linear(x, values, stored.positions, bias, pattern=stored.pattern, **options)

    def is_torchs(self, i: int) -> bool:
        return i == 2


def test_by_hand() -> None:
    """[[0, 2, 0, 3], [4, 5, 0, 0]]: positions 1, 3 and 0, 1, two bits each from the lowest."""
    positions = torch.tensor([[0b1101], [0b0100]], dtype=torch.uint8)
    values = torch.tensor([[2.0, 3], [4, 5]])
    y = semi_structured_linear(torch.tensor([1.0, 10, 100, 1000]), values, positions, pattern=(2, 4))
    assert y.tolist() == [3020, 54]


@pytest.mark.parametrize(
    ("pattern", "bytes_", "columns"),
    [
        ((2, 4), [0b11_01_10_01, 0b00_00_10_00], [1, 2, 5, 7, 8, 10]),
        ((2, 8), [0x71, 0x54], [1, 7, 12, 13]),
        ((2, 256), [3, 255], [3, 255]),
    ],
)
def test_positions_are_packed_from_the_lowest_bits(
    pattern: tuple[int, int], bytes_: list[int], columns: list[int]
) -> None:
    packed = torch.tensor([bytes_], dtype=torch.uint8)
    assert stored_columns(packed, len(columns), *pattern).tolist() == [columns]


@pytest.mark.parametrize("pattern", [(0, 4), (5, 4), (2, 257)])
def test_a_pattern_that_cannot_be_is_refused(pattern: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"pattern: expected \(n, m\) with 1 <= n <= m <= 256, got"):
        semi_structured_linear(torch.zeros(4), torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.uint8), pattern=pattern)
