"""A feed-forward layer of two block-sparse weights, and how close to torch's own its result must come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ops.linear_cases import check_error, pick_mask
from torch import Tensor
from torch.nn import functional as F

from sparsebert.formats import Blocks
from sparsebert.ops import block_sparse_ffn
from sparsebert.ops._linear import activate


@dataclass
class FeedForward:
    """x, both weights and both biases."""

    x: Tensor
    up: Blocks
    up_bias: Tensor | None
    down: Blocks
    down_bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.down.shape[0], self.up.shape[0], self.up.shape[1]

    def layers(self) -> Any:
        """Both as `(values, columns, row_starts, bias)`."""
        return [
            (stored.values, stored.columns, stored.row_starts, bias)
            for stored, bias in ((self.up, self.up_bias), (self.down, self.down_bias))
        ]

    def call(self, activation: str = "gelu", x: Tensor | None = None, **options: Any) -> Tensor:
        up, down = self.layers()
        options = {"shape": self.shape, "activation": activation, **options}
        return block_sparse_ffn(self.x if x is None else x, *up, *down, **options)

    def by_torch(self, activation: str, dtype: torch.dtype, magnitudes: bool = False) -> Tensor:
        """The dense layers in `dtype`; with `magnitudes` of the absolute values, without an activation."""
        parts = [self.x, self.up.to_dense(), self.up_bias, self.down.to_dense(), self.down_bias]
        x, up, up_bias, down, down_bias = (None if part is None else part.to(dtype) for part in parts)
        assert x is not None and up is not None and down is not None
        if magnitudes:
            x, up, down = x.abs(), up.abs(), down.abs()
            up_bias, down_bias = (None if bias is None else bias.abs() for bias in (up_bias, down_bias))
            return F.linear(F.linear(x, up, up_bias), down, down_bias)
        return F.linear(activate(F.linear(x, up, up_bias), activation), down, down_bias)

    def check(self, y: Tensor, activation: str) -> None:
        """Assert that y is about as close to the exact result as torch's own, the intermediate's rounding allowed."""
        usual, exact = (self.by_torch(activation, dtype) for dtype in (self.x.dtype, torch.float64))
        scale = self.by_torch(activation, torch.float64, magnitudes=True)
        check_error(y, usual, exact, 2, scale)


def make(
    device: torch.device | str = "cpu",
    m: int = 5,
    blocks: tuple[tuple[int, int], tuple[int, int]] = ((16, 16), (16, 16)),
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bias: bool = True,
) -> FeedForward:
    """Of 48 or 64 inputs and outputs and 192 or so between."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (192, 64), (48 if 64 % blocks[1][0] else 64, 192)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    stored = []
    for (n, k), (r, c) in zip(sizes, blocks, strict=True):
        kept = pick_mask((n // r, k // c), density, generator).repeat_interleave(r, 0).repeat_interleave(c, 1)
        stored.append(Blocks.from_dense(normal(n, k) / 8, kept.to(device), block=(r, c)))
    biases = [normal(size[0]) if bias else None for size in sizes]
    return FeedForward(normal(m, 64), stored[0], biases[0], stored[1], biases[1])
