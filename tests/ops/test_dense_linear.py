from __future__ import annotations

from typing import Any

import torch
from ops.linears import LinearPromises
from torch import Tensor

from sparsebert.formats import Dense, Format
from sparsebert.ops import dense_linear


class TestDenseLinear(LinearPromises):
    op = "dense_linear"
    transposed_count = 0
    shapes = ((6, 8), (1, 1), (17, 3), (1, 40), (33, 65))

    def store(self, weight: Tensor, density: float, option: Any, generator: torch.Generator) -> Format:
        return Dense.from_dense(weight)

    def call(self, stored: Format, x: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        options.pop("transposed", None)
        return dense_linear(x, values, bias, **options)

    def is_torchs(self, i: int) -> bool:
        return i > 0
