"""A linear layer over any weight, stored as 2:4 and a residue: what Hopper's sparse matrix units can take of it whole.

A weight `[N, K]`, 4 | K, stores two weights of every four as `semi_structured_linear` does, with `positions` uint8
`[N, ceil(K / 8)]`, and what else is kept at `places`, int64 `[r]`, strictly ascending: row * K + column, none of them a
position of the first part. `values` `[N * K / 2 + r]` has the one row after row, then the other.
`sparsebert.formats.TwoFour` makes and validates it.

On a GPU the weight is packed once and kept, as for `semi_structured_linear`; what is said there of changes of the
weight and of CUDA graphs holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import Op
from sparsebert.ops.masked_linear import full_precision
from sparsebert.ops.semi_structured_linear import stored_columns

__all__ = ["dense_weight", "two_four_linear", "two_four_linear_reference"]


def two_four_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    places: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """`activation(x @ W^T + bias)` over 2:4 and a residue.

    On an H100 or H200, in bf16 or fp16 with N and K multiples of 8, either our kernel (`semi_structured_packed_linear`)
    or the dense product over the weight made anew, whichever is measured to be faster when a shape is first called;
    elsewhere the latter. Products are summed in float32 (float64 for float64), bias and activation applied there, and
    the result rounded once. Where autograd records, the activation follows as torch's own op. Gradients, over the dense
    weight: dX = dY · W; dvalues = (dY^T X) at the stored places, zeros that fill groups up included; dbias = sum of dY.
    A weight that is not stored is multiplied as 0: a NaN or infinity in x may reach all outputs of its row.

    Args:
        x: `[..., K]`, float.
        values: `[N * K / 2 + r]`, x's dtype; it may require a gradient.
        positions, places: where they lie (see the module), contiguous. Their content is taken on trust;
            `sparsebert.formats.TwoFour.check` validates it.
        bias: `[N]` in x's dtype, or None.
        shape: `(N, K)`.
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".

    Returns:
        `[..., N]` in x's dtype. Under `torch.autocast` x, values and bias are cast first, as in nn.Linear.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named. TypeError: values that are no floats.
    """
    if _linear.is_autocast(values):
        options = {"shape": shape, "activation": activation}
        return _linear.under_autocast(two_four_linear, x, values, positions, places, bias=bias, **options)
    n, k = shape
    _linear.check_operands(x, values, bias, n, k)
    rest = values.numel() - n * k // 2
    if values.dim() != 1 or rest < 0 or k % 4:
        raise ValueError(f"values: expected [N * K / 2 + r] with 4 | K for [{n}, {k}], got {list(values.shape)}")
    _linear.check_index(
        values.device, positions=(positions, torch.uint8, [n, (k // 4 + 1) // 2]), places=(places, torch.int64, [rest])
    )
    return _linear.run(_op, (n, k), x, values, (positions, places), bias, ([n, k],), activation, [])


def two_four_linear_reference(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    places: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
    transposed: Sequence[Tensor],
) -> Tensor:
    """The definition: the stored weights put where they belong in a matrix of zeros, and the dense layer."""
    return _linear.linear_reference(x, dense_weight(values, positions, places, shape), bias, activation)


def dense_weight(values: Tensor, positions: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight `[N, K]`, 0 where nothing is stored; differentiable in `values`."""
    n, k = shape
    return values.new_zeros(n * k).scatter(0, stored_places(positions, places, shape), values).view(n, k)


def stored_places(positions: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    """Where in the weight each of `values` lies, int64 `[nnz]`: row * K + column."""
    n, k = shape
    row = torch.arange(n, device=positions.device)[:, None] * k
    return torch.cat(((stored_columns(positions, k // 2, 2, 4) + row).flatten(), places))


def _fake(
    x: Tensor, values: Tensor, positions: Any, places: Any, bias: Any, shape: Any, activation: str, transposed: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, positions, places, _, shape, activation, _ = inputs
    _linear.check_recorded(activation)
    need_x, need_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_values else None, values if need_x else None, positions, places)
    ctx.shape = list(shape)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, positions, places = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
    grad_x = grad_values = None
    with full_precision(grad.device.type):
        if need_x:
            grad_x = grad @ dense_weight(values, positions, places, ctx.shape)
        if need_values:
            product = _linear.as_rows(grad).t() @ _linear.as_rows(x)
            grad_values = product.flatten()[stored_places(positions, places, ctx.shape)]
        grad_bias = _linear.bias_grad(grad) if need_bias else None
    return grad_x, grad_values, None, None, grad_bias, None, None, _linear.no_grads(ctx, 7, 0)


_op = Op("two_four_linear", two_four_linear_reference, _fake, backward=_backward, setup_context=_setup_context)
