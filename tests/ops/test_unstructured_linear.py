from __future__ import annotations

from typing import Any

import torch
from ops.linear_cases import pick_mask
from ops.linears import LinearPromises
from torch import Tensor

from sparsebert.formats import Format, Unstructured
from sparsebert.ops import unstructured_linear
from sparsebert.ops.unstructured_linear import PANEL, STRIP


class TestUnstructuredLinear(LinearPromises):
    op = "unstructured_linear"
    gradients = ("unstructured_sddmm",)
    transposed_count = 5
    shapes = (
        (9, 14),
        (1, 1),
        (17, 3),
        (1, PANEL + 1),
        (STRIP + 1, 1),
        (STRIP, PANEL),
        (STRIP + 5, 2 * PANEL + 3),
        (40, 2 * PANEL),
    )

    def store(self, weight: Tensor, density: float, option: Any, generator: torch.Generator) -> Format:
        return Unstructured.from_dense(weight, pick_mask((weight.shape[0], weight.shape[1]), density, generator))

    def call(self, stored: Format, x: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(stored, Unstructured)
        index = (stored.offsets, stored.rows, stored.counts, stored.starts)
        return unstructured_linear(x, values, *index, bias, shape=stored.shape, **options)


def test_by_hand() -> None:
    """[[0, 2, 0], [0, 0, 0], [3, 0, 5]]: the entry without a weight comes first, then that with one, then two."""
    values, offsets = torch.tensor([2.0, 3, 5]), torch.tensor([1, 0, 2], dtype=torch.uint8)
    rows, counts = torch.tensor([1, 0, 2], dtype=torch.uint8), torch.tensor([0, 1, 2], dtype=torch.uint8)
    starts = torch.tensor([0, 3])
    y = unstructured_linear(torch.tensor([1.0, 10, 100]), values, offsets, rows, counts, starts, shape=(3, 3))
    assert y.tolist() == [20, 0, 503]
