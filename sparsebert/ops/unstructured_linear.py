"""A linear layer that stores its non-zero weights one by one, sorted into tiles for the cache.

The storage is a CSR of tiles. A *tile* is `STRIP` rows by `PANEL` columns of the weight `[N, K]` (fewer at the edges),
number `strip * panels + panel` with `panels = ceil(K / PANEL)`. An *entry* is one row of one tile:

- `rows`, `counts`, uint8 `[panels * N]`: the entry's row within its strip and its number of stored weights. The entries
  of a tile follow one another, sorted by (count, row), every row of the strip once; tiles follow in order.
- `values` `[nnz]`, `offsets` uint8 `[nnz]`: the stored weights and their columns within the panel, entry by entry,
  columns ascending within an entry.
- `starts`, int64 `[strips * panels + 1]`: the first value of each tile, and nnz.

Entries of one length lie together so that the kernels' loops have lengths that a branch predictor can follow.
`sparsebert.formats.Unstructured` makes and validates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import OPS, Op
from sparsebert.ops.masked_linear import full_precision

__all__ = ["PANEL", "STRIP", "unstructured_linear", "unstructured_linear_reference"]

# csrc/cpu/unstructured.h has the same two numbers. Rows and columns within a tile fit a byte.
STRIP = 256
PANEL = 128


def unstructured_linear(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    counts: Tensor,
    starts: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    activation: str = "none",
    transposed: Sequence[Tensor] = (),
) -> Tensor:
    """`activation(x @ W^T + bias)` over the stored weights of W alone.

    Products are summed in float32 (float64 for float64), bias and activation applied there, and the result rounded
    once. Where autograd records, the activation follows as torch's own op. Gradients: dX = dY · W, which needs
    `transposed`; dvalues = (dY^T X) at the stored places only; dbias = sum of dY. A weight that is not stored has no
    effect at all: from the compiled kernels a NaN or infinity in x reaches only the outputs that store a weight in its
    column; the reference multiplies by zeros too, so that it may reach all outputs of its row.

    Args:
        x: `[..., K]`, float32 or bfloat16 (float64 and float16 run on the reference).
        values: `[nnz]`, x's dtype; it may require a gradient.
        offsets, rows, counts, starts: where they lie (see the module), contiguous. Their content is taken on trust;
            `sparsebert.formats.Unstructured.check` validates it.
        bias: `[N]` in x's dtype, or None.
        shape: `(N, K)`.
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".
        transposed: `[permutation, offsets, rows, counts, starts]` of W^T, whose values are `values[permutation]`
            (int64 `[nnz]`); needed where x requires a gradient.

    Returns:
        `[..., N]` in x's dtype. Under `torch.autocast` x, values and bias are cast first, as in nn.Linear.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named. TypeError: values that are no floats.
    """
    if _linear.is_autocast(values):
        index, options = (offsets, rows, counts, starts), {"shape": shape, "activation": activation}
        return _linear.under_autocast(
            unstructured_linear, x, values, *index, bias=bias, transposed=transposed, **options
        )
    n, k = shape
    _linear.check_operands(x, values, bias, n, k)
    if values.dim() != 1:
        raise ValueError(f"values: expected [nnz], got {list(values.shape)}")
    check_structure(offsets, rows, counts, starts, n, k, values.shape[0], values.device)
    if transposed or x.requires_grad:
        _linear.check_transposed(x, transposed, 5)
    return _linear.run(
        _op, (n, k), x, values, (offsets, rows, counts, starts), bias, ([n, k],), activation, list(transposed)
    )


def unstructured_linear_reference(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    rows: Tensor,
    counts: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
    transposed: Sequence[Tensor],
) -> Tensor:
    """The definition: the stored weights put where they belong in a matrix of zeros, and the dense layer."""
    weight = values.new_zeros(tuple(shape))
    weight[stored_places(rows, counts, offsets, shape)] = values
    return _linear.linear_reference(x, weight, bias, activation)


def stored_places(rows: Tensor, counts: Tensor, offsets: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and column of every stored weight, int64 `[nnz]` each, in the order of the values."""
    strip, panel = entry_tiles(shape, rows.device)
    entry = torch.repeat_interleave(counts.long(), output_size=offsets.numel())
    return (strip * STRIP + rows)[entry], (panel * PANEL)[entry] + offsets


def entry_tiles(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Strip and panel of every entry of a weight `[N, K]`, int64 `[panels * N]` each."""
    n, k = shape
    panels = -(-k // PANEL)
    entry = torch.arange(panels * n, device=device)
    strip = entry // max(STRIP * panels, 1)
    # The last strip may have fewer rows, so fewer entries to a tile.
    return strip, (entry - strip * (STRIP * panels)) // (n - strip * STRIP).clamp(max=STRIP)


def check_structure(
    offsets: Tensor,
    rows: Tensor,
    counts: Tensor,
    starts: Tensor,
    n: int,
    k: int,
    nnz: int,
    device: torch.device,
) -> None:
    """Raise unless the four index tensors have the dtypes, lengths and device of `nnz` weights in `[N, K]`."""
    panels, strips = -(-k // PANEL), -(-n // STRIP)
    if (
        offsets.numel() == nnz
        and rows.numel() == counts.numel() == panels * n
        and starts.numel() == strips * panels + 1
        and offsets.dtype == rows.dtype == counts.dtype == torch.uint8
        and starts.dtype == torch.int64
        and offsets.device == rows.device == counts.device == starts.device == device
        and offsets.is_contiguous()
        and rows.is_contiguous()
        and counts.is_contiguous()
        and starts.is_contiguous()
    ):
        return
    _linear.check_index(
        device,
        offsets=(offsets, torch.uint8, [nnz]),
        rows=(rows, torch.uint8, [panels * n]),
        counts=(counts, torch.uint8, [panels * n]),
        starts=(starts, torch.int64, [strips * panels + 1]),
    )


def _fake(
    x: Tensor,
    values: Tensor,
    offsets: Any,
    rows: Any,
    counts: Any,
    starts: Any,
    bias: Any,
    shape: Sequence[int],
    activation: str,
    transposed: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, *index, _, shape, activation, transposed = inputs
    _linear.check_recorded(activation)
    need_x, need_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_values else None, values if need_x else None, *index, *transposed)
    ctx.shape, ctx.transposed = list(shape), len(transposed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, offsets, rows, counts, starts, *transposed = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[6]
    n, k = ctx.shape
    grad_x = grad_values = None
    with full_precision(grad.device.type):
        if need_x:
            permutation, *index = transposed
            grad_x = unstructured_linear(grad, values[permutation], *index, shape=(k, n))
        if need_values:
            # Looked up, not imported: that op's file imports this one.
            sddmm = OPS["unstructured_sddmm"].pick(grad.device, _linear.is_supported(grad.dtype))
            grad_values = sddmm(_linear.as_rows(grad), _linear.as_rows(x), offsets, rows, counts, starts)
        grad_bias = _linear.bias_grad(grad) if need_bias else None
    none = _linear.no_grads(ctx, 9, ctx.transposed)
    return grad_x, grad_values, None, None, None, None, grad_bias, None, None, none


_op = Op("unstructured_linear", unstructured_linear_reference, _fake, backward=_backward, setup_context=_setup_context)
