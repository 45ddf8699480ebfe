"""What the linear layers over stored weights share: activations, the checks of a call, autocast, and the two ways in.

Each of them computes `activation(x @ W^T + bias)` for x `[..., K]` and a weight `[N, K]` that is stored in its own way.
These functions run before every product, one row's too: they look at dtypes, shapes and devices and at nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.errors import unknown
from sparsebert.ops._backend import Op, below_autograd

__all__ = ["ACTIVATIONS", "activate", "linear_reference"]

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh")
COMPILED_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (*COMPILED_DTYPES, torch.float16)


def activate(y: Tensor, activation: str) -> Tensor:
    """`activation(y)` by torch's own op; "gelu" is erf's, "gelu_tanh" its approximation by tanh."""
    if activation == "none":
        return y
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "relu":
        return F.relu(y)
    if activation == "tanh":
        return torch.tanh(y)
    raise unknown("activation", activation, ACTIVATIONS)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The layer over a dense `weight`, in float32 at least and rounded once to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return activate(y, activation).to(x.dtype)


def weight_grad_reference(grad: Tensor, x: Tensor) -> Tensor:
    """The dense weight gradient dY^T X of `[M, N]` and `[M, K]`, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return grad.to(wide).t() @ x.to(wide)


def as_rows(tensor: Tensor) -> Tensor:
    """`[..., D]` as a contiguous `[M, D]`; the number of rows is counted, for it cannot be inferred where D is 0."""
    rows = 1
    for size in tensor.shape[:-1]:
        rows *= size
    return tensor.reshape(rows, tensor.shape[-1]).contiguous()


def bias_grad(grad: Tensor) -> Tensor:
    """The sum of dY `[..., N]` over its rows, `[N]` in its dtype."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return as_rows(grad).sum(0, dtype=wide).to(grad.dtype)


def is_autocast(values: Tensor) -> bool:
    """Whether autocast is on where `values` are."""
    kind = values.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """`tensor` as autocast casts it: float64 stays, as does what is no float or None."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def under_autocast(
    layer: Any, x: Tensor, values: Tensor, *index: Tensor, bias: Tensor | None, **options: Any
) -> Tensor:
    """Call `layer` again outside autocast, on operands in autocast's dtype, as nn.Linear does."""
    kind = values.device.type
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return layer(cast(x, dtype), cast(values, dtype), *index, cast(bias, dtype), **options)


def check_operands(x: Tensor, values: Tensor, bias: Tensor | None, n: int, k: int, name: str = "values") -> None:
    """Raise unless x is `[..., K]` and bias `[N]`, both with the dtype and device of `values` (called `name`)."""
    dtype, device = values.dtype, values.device
    if (
        x.dtype == dtype
        and x.device == device
        and x.dim() > 0
        and x.shape[-1] == k
        and dtype.is_floating_point
        and (bias is None or (bias.dtype == dtype and bias.device == device and bias.dim() == 1 and bias.shape[0] == n))
    ):
        return
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: expected a float tensor, got {dtype}")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x: expected [..., {k}] to fit the weight [{n}, {k}], got {list(x.shape)}")
    for other, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{other}: expected {dtype} like {name}, got {tensor.dtype}; cast one of the two")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{other}: expected on {device} like {name}, got {tensor.device}")
    raise ValueError(f"bias: expected [{n}], got {[] if bias is None else list(bias.shape)}")


def check_pair(grad: Tensor, x: Tensor) -> tuple[int, int]:
    """Raise unless dY is `[M, N]` and x `[M, K]` of one float dtype and device; returns `(N, K)`."""
    if grad.dim() != 2 or not grad.is_floating_point():
        raise ValueError(f"grad: expected float [M, N], got {grad.dtype} {list(grad.shape)}")
    if x.dim() != 2 or x.shape[0] != grad.shape[0] or x.dtype != grad.dtype or x.device != grad.device:
        raise ValueError(
            f"x: expected {grad.dtype} [{grad.shape[0]}, K] on {grad.device} like grad, got {x.dtype} {list(x.shape)} "
            f"on {x.device}"
        )
    return grad.shape[1], x.shape[1]


def check_index(device: torch.device, **wanted: tuple[Tensor, torch.dtype, Sequence[int]]) -> None:
    """Raise the ValueError that names the first index tensor without the dtype and shape beside it."""
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or list(tensor.shape) != list(shape):
            raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device} like the values, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def run(
    op: Op,
    shape: Sequence[int],
    x: Tensor,
    values: Tensor,
    index: tuple[Tensor, ...],
    bias: Tensor | None,
    constants: tuple[Any, ...],
    activation: str,
    *transposed: list[Tensor],
    supported: bool | None = None,
) -> Tensor:
    """Run a layer's op on checked operands: with its activation fused, or recorded by autograd and activated after.

    The op's inputs are `(x, values, *index, bias, *constants, activation, *transposed)`; `shape` is the weight's.
    `supported`: whether the compiled bodies take this dtype, where `is_supported` does not say it.
    """
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if not (shape[0] and shape[1]):
        # Without a row or column there is nothing stored, and no kernel is asked.
        return linear_reference(x, values.reshape(tuple(shape)), bias, activation)
    supported = is_supported(x.dtype, x.device.type) if supported is None else supported
    bias = None if bias is None else bias.contiguous()
    inputs = (x.contiguous(), values.contiguous(), *index, bias, *constants)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return activate(op.differentiable(x.device, supported)(*inputs, "none", *transposed), activation)
    # What W^T needs is left out: the compiled body need not look at it.
    inputs = (*inputs, activation, []) if transposed else (*inputs, activation)
    body = op.pick(x.device, supported)
    if torch.compiler.is_compiling():
        return body(*inputs)
    # Past the registered formula, which takes some 10 µs to find that no gradient is wanted.
    with below_autograd():
        return body(*inputs)


def is_supported(dtype: torch.dtype, device_type: str = "cpu") -> bool:
    """Whether the compiled bodies for such a device take this dtype."""
    return dtype in (GPU_DTYPES if device_type == "cuda" else COMPILED_DTYPES)


def check_transposed(x: Tensor, transposed: Sequence[Tensor], count: int) -> None:
    """Raise unless what W^T needs, `count` tensors, is there where x requires a gradient."""
    if len(transposed) == count or (not transposed and not (x.requires_grad and torch.is_grad_enabled())):
        return
    raise ValueError(
        f"transposed: expected the {count} tensors of the format's transposed() where x requires a gradient, got "
        f"{len(transposed)}; give them, detach x, or call it under torch.no_grad()"
    )


def check_recorded(activation: str) -> None:
    """Raise where an op that fuses an activation is recorded: its formula is that of the product alone."""
    if activation != "none":
        raise ValueError(f"activation: expected 'none' where a gradient is recorded, got {activation!r}")


def no_grads(ctx: Any, position: int, count: int) -> Any:
    """The gradient of the list of `count` tensors at `position` among an op's inputs: none.

    torch.library wants it in the list's own structure, an autograd.Function as None.
    """
    return [None] * count if isinstance(ctx.needs_input_grad[position], list) else None
