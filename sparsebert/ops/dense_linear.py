"""A dense linear layer with its activation: what the sparse ones are measured against, and their fallback."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsebert import _load
from sparsebert.ops import _linear
from sparsebert.ops._backend import Op
from sparsebert.ops.masked_linear import full_precision

__all__ = ["dense_linear", "dense_linear_reference", "prefers_onednn"]


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """`activation(x @ weight^T + bias)`.

    Products are summed in float32 (float64 for float64), bias and activation applied there, and the result rounded
    once. Where autograd records, and on a GPU below 2048 rows or in float32, the activation follows as torch's own op,
    on y rounded to its dtype; gradients are torch's own products.

    Args:
        x: `[..., K]`, float32 or bfloat16 (float64 and float16 run on the reference).
        weight: `[N, K]`, x's dtype.
        bias: `[N]` in x's dtype, or None.
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".

    Returns:
        `[..., N]` in x's dtype. Under `torch.autocast` x, weight and bias are cast first, as in nn.Linear.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named. TypeError: a weight that is no float.
    """
    if _linear.is_autocast(weight):
        return _linear.under_autocast(dense_linear, x, weight, bias=bias, activation=activation)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [N, K], got {list(weight.shape)}")
    n, k = weight.shape
    _linear.check_operands(x, weight, bias, n, k, "weight")
    return _linear.run(_op, (n, k), x, weight, (), bias, (), activation)


def dense_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The definition."""
    return _linear.linear_reference(x, weight, bias, activation)


@functools.cache
def prefers_onednn() -> bool:
    """Whether torch's own fp32 products, MKL's, run at half of this CPU's speed where oneDNN's do not: on AMD."""
    host = _load.host()
    return torch.backends.mkldnn.is_available() and host is not None and host.cpu_vendor() == "AuthenticAMD"


def _fake(x: Tensor, weight: Tensor, bias: Any, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, activation = inputs
    _linear.check_recorded(activation)
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    with full_precision(grad.device.type):
        grad_x = grad @ weight if need_x else None
        grad_weight = _linear.as_rows(grad).t() @ _linear.as_rows(x) if need_weight else None
        grad_bias = _linear.bias_grad(grad) if need_bias else None
    return grad_x, grad_weight, grad_bias, None


_op = Op("dense_linear", dense_linear_reference, _fake, backward=_backward, setup_context=_setup_context)
