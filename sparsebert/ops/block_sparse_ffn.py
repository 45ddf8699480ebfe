"""A feed-forward layer of two block-sparse weights, its intermediate kept out of device memory where that pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.errors import unknown
from sparsebert.ops import _linear
from sparsebert.ops._backend import Op, below_autograd, constant_result, forced_backend
from sparsebert.ops.block_sparse_linear import block_sparse_linear, block_sparse_linear_reference, check_structure

__all__ = ["block_sparse_ffn", "block_sparse_ffn_reference"]


def block_sparse_ffn(
    x: Tensor,
    up_values: Tensor,
    up_columns: Tensor,
    up_row_starts: Tensor,
    up_bias: Tensor | None,
    down_values: Tensor,
    down_columns: Tensor,
    down_row_starts: Tensor,
    down_bias: Tensor | None,
    *,
    shape: Sequence[int],
    activation: str = "gelu",
    up_transposed: Sequence[Tensor] = (),
    down_transposed: Sequence[Tensor] = (),
) -> Tensor:
    """`activation(x @ U^T + up_bias) @ D^T + down_bias` over the stored blocks of U `[I, K]` and D `[N, I]`.

    Two calls of `block_sparse_linear`, the intermediate rounded to x's dtype between them. On a GPU, where no gradient
    is recorded, it goes through a buffer that stays in the second-level cache, and launches are shared; where one is,
    and on a CPU, it is those two calls.

    Args:
        x: `[..., K]`, float32 or bfloat16 (float64 and float16 run on the reference).
        up_values, up_columns, up_row_starts: the blocks of U, as in `block_sparse_linear`.
        up_bias: `[I]` in x's dtype, or None.
        down_values, down_columns, down_row_starts: the blocks of D; they may be of another size.
        down_bias: `[N]` in x's dtype, or None.
        shape: `(N, I, K)`.
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".
        up_transposed, down_transposed: as `transposed` of `block_sparse_linear`; up's is needed where x requires a
            gradient, down's where anything before D does.

    Returns:
        `[..., N]` in x's dtype. Under `torch.autocast` the float tensors are cast first, as in nn.Linear.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named. TypeError: values that are no floats.
    """
    up, down = (up_values, up_columns, up_row_starts, up_bias), (down_values, down_columns, down_row_starts, down_bias)
    if _linear.is_autocast(up_values):
        kind = up_values.device.type
        dtype = torch.get_autocast_dtype(kind)
        x, up, down = _linear.cast(x, dtype), _cast(up, dtype), _cast(down, dtype)
        with torch.autocast(kind, enabled=False):
            return _checked(x, up, down, shape, activation, up_transposed, down_transposed)
    return _checked(x, up, down, shape, activation, up_transposed, down_transposed)


def block_sparse_ffn_reference(
    x: Tensor,
    up_values: Tensor,
    up_columns: Tensor,
    up_row_starts: Tensor,
    up_bias: Tensor | None,
    down_values: Tensor,
    down_columns: Tensor,
    down_row_starts: Tensor,
    down_bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
) -> Tensor:
    """The definition: one layer after the other."""
    n, inner, k = shape
    up, down = (up_values, up_columns, up_row_starts, up_bias), (down_values, down_columns, down_row_starts, down_bias)
    hidden = block_sparse_linear_reference(x, *up, (inner, k), activation, [])
    return block_sparse_linear_reference(hidden, *down, (n, inner), "none", [])


_Layer = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


def _cast(layer: _Layer, dtype: torch.dtype) -> _Layer:
    values, columns, row_starts, bias = layer
    return _linear.cast(values, dtype), columns, row_starts, _linear.cast(bias, dtype)


def _checked(
    x: Tensor,
    up: _Layer,
    down: _Layer,
    shape: Sequence[int],
    activation: str,
    up_transposed: Sequence[Tensor],
    down_transposed: Sequence[Tensor],
) -> Tensor:
    """The op on operands that it checks, or the two layers."""
    if len(shape) != 3:
        raise ValueError(f"shape: expected (N, I, K), got {list(shape)}")
    n, inner, k = shape
    if activation not in _linear.ACTIVATIONS:
        raise unknown("activation", activation, _linear.ACTIVATIONS)
    floats = [x, up[0], up[3], down[0], down[3]]
    recorded = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in floats)
    if recorded or not (n and inner and k) or _two_calls(x.device.type):
        hidden = block_sparse_linear(x, *up, shape=(inner, k), activation=activation, transposed=up_transposed)
        return block_sparse_linear(hidden, *down, shape=(n, inner), transposed=down_transposed)
    _check("up", x, up, (inner, k))
    # What comes from the first layer stands for its result: of its width, dtype and device.
    _check("down", x.new_empty((0, inner)), down, (n, inner))
    body = _op.pick(x.device, _linear.is_supported(x.dtype, x.device.type))
    inputs = (x.contiguous(), *_contiguous(up), *_contiguous(down), list(shape), activation)
    if torch.compiler.is_compiling():
        return body(*inputs)
    with below_autograd():
        return body(*inputs)


def _check(name: str, x: Tensor, layer: _Layer, shape: tuple[int, int]) -> None:
    """Raise unless x, values, index and bias fit; `name` says which layer's do not."""
    values, columns, row_starts, bias = layer
    try:
        _linear.check_operands(x, values, bias, *shape)
        if values.dim() != 3:
            raise ValueError(f"values: expected [B, R, C], got {list(values.shape)}")
        blocks, r, c = values.shape
        check_structure(columns, row_starts, shape, (r, c), blocks, values.device)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name} layer: {error}") from None


def _contiguous(layer: _Layer) -> _Layer:
    values, columns, row_starts, bias = layer
    return values.contiguous(), columns, row_starts, None if bias is None else bias.contiguous()


# Under torch.compile the choice is a fact of the process, not part of the graph.
@constant_result
def _two_calls(device_type: str) -> bool:
    """Whether the layers' own kernels serve this device and this op has none there."""
    return device_type != "cuda" and forced_backend() in (None, "cpu")


def _fake(
    x: Tensor,
    up_values: Any,
    up_columns: Any,
    up_row_starts: Any,
    up_bias: Any,
    down_values: Any,
    down_columns: Any,
    down_row_starts: Any,
    down_bias: Any,
    shape: Sequence[int],
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


_op = Op("block_sparse_ffn", block_sparse_ffn_reference, _fake)
