"""A linear layer that stores n of every m consecutive weights of a row, 2:4 for one.

A weight `[N, K]`, m | K, stores `values` `[N, K / m * n]` and for each its position within its group of m, `b` bits of
it: 2 where m <= 4, 4 where m <= 16, 8 where m <= 256. A row's positions follow one another in uint8
`[ceil(K / m * n * b / 8)]`, least significant bits first; within a group they strictly ascend, and bits past the last
are 0. A group with fewer than n weights is filled up with zeros. `sparsebert.formats.SemiStructured` makes and
validates it.

For many rows on a GPU the weight is packed once for cuSPARSELt and kept until torch counts a change of `values` or
`positions`. It does not count what is written through `.data`, or through memory shared in another way: write in
place under `torch.no_grad()` instead. A captured CUDA graph runs on the weight as it was last packed: after a
change call the layer once outside the graph. There the activation is torch's own, on y rounded to its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import Op
from sparsebert.ops.masked_linear import full_precision
from sparsebert.ops.unstructured_linear import unstructured_linear

__all__ = ["MAX_M", "position_bits", "semi_structured_linear", "semi_structured_linear_reference"]

MAX_M = 256


def semi_structured_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: Sequence[int],
    activation: str = "none",
    transposed: Sequence[Tensor] = (),
) -> Tensor:
    """`activation(x @ W^T + bias)` over the stored weights of W alone.

    Products are summed in float32 (float64 for float64), bias and activation applied there, and the result rounded
    once. Where autograd records, the activation follows as torch's own op. Gradients: dX = dY · W, which needs
    `transposed`; dvalues = (dY^T X) at the stored places, the zeros that fill groups up included; dbias = sum of dY.
    A weight that is not stored has no effect at all: from the compiled kernels a NaN or infinity in x reaches only the
    outputs that store a weight, or a zero that fills a group up, in its column; the reference multiplies by zeros too,
    so that it may reach all outputs of its row.

    For many rows on a GPU the weight is kept packed: see the module for what that sees of changes.

    Args:
        x: `[..., K]`, float32 or bfloat16 (float64 and float16 run on the reference).
        values: `[N, K / m * n]`, x's dtype; it may require a gradient.
        positions: uint8 `[N, ceil(K / m * n * b / 8)]`, contiguous (see the module). Their content is taken on trust;
            `sparsebert.formats.SemiStructured.check` validates it.
        bias: `[N]` in x's dtype, or None.
        pattern: `(n, m)`.
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".
        transposed: `[permutation, offsets, rows, counts, starts]` of W^T as in `unstructured_linear`, its values being
            `values.flatten()[permutation]`; needed where x requires a gradient.

    Returns:
        `[..., N]` in x's dtype. Under `torch.autocast` x, values and bias are cast first, as in nn.Linear.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named. TypeError: values that are no floats.
    """
    if _linear.is_autocast(values):
        options = {"pattern": pattern, "activation": activation, "transposed": transposed}
        return _linear.under_autocast(semi_structured_linear, x, values, positions, bias=bias, **options)
    n, m = pattern
    if not 1 <= n <= m <= MAX_M:
        raise ValueError(f"pattern: expected (n, m) with 1 <= n <= m <= {MAX_M}, got ({n}, {m})")
    if values.dim() != 2 or values.shape[1] % n:
        raise ValueError(f"values: expected [N, K / {m} * {n}], got {list(values.shape)}")
    rows, stored = values.shape
    k = stored // n * m
    _linear.check_operands(x, values, bias, rows, k)
    packed = (stored * position_bits(m) + 7) // 8
    if (
        positions.dtype != torch.uint8
        or positions.shape != (rows, packed)
        or positions.device != values.device
        or not positions.is_contiguous()
    ):
        _linear.check_index(values.device, positions=(positions, torch.uint8, [rows, packed]))
    if transposed or x.requires_grad:
        _linear.check_transposed(x, transposed, 5)
    return _linear.run(_op, (rows, k), x, values, (positions,), bias, ([n, m],), activation, list(transposed))


def semi_structured_linear_reference(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    pattern: Sequence[int],
    activation: str,
    transposed: Sequence[Tensor],
) -> Tensor:
    """The definition: the stored weights put where they belong in a matrix of zeros, and the dense layer."""
    return _linear.linear_reference(x, _dense(values, positions, pattern), bias, activation)


def _dense(values: Tensor, positions: Tensor, pattern: Sequence[int]) -> Tensor:
    """The weight `[N, K]` with its zeros."""
    n, m = pattern
    weight = values.new_zeros(values.shape[0], values.shape[1] // n * m)
    return weight.scatter_(1, stored_columns(positions, values.shape[1], n, m), values)


def position_bits(m: int) -> int:
    """Bits that store one position within a group of m."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def stored_columns(positions: Tensor, stored: int, n: int, m: int) -> Tensor:
    """The column of every stored weight, int64 `[N, stored]`, from the packed positions."""
    bits = position_bits(m)
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=positions.device)
    unpacked = (positions[:, :, None] >> places) & ((1 << bits) - 1)
    group = torch.arange(stored, device=positions.device) // n
    return unpacked.flatten(1)[:, :stored] + group * m


def _fake(
    x: Tensor, values: Tensor, positions: Any, bias: Any, pattern: Any, activation: str, transposed: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, positions, _, pattern, activation, transposed = inputs
    _linear.check_recorded(activation)
    need_x, need_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_values else None, values if need_x else None, positions, *transposed)
    ctx.k, ctx.stored = x.shape[-1], values.shape[1]
    ctx.pattern, ctx.transposed = list(pattern), len(transposed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, positions, *transposed = ctx.saved_tensors
    need_x, need_values, _, need_bias = ctx.needs_input_grad[:4]
    grad_x = grad_values = None
    with full_precision(grad.device.type):
        if need_x:
            permutation, *index = transposed
            grad_x = (
                grad @ _dense(values, positions, ctx.pattern)
                if _prefers_dense(grad)
                else unstructured_linear(grad, values.flatten()[permutation], *index, shape=(ctx.k, grad.shape[-1]))
            )
        if need_values:
            # At n of m there is little to skip: the dense product, read at the stored places.
            product = _linear.as_rows(grad).t() @ _linear.as_rows(x)
            grad_values = product.gather(1, stored_columns(positions, ctx.stored, *ctx.pattern))
        grad_bias = _linear.bias_grad(grad) if need_bias else None
    return grad_x, grad_values, None, grad_bias, None, None, _linear.no_grads(ctx, 6, ctx.transposed)


def _prefers_dense(grad: Tensor) -> bool:
    """Whether dX is best taken over the dense weight, made anew: on a GPU, which has no kernel for its transpose."""
    return grad.is_cuda


_op = Op(
    "semi_structured_linear",
    semi_structured_linear_reference,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
