"""A linear layer over a bitmap: one bit for each weight, and the kept ones packed in the order of a GPU's operands.

A *tile* is 16 rows by 64 columns of the weight `[N, K]`; tiles follow row after row of tiles, and beyond the weight's
edges nothing is kept. 32 *lanes* share a tile, 32 weights to a lane. Bit `8 s + 4 r + 2 h + e` of lane `4 g + t` is row
`g + 8 h` and column `16 t + 4 s + 2 r + e` of the tile: what a thread holds of the operand A of four products
mma.m16n8k16.

- `bits`, int32 `[row tiles, column tiles, 32]`: a word for each lane, bit 0 its lowest; 1 is kept.
- `values` `[nnz]`: the kept weights, tile after tile, in a tile lane after lane, in a lane from bit 0 up.
- `starts`, int64 `[tiles + 1]`: each tile's first value, and nnz.

`sparsebert.formats.Bitmap` makes and validates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import OPS, Op
from sparsebert.ops.masked_linear import full_precision

__all__ = ["LANES", "TILE_COLS", "TILE_ROWS", "bitmap_linear", "bitmap_linear_reference"]

# csrc/bitmap.h has the same three numbers.
TILE_ROWS = 16
TILE_COLS = 64
LANES = 32

# What the CUDA kernels take.
DTYPES = (torch.bfloat16, torch.float16)


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    starts: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """`activation(x @ W^T + bias)` over a bitmap.

    With up to 256 rows of x the CUDA kernel reads the bitmap alone, sums in float32, applies bias and activation there
    and rounds once; with more it decodes the weight into a scratch that lives for the call, and the product, its bias
    and the activation are torch's own. Where autograd records, the activation follows as torch's own op. Gradients:
    dX = dY · W and dvalues = (dY^T X) at the kept places are torch's products, of the decoded weight and of a dense
    matrix; dbias = sum of dY. A weight that is not kept is multiplied as 0: a NaN or infinity in x may reach all
    outputs of its row.

    Args:
        x: `[..., K]`, bfloat16 or float16 on CUDA; all else runs on the reference.
        values: `[nnz]`, x's dtype; it may require a gradient.
        bits, starts: where they lie (see the module), contiguous. Their content is taken on trust;
            `sparsebert.formats.Bitmap.check` validates it.
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
        return _linear.under_autocast(bitmap_linear, x, values, bits, starts, bias=bias, **options)
    n, k = shape
    _linear.check_operands(x, values, bias, n, k)
    if values.dim() != 1:
        raise ValueError(f"values: expected [nnz], got {list(values.shape)}")
    check_structure(bits, starts, n, k, values.device)
    return _linear.run(
        _op, (n, k), x, values, (bits, starts), bias, ([n, k],), activation, supported=values.dtype in DTYPES
    )


def bitmap_linear_reference(
    x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None, shape: Sequence[int], activation: str
) -> Tensor:
    """The definition: the kept weights put where they belong in a matrix of zeros, and the dense layer."""
    return _linear.linear_reference(x, decoded(values, bits, shape), bias, activation)


def decoded(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight `[N, K]`, 0 where nothing is kept; differentiable in `values`."""
    kept = kept_in_tiles(bits)
    return from_tiles(values.new_zeros(kept.shape).masked_scatter(kept, values), shape)


def kept_in_tiles(bits: Tensor) -> Tensor:
    """The bits, bool `[row tiles, column tiles, 32, 32]`: by tile, lane and bit."""
    return ((bits[..., None] >> torch.arange(32, dtype=torch.int32, device=bits.device)) & 1).bool()


def in_tiles(matrix: Tensor) -> Tensor:
    """A matrix `[N, K]` as `[row tiles, column tiles, 32, 32]`: by tile, lane and bit; zeros beyond its edges."""
    n, k = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -k % TILE_COLS, 0, -n % TILE_ROWS))
    parts = padded.view(-(-n // TILE_ROWS), 2, 8, -(-k // TILE_COLS), 4, 4, 2, 2)
    # From (row tile, h, g, column tile, t, s, r, e): lane 4 g + t, bit 8 s + 4 r + 2 h + e.
    return parts.permute(0, 3, 2, 4, 5, 6, 1, 7).reshape(parts.shape[0], parts.shape[3], LANES, 32)


def from_tiles(tiles: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `in_tiles`."""
    rows, cols = tiles.shape[:2]
    parts = tiles.reshape(rows, cols, 8, 4, 4, 2, 2, 2).permute(0, 6, 2, 1, 3, 4, 5, 7)
    return parts.reshape(rows * TILE_ROWS, cols * TILE_COLS)[: shape[0], : shape[1]].contiguous()


def check_structure(bits: Tensor, starts: Tensor, n: int, k: int, device: torch.device) -> None:
    """Raise unless the two index tensors have the dtypes, lengths and device of a weight `[N, K]`."""
    rows, cols = -(-n // TILE_ROWS), -(-k // TILE_COLS)
    _linear.check_index(
        device, bits=(bits, torch.int32, [rows, cols, LANES]), starts=(starts, torch.int64, [rows * cols + 1])
    )


def _fake(
    x: Tensor, values: Tensor, bits: Any, starts: Any, bias: Any, shape: Sequence[int], activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bits, starts, _, shape, activation = inputs
    _linear.check_recorded(activation)
    need_x, need_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_values else None, values if need_x else None, bits, starts)
    ctx.shape, ctx.nnz = list(shape), values.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, bits, starts = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
    grad_x = grad_values = None
    # Looked up, not imported: those ops' files import this one.
    supported = grad.dtype in DTYPES
    with full_precision(grad.device.type):
        if need_x:
            weight = OPS["bitmap_decode"].pick(grad.device, supported)(values, bits, starts, ctx.shape)
            grad_x = grad @ weight
        if need_values:
            product = _linear.as_rows(grad).t() @ _linear.as_rows(x)
            grad_values = OPS["bitmap_gather"].pick(grad.device, supported)(product, bits, starts, ctx.nnz)
        grad_bias = _linear.bias_grad(grad) if need_bias else None
    return grad_x, grad_values, None, None, grad_bias, None, None


_op = Op("bitmap_linear", bitmap_linear_reference, _fake, backward=_backward, setup_context=_setup_context)
