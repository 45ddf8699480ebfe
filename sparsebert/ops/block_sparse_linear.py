"""A linear layer that stores its weight as dense blocks, and only those that are kept (BSR).

A weight `[N, K]` in blocks of R x C, R | N and C | K, stores `values` `[B, R, C]`, `columns` int32 `[B]`, each block's
block column, strictly ascending within a block row, and `row_starts` int32 `[N / R + 1]`, the first block of each block
row, and B. `sparsebert.formats.Blocks` makes and validates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import OPS, Op, forced_backend
from sparsebert.ops.masked_linear import full_precision

__all__ = ["block_sparse_input_grad_reference", "block_sparse_linear", "block_sparse_linear_reference"]


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    activation: str = "none",
    transposed: Sequence[Tensor] = (),
) -> Tensor:
    """`activation(x @ W^T + bias)` over the stored blocks of W alone.

    Products are summed in float32 (float64 for float64), bias and activation applied there, and the result rounded
    once. Where autograd records, the activation follows as torch's own op. Gradients: dX = dY · W, which needs
    `transposed`; dvalues = (dY^T X) in the stored blocks only; dbias = sum of dY. A block that is not stored has no
    effect at all: from the compiled kernels a NaN or infinity in x reaches only the outputs that store a block in its
    column; the reference multiplies by zeros too, so that it may reach all outputs of its row.

    Args:
        x: `[..., K]`, float32 or bfloat16 (float64 and float16 run on the reference).
        values: `[B, R, C]`, x's dtype; it may require a gradient.
        columns, row_starts: where the blocks lie (see the module), contiguous. Their content is taken on trust;
            `sparsebert.formats.Blocks.check` validates it.
        bias: `[N]` in x's dtype, or None.
        shape: `(N, K)`.
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".
        transposed: `[permutation, columns, row_starts]` of W^T in blocks of C x R, whose values are
            `values[permutation].transpose(1, 2)` (int64 `[B]`); needed where x requires a gradient.

    Returns:
        `[..., N]` in x's dtype. Under `torch.autocast` x, values and bias are cast first, as in nn.Linear.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named. TypeError: values that are no floats.
    """
    if _linear.is_autocast(values):
        options = {"shape": shape, "activation": activation, "transposed": transposed}
        return _linear.under_autocast(block_sparse_linear, x, values, columns, row_starts, bias=bias, **options)
    n, k = shape
    _linear.check_operands(x, values, bias, n, k)
    if values.dim() != 3:
        raise ValueError(f"values: expected [B, R, C], got {list(values.shape)}")
    blocks, r, c = values.shape
    check_structure(columns, row_starts, (n, k), (r, c), blocks, values.device)
    if transposed or x.requires_grad:
        _linear.check_transposed(x, transposed, 3)
    return _linear.run(_op, (n, k), x, values, (columns, row_starts), bias, ([n, k],), activation, list(transposed))


def block_sparse_linear_reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
    transposed: Sequence[Tensor],
) -> Tensor:
    """The definition: the blocks put where they belong in a matrix of zeros, and the dense layer."""
    (n, k), (r, c) = shape, values.shape[1:]
    grid = values.new_zeros(n // r, k // c, r, c)
    grid[block_rows(columns, row_starts), columns.long()] = values
    return _linear.linear_reference(x, grid.transpose(1, 2).reshape(n, k), bias, activation)


def block_sparse_input_grad_reference(
    grad: Tensor, values: Tensor, permutation: Tensor, columns: Tensor, row_starts: Tensor, shape: Sequence[int]
) -> Tensor:
    """dX = dY · W for dY `[..., N]` and a weight of `shape` (N, K) whose W^T has the structure given: `[..., K]`.

    The layer over W^T, from the blocks as they are stored for W.
    """
    turned = values[permutation].transpose(1, 2)
    return block_sparse_linear_reference(grad, turned, columns, row_starts, None, shape[::-1], "none", [])


def block_rows(columns: Tensor, row_starts: Tensor) -> Tensor:
    """The block row of every stored block, int64 `[B]`."""
    lengths = row_starts.long().diff()
    return torch.repeat_interleave(
        torch.arange(lengths.numel(), device=lengths.device), lengths, output_size=columns.numel()
    )


def check_structure(
    columns: Tensor,
    row_starts: Tensor,
    shape: tuple[int, int],
    block: tuple[int, int],
    blocks: int,
    device: torch.device,
) -> None:
    """Raise unless blocks of this size tile a weight of this shape and both index tensors fit it."""
    (n, k), (r, c) = shape, block
    if r < 1 or c < 1 or n % r or k % c:
        raise ValueError(f"block: expected R x C with R dividing {n} and C dividing {k}, got {r}x{c}")
    if (
        columns.numel() == blocks
        and row_starts.numel() == n // r + 1
        and columns.dtype == row_starts.dtype == torch.int32
        and columns.device == row_starts.device == device
        and columns.is_contiguous()
        and row_starts.is_contiguous()
    ):
        return
    _linear.check_index(
        device, columns=(columns, torch.int32, [blocks]), row_starts=(row_starts, torch.int32, [n // r + 1])
    )


def _fake(
    x: Tensor,
    values: Any,
    columns: Any,
    row_starts: Any,
    bias: Any,
    shape: Sequence[int],
    activation: str,
    transposed: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, row_starts, _, shape, activation, transposed = inputs
    _linear.check_recorded(activation)
    need_x, need_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_values else None, values if need_x else None, columns, row_starts, *transposed)
    ctx.shape, ctx.block, ctx.transposed = list(shape), list(values.shape[1:]), len(transposed)


def _grad_x(grad: Tensor, values: Tensor, transposed: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """dX = dY · W, by a kernel that reads the blocks where they lie or else by the layer over a copy of W^T."""
    permutation, *index = transposed
    if grad.device.type == "cuda" or forced_backend() == "triton":
        body = _input_grad_op.pick(grad.device, _linear.is_supported(grad.dtype, grad.device.type))
        return body(grad.contiguous(), values.contiguous(), permutation, *index, list(shape))
    turned = values[permutation].transpose(1, 2).contiguous()
    return block_sparse_linear(grad, turned, *index, shape=shape[::-1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, columns, row_starts, *transposed = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
    n, k = ctx.shape
    grad_x = grad_values = None
    with full_precision(grad.device.type):
        if need_x:
            grad_x = _grad_x(grad, values, transposed, (n, k))
        if need_values:
            # Looked up, not imported: that op's file imports this one.
            sddmm = OPS["block_sparse_sddmm"].pick(grad.device, _linear.is_supported(grad.dtype, grad.device.type))
            grad_values = sddmm(_linear.as_rows(grad), _linear.as_rows(x), columns, row_starts, ctx.block)
        grad_bias = _linear.bias_grad(grad) if need_bias else None
    return grad_x, grad_values, None, None, grad_bias, None, None, _linear.no_grads(ctx, 7, ctx.transposed)


def _fake_input_grad(
    grad: Tensor, values: Any, permutation: Any, columns: Any, row_starts: Any, shape: Sequence[int]
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


_op = Op("block_sparse_linear", block_sparse_linear_reference, _fake, backward=_backward, setup_context=_setup_context)
_input_grad_op = Op("block_sparse_input_grad", block_sparse_input_grad_reference, _fake_input_grad)
