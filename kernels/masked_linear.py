"""A linear layer under a mask, forward: one product with the masked weight that was made once per optimiser step.

No mask is looked at, so it is the dense product; cuBLAS's, unless dense_linear.py's table knows Triton's to be faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsebert.kernels import dense_linear as dense
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen

__all__ = ["cost", "masked_linear", "specimens"]


def masked_linear(
    x: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    scores: Tensor | None,
    bits: Tensor | None,
    bias: Tensor | None,
    grid: Sequence[int],
) -> Tensor:
    """See `sparsebert.ops.masked_linear`."""
    return dense.dense_linear(x, masked_weight, bias, "none")


def cost(m: int, n: int, k: int, item: int = 2, bias: bool = True) -> Cost:
    """What a call moves and computes: the dense layer's."""
    return dense.cost(m, n, k, item, bias)


def specimens() -> list[Specimen]:
    """None of its own: see dense_linear.py."""
    return []
