"""LayerNorm of a sum of two: what follows every sub-layer of a BERT, in one pass over the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops._losses import served

__all__ = ["add_layer_norm", "add_layer_norm_reference"]

WIDEST = 8192
"""The longest rows, in entries, that the GPU's kernel takes; longer ones go to the reference there."""


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Tensor:
    """`LayerNorm(x + residual)` over the last dimension (Ba et al., 2016).

    The sum, its mean and its variance are kept in float32 (float64 for float64) and rounded once, at the end.

    Args:
        x: `[..., H]`, float32 or bfloat16 in the compiled kernels, on a GPU float16 too, with H up to 8192 there; any
            float dtype and width on the reference.
        residual: like `x`. Where the two dtypes differ, as under autocast, both are taken to the wider one.
        weight, bias: `[H]`, float; taken to the dtype of the sum.
        eps: added to the variance.

    Returns:
        `[..., H]` in the dtype of the sum.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named.
    """
    _check(x, residual, weight, bias)
    dtype = x.dtype
    if residual.dtype != dtype:
        dtype = torch.promote_types(dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if weight.dtype != dtype or bias.dtype != dtype:
        weight, bias = weight.to(dtype), bias.to(dtype)
    body = _op.differentiable(x.device, _is_supported(x))
    return body(x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous(), eps)


def add_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + residual.to(wide)
    centred = total - total.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * scale * weight.to(wide) + bias.to(wide)).to(x.dtype)


def _is_supported(x: Tensor) -> bool:
    """Whether the compiled bodies for where x is take it; a plain bool also where torch.compile traces a width."""
    if x.device.type == "cuda" and x.shape[-1] > WIDEST:
        return False
    return served(x)


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() != 1 or weight.shape[0] == 0 or bias.shape != weight.shape:
        raise ValueError(f"weight, bias: expected both [H], got {list(weight.shape)} and {list(bias.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x: expected [..., {weight.shape[0]}] to fit weight, got {list(x.shape)}")
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected {list(x.shape)} like x, got {list(residual.shape)}")
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a float dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} like x, got {tensor.device}")


def _fake(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, weight, _, eps = inputs
    ctx.save_for_backward(x, residual, weight)
    ctx.eps = eps


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, weight = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
    wide = torch.promote_types(x.dtype, torch.float32)
    total, grad, dtype = x.to(wide) + residual.to(wide), grad.to(wide), x.dtype
    centred = total - total.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
    unit = centred * scale
    rows = list(range(grad.dim() - 1))
    grad_sum = None
    if need_x or need_residual:
        inner = grad * weight.to(wide)
        inner = inner - inner.mean(-1, keepdim=True) - unit * (inner * unit).mean(-1, keepdim=True)
        grad_sum = (inner * scale).to(dtype)
    grad_weight = (grad * unit).sum(rows).to(dtype) if need_weight else None
    grad_bias = grad.sum(rows).to(dtype) if need_bias else None
    return grad_sum if need_x else None, grad_sum if need_residual else None, grad_weight, grad_bias, None


_op = Op("add_layer_norm", add_layer_norm_reference, _fake, backward=_backward, setup_context=_setup_context)
