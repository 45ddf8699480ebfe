"""Sparse layers and their dense twins, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.nn import SparseLinear

FORMATS = ("unstructured", "blocks:4x2", "semi_structured:2:4", "compact", "dense", "bitmap", "two_four")


def mask_for(spelling: str, n: int, k: int, seed: int = 0) -> Tensor:
    """A mask that the format holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    if spelling == "blocks:4x2":
        return (torch.rand(n // 4, k // 2, generator=generator) > 0.6).repeat_interleave(4, 0).repeat_interleave(2, 1)
    if spelling == "semi_structured:2:4":
        order = torch.rand(n, k // 4, 4, generator=generator).argsort(2)
        return (order < 2).view(n, k)
    if spelling == "two_four":
        order = torch.rand(n, k // 4, 4, generator=generator).argsort(2).view(n, k)
        return (order < 2) | (torch.rand(n, k, generator=generator) > 0.7)
    if spelling == "compact":
        rows, columns = (torch.rand(size, generator=generator) > 0.4 for size in (n, k))
        return rows[:, None] & columns
    return torch.rand(n, k, generator=generator) > (0.8 if spelling in ("unstructured", "bitmap") else -1)


def linear_of(n: int, k: int, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def pair(
    spelling: str, n: int = 24, k: int = 16, *, bias: bool = True, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[SparseLinear, nn.Linear, Tensor]:
    """A sparse layer, the dense one with zeros in place, and the mask."""
    linear, mask = linear_of(n, k, bias, dtype), mask_for(spelling, n, k)
    sparse = SparseLinear.from_linear(linear, mask, format=spelling, **options)
    with torch.no_grad():
        linear.weight.mul_(mask)
    return sparse, linear, mask


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
