from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops import masked_embedding, masked_weight, select_mask
from sparsebert.ops._backend import OPS
from sparsebert.ops.bits import expand_grid


def layer(grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table of 10 rows of 6, its scores on `grid`, the bits of their larger half, and W·mask."""
    torch.manual_seed(0)
    weight = torch.randn(10, 6, requires_grad=True)
    scores = torch.randn(grid, requires_grad=True)
    (bits,) = select_mask([scores], scores.numel() // 2)
    return weight, scores, bits, masked_weight(weight, bits, grid, dtype=dtype)


@pytest.mark.parametrize("grid", [(10, 6), (5, 3), (10, 1), (1, 6), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_rows_and_gradients(grid: tuple[int, int], dtype: torch.dtype, padding_idx: int | None) -> None:
    weight, scores, bits, masked = layer(grid, dtype)
    ids = torch.tensor([[1, 3, 3, 9], [0, 1, 9, 3]])
    y = masked_embedding(ids, weight, masked, scores, bits, padding_idx)
    assert y.dtype == dtype and torch.equal(y, masked[ids])
    grad = torch.randn(y.shape).to(dtype)
    dweight, dscores = torch.autograd.grad(y, (weight, scores), grad)

    table = torch.zeros(10, 6, requires_grad=True)
    F.embedding(ids, table, padding_idx).backward(grad.float())
    product = table.grad
    assert product is not None
    kept = masked != 0
    torch.testing.assert_close(dweight, torch.where(kept, product, torch.zeros(())))
    blocks = (product * weight.detach()).view(grid[0], 10 // grid[0], grid[1], 6 // grid[1])
    torch.testing.assert_close(dscores, blocks.sum((1, 3)))


def test_one_gradient_alone_and_none() -> None:
    weight, scores, bits, masked = layer((10, 6))
    ids = torch.tensor([2, 2, 7], dtype=torch.int32)
    y = masked_embedding(ids, weight.detach(), masked, scores)
    (dscores,) = torch.autograd.grad(y.sum(), scores)
    torch.testing.assert_close(dscores[2], 2 * weight[2].detach())
    y = masked_embedding(ids, weight, masked, None, bits)
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(dweight[7], (masked[7] != 0).float())
    with torch.no_grad():
        assert not masked_embedding(ids, weight, masked, scores).requires_grad
    assert masked_embedding(ids[:0], weight, masked, scores, bits).shape == (0, 6)


def test_compiled_gradients_equal_eager_ones() -> None:
    weight, scores, bits, masked = layer((5, 3))
    ids = torch.tensor([[1, 3], [0, 1]])

    def rows(which: Tensor) -> Tensor:
        return masked_embedding(which, weight, masked, scores, bits, 3)

    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(rows(ids).square().sum(), (weight, scores)),
        torch.autograd.grad(compiled(ids).square().sum(), (weight, scores)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_in_float64_the_scores_gradient_is_that_of_a_soft_mask() -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 6, dtype=torch.float64)
    mask = (torch.rand(5, 3) < 0.5).double().requires_grad_()
    ids = torch.tensor([1, 1, 4])
    soft = F.embedding(ids, expand_grid(mask, weight.shape) * weight)
    scores = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    masked = (expand_grid(mask, weight.shape) * weight).detach()
    hard = masked_embedding(ids, weight, masked, scores)
    grad = torch.randn(3, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(soft, mask, grad)
    (actual,) = torch.autograd.grad(hard, scores, grad)
    torch.testing.assert_close(actual, expected)


def test_what_does_not_fit_is_named() -> None:
    weight, scores, bits, masked = layer((10, 6))
    ids = torch.tensor([1])
    with pytest.raises(ValueError, match=r"ids: expected int64 or int32 on cpu, got torch\.float32"):
        masked_embedding(ids.float(), weight, masked, scores, bits)
    with pytest.raises(ValueError, match="padding_idx: expected a row of 10, got 10"):
        masked_embedding(ids, weight, masked, scores, bits, padding_idx=10)
    with pytest.raises(ValueError, match="bits: needed where weight requires a gradient"):
        masked_embedding(ids, weight, masked, scores)
    with pytest.raises(IndexError):
        masked_embedding(torch.tensor([10]), weight, masked, scores, bits)


def test_opcheck() -> None:
    weight, scores, bits, masked = layer((5, 3))
    op = OPS["masked_embedding"].pick(torch.device("cpu"))
    torch.library.opcheck(op, (torch.tensor([[1, 2]]), weight, masked, scores, bits, -1, [5, 3]))
