from __future__ import annotations

from typing import Any

import torch
from ops.linear_cases import pick_mask
from ops.linears import LinearPromises
from torch import Tensor

from sparsebert.formats import Format, TwoFour
from sparsebert.ops import two_four_linear


class TestTwoFourLinear(LinearPromises):
    op = "two_four_linear"
    transposed_count = 0
    shapes = ((7, 12), (1, 4), (16, 64), (33, 68), (130, 132))

    def store(self, weight: Tensor, density: float, option: Any, generator: torch.Generator) -> Format:
        return TwoFour.from_dense(weight, pick_mask((weight.shape[0], weight.shape[1]), density, generator))

    def call(self, stored: Format, x: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(stored, TwoFour) and not options.pop("transposed", ())
        return two_four_linear(x, values, stored.positions, stored.places, bias, shape=stored.shape, **options)


def test_by_hand() -> None:
    """[[0, 2, 3, 4]]: 2 and 3 at places 1 and 2 of the four, 4 beside them at column 3."""
    positions = torch.tensor([[0b1001]], dtype=torch.uint8)
    y = two_four_linear(
        torch.tensor([1.0, 10, 100, 1000]), torch.tensor([2.0, 3, 4]), positions, torch.tensor([3]), shape=(1, 4)
    )
    assert y.tolist() == [4320]
