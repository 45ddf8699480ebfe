"""A linear layer over a 2:4 weight that is packed for Hopper's sparse matrix units, and a residue beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.errors import unknown
from sparsebert.ops import _linear
from sparsebert.ops._backend import Op
from sparsebert.ops.semi_structured_pack import DTYPES, TILE_BYTES, TILE_COLS, TILE_ROWS, on_hopper, unpacked
from sparsebert.ops.semi_structured_residue import SLOTS, unpacked_residue

__all__ = ["semi_structured_packed_linear", "semi_structured_packed_linear_reference"]


def semi_structured_packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    activation: str = "none",
    residue: Sequence[Tensor] = (),
) -> Tensor:
    """`activation(x @ (W + R)^T + bias)` over a packed 2:4 weight W; what `semi_structured_linear` calls for many rows.

    Products are summed in float32, bias and activation applied there, and the result rounded once. The kernel runs on
    an H100 or H200 (compute capability 9.0), where N and K are multiples of 8; all else is the reference's.

    Args:
        x: `[..., K]`, bfloat16 or float16, the dtype of the values that were packed.
        packed: uint8 `[ceil(N / 128), ceil(K / 64), 9216]`, from `semi_structured_pack`; its content is taken on trust.
        bias: `[N]` in x's dtype, or None.
        shape: `(N, K)`.
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".
        residue: R, what does not fit into 2:4, as `packed_residue` makes it in x's dtype; none by default. With it a
            NaN or infinity in a row of x may reach all outputs of that row.

    Returns:
        `[..., N]` in x's dtype; no gradient flows through it.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named; an argument that requires a gradient.
    """
    n, k = shape
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected bfloat16 or float16, got {x.dtype}")
    _linear.check_operands(x, x, bias, n, k, name="x")
    if activation not in _linear.ACTIVATIONS:
        raise unknown("activation", activation, _linear.ACTIVATIONS)
    wanted = [-(-n // TILE_ROWS), -(-k // TILE_COLS), TILE_BYTES]
    _linear.check_index(x.device, packed=(packed, torch.uint8, wanted))
    if residue:
        _check_residue(x, residue, n, k)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("x, bias: no gradient flows through a packed weight; use semi_structured_linear")
    takes = n % 8 == 0 and k % 8 == 0 and n > 0 and k > 0 and (not x.is_cuda or on_hopper(x.device.index))
    with torch.no_grad():
        return _op.pick(x.device, takes)(x.contiguous(), packed, bias, list(residue), [n, k], activation)


def semi_structured_packed_linear_reference(
    x: Tensor, packed: Tensor, bias: Tensor | None, residue: Sequence[Tensor], shape: Sequence[int], activation: str
) -> Tensor:
    """The definition: the weight unpacked, and the dense layer."""
    size = (shape[0], shape[1])
    weight = unpacked(packed, size, x.dtype)
    # No place is in both, so that the sum is exact.
    weight = weight + unpacked_residue(list(residue), size) if residue else weight
    return _linear.linear_reference(x, weight, bias, activation)


def _check_residue(x: Tensor, residue: Sequence[Tensor], n: int, k: int) -> None:
    if len(residue) != 3:
        raise ValueError(f"residue: expected the three tensors of packed_residue, got {len(residue)}")
    spans, columns, values = residue
    groups, chunks = 2 * -(-n // TILE_ROWS), columns.shape[1] if columns.dim() == 3 else 0
    products = values.shape[2] if values.dim() == 5 else 0
    wanted = {
        "spans": (spans, torch.int32, [groups, -(-k // TILE_COLS)]),
        "columns": (columns, torch.uint8, [groups, chunks, SLOTS]),
        "values": (values, x.dtype, [groups, chunks, products, 128, 8]),
    }
    _linear.check_index(x.device, **{f"residue's {name}": found for name, found in wanted.items()})


def _fake(x: Tensor, packed: Any, bias: Any, residue: Any, shape: Sequence[int], activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


_op = Op("semi_structured_packed_linear", semi_structured_packed_linear_reference, _fake)
