"""One small weight in each format, for the tests of what all formats promise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsebert.formats import Bitmap, Blocks, Compact, Dense, Format, SemiStructured, TwoFour, Unstructured
from sparsebert.ops.unstructured_linear import PANEL, STRIP

SHAPES = {
    "unstructured": [(9, 14), (1, 1), (STRIP + 3, PANEL + 5), (STRIP, PANEL), (3, 2 * PANEL + 1), (0, 5), (5, 0)],
    "bitmap": [(9, 14), (1, 1), (16, 64), (17, 65), (40, 130), (0, 5), (5, 0)],
    "two_four": [(5, 12), (1, 4), (33, 132), (0, 8), (3, 0)],
    "blocks": [(12, 8), (4, 2), (40, 130), (0, 4), (8, 0)],
    "semi_structured": [(5, 12), (1, 4), (33, 132), (0, 8), (3, 0)],
    "compact": [(9, 14), (1, 1), (40, 3), (0, 5), (5, 0)],
    "dense": [(9, 14), (1, 1), (0, 5), (5, 0)],
}


def numbered(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """1, 2, 3, ...: every weight tells where it came from."""
    return torch.arange(1, shape[0] * shape[1] + 1, dtype=dtype).view(shape)


def mask_for(name: str, shape: tuple[int, int], density: float, seed: int) -> Tensor:
    """A random mask that the format `name` can hold."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    if name == "semi_structured":
        rank = torch.rand(shape[0], shape[1] // 4, 4, generator=generator).argsort(-1).argsort(-1)
        kept &= (rank < 2).view(shape)
    elif name == "compact" and kept.numel():
        kept &= (torch.rand(shape[0], 1, generator=generator) < 0.6) & (torch.rand(shape[1], generator=generator) < 0.6)
    return kept


MAKERS: dict[str, Callable[..., Format]] = {
    "unstructured": Unstructured.from_dense,
    "bitmap": Bitmap.from_dense,
    "two_four": TwoFour.from_dense,
    "blocks": lambda weight, mask=None: Blocks.from_dense(weight, mask, block=(4, 2)),
    "semi_structured": lambda weight, mask=None: SemiStructured.from_dense(weight, mask, pattern=(2, 4)),
    "compact": Compact.from_dense,
    "dense": Dense.from_dense,
}


def same(one: Format, other: Format) -> bool:
    """Whether two formats agree in every field, to the bit."""
    return (
        type(one) is type(other)
        and (one.shape, one.options) == (other.shape, other.options)
        and all(
            a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True)
        )
    )
