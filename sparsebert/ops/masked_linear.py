"""A linear layer under a mask being learned: one product forward, straight-through gradients to scores and weight."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops._backend import Op
from sparsebert.ops.bits import check_bits, check_grid
from sparsebert.ops.masked_weight import COMPUTE_DTYPES
from sparsebert.ops.split_weight_grad import fake_split, split_weight_grad_reference

__all__ = ["masked_linear", "masked_linear_backward_reference", "masked_linear_reference"]

# Without gradients and below so many rows the call itself costs more than the op can win.
FEW_ROWS = 16


def masked_linear(
    x: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    scores: Tensor | None = None,
    bits: Tensor | None = None,
    bias: Tensor | None = None,
    grid: Sequence[int] | None = None,
) -> Tensor:
    """`x @ masked_weight.T + bias`, with gradients for the mask's scores and for the weight under it.

    `masked_weight` is the cached product W·mask, made once per optimiser step (`select_mask`, `masked_weight`); it is a
    constant for autograd. Its dtype is the dtype computed in, under `torch.autocast` too. Gradients, each only where
    needed, with P = dY^T X: dX = dY · masked_weight; dscores = P∘weight summed over each block, the straight-through
    gradient with respect to the mask (Bengio et al., 2013; Sanh et al., 2020); dweight = P∘mask, exactly zero where
    pruned whatever P is; dbias = sum of dY.

    Args:
        x: `[..., K]`, any float dtype.
        weight: `[N, K]`, the unmasked weight (read in the backward only).
        masked_weight: `[N, K]`, float32, bfloat16 or float16 (float64 runs on the reference).
        scores: `[GN, GK]`, a grid on the weight; only its gradient is of interest, not its values.
        bits: uint8 `[ceil(GN * GK / 8)]`, 1 = kept; needed where `weight` requires a gradient.
        bias: `[N]` or None.
        grid: `(GN, GK)` where there are no scores; else theirs. None and no scores: one bit to a weight.

    Returns:
        `[..., N]` in `masked_weight`'s dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named.
    """
    cells = _check(x, weight, masked_weight, scores, bits, bias, grid)
    with full_precision(x.device.type):
        x = x.to(masked_weight.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, scores, bias))
        if not training and x.numel() < FEW_ROWS * x.shape[-1]:
            return F.linear(x, masked_weight.detach(), bias)
        if training and weight.requires_grad and bits is None:
            raise ValueError("bits: needed where weight requires a gradient; give the mask's bits or freeze the weight")
        body = _forward.differentiable(x.device, is_supported(weight, masked_weight))
        return body(x, weight, masked_weight.detach(), scores, bits, bias, cells)


def masked_linear_reference(
    x: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    scores: Tensor | None,
    bits: Tensor | None,
    bias: Tensor | None,
    grid: Sequence[int],
) -> Tensor:
    """The definition of the forward; `masked_linear_backward_reference` is that of the backward."""
    return F.linear(x, masked_weight, bias)


def masked_linear_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    bits: Tensor | None,
    grid: Sequence[int],
    need_x: bool,
    need_scores: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of the backward: `(dX like x, dscores, dweight)`, `[0]` for one not needed."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = (rows @ masked_weight).reshape(x.shape) if need_x else x.new_empty(0)
    if not (need_scores or need_weight):
        return grad_x, *split_weight_grad_reference(masked_weight, weight, bits, grid, False, False)
    product = rows.t() @ x.reshape(-1, x.shape[-1])
    return grad_x, *split_weight_grad_reference(product, weight, bits, grid, need_scores, need_weight)


def full_precision(device_type: str) -> Any:
    """A context in which autocast does not touch the dtypes chosen here."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def is_supported(weight: Tensor, masked_weight: Tensor) -> bool:
    """Whether the compiled bodies take these dtypes and this memory."""
    return (
        weight.dtype in COMPUTE_DTYPES
        and masked_weight.dtype in COMPUTE_DTYPES
        and weight.is_contiguous()
        and masked_weight.is_contiguous()
        and weight.numel() > 0
    )


def check_masked(
    weight: Tensor,
    masked_weight: Tensor,
    scores: Tensor | None,
    bits: Tensor | None,
    grid: Sequence[int] | None,
) -> list[int]:
    """Check what a masked layer is made of; returns the grid `[GN, GK]`."""
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [N, K], got {list(weight.shape)}")
    if masked_weight.shape != weight.shape or not masked_weight.is_floating_point():
        raise ValueError(
            f"masked_weight: expected float {list(weight.shape)} like weight, got {masked_weight.dtype} "
            f"{list(masked_weight.shape)}"
        )
    cells = list(scores.shape) if scores is not None else list(grid if grid is not None else weight.shape)
    if grid is not None and list(grid) != cells:
        raise ValueError(f"grid: expected {cells} like scores, got {list(grid)}; leave it out where scores are given")
    check_grid(weight.shape, cells, "scores" if scores is not None else "grid")
    if bits is not None:
        check_bits(bits, cells[0] * cells[1])
    for name, tensor in (("masked_weight", masked_weight), ("scores", scores), ("bits", bits)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} like weight, got {tensor.device}")
    return cells


def _check(
    x: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    scores: Tensor | None,
    bits: Tensor | None,
    bias: Tensor | None,
    grid: Sequence[int] | None,
) -> list[int]:
    cells = check_masked(weight, masked_weight, scores, bits, grid)
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected float [..., {weight.shape[1]}] to fit weight, got {x.dtype} {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x: expected on {weight.device} like weight, got {x.device}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(
            f"bias: expected [{weight.shape[0]}] on {weight.device}, got {list(bias.shape)} on {bias.device}"
        )
    return cells


def _fake_forward(
    x: Tensor, weight: Tensor, masked_weight: Tensor, scores: Any, bits: Any, bias: Any, grid: Sequence[int]
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    bits: Any,
    grid: Sequence[int],
    need_x: bool,
    need_scores: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(tuple(x.shape) if need_x else (0,))
    return grad_x, *fake_split(weight, grid, need_scores, need_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, masked_weight, scores, bits, bias, grid = inputs
    # x is as large as all else together in a long batch, and dX does not need it.
    _, need_weight, _, need_scores = ctx.needs_input_grad[:4]
    ctx.save_for_backward(x if need_weight or need_scores else None, weight, masked_weight, bits)
    ctx.x_shape, ctx.grid = x.shape, list(grid)
    ctx.scores_dtype = None if scores is None else scores.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, masked_weight, bits = ctx.saved_tensors
    need_x, need_weight, _, need_scores, _, need_bias, _ = ctx.needs_input_grad
    with full_precision(grad.device.type):
        body = _backward_op.pick(grad.device, is_supported(weight, masked_weight))
        grad = grad.to(masked_weight.dtype)
        if x is None:
            x = masked_weight.new_empty(()).expand(ctx.x_shape)  # only its shape is read
        grad_x, grad_scores, grad_weight = body(
            grad, x, weight, masked_weight, bits, ctx.grid, need_x, need_scores, need_weight
        )
        grad_bias = None
        if need_bias:
            wide = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        None,
        grad_scores.to(ctx.scores_dtype) if need_scores else None,
        None,
        grad_bias,
        None,
    )


_forward = Op("masked_linear", masked_linear_reference, _fake_forward, backward=_backward, setup_context=_setup_context)
_backward_op = Op("masked_linear_backward", masked_linear_backward_reference, _fake_backward)
