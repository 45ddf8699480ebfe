"""Triton: dX of a layer over stored blocks; the forward's kernel, which reads every block turned where it lies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsebert.kernels import block_sparse_linear as forward
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen

__all__ = ["block_sparse_input_grad", "cost", "specimens"]


def block_sparse_input_grad(
    grad: Tensor, values: Tensor, permutation: Tensor, columns: Tensor, row_starts: Tensor, shape: Sequence[int]
) -> Tensor:
    """See `sparsebert.ops.block_sparse_linear`."""
    block = (values.shape[2], values.shape[1])
    return forward.product(grad, values, permutation, columns, row_starts, None, (shape[1], shape[0]), block, "none")


def cost(m: int, n: int, k: int, block: tuple[int, int], blocks: int, item: int = 2) -> Cost:
    """As the forward of W^T in blocks of C x R, and the permutation, 8 bytes a block."""
    return forward.cost(m, k, n, (block[1], block[0]), blocks, item, bias=False) + Cost(8 * blocks, 0, 0, 0)


def specimens() -> list[Specimen]:
    """The forward's, turned."""
    return forward.specimens(turned=True)
