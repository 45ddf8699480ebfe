"""An embedding table under a mask being learned; `masked_linear`'s sister for rows looked up by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops._backend import Op
from sparsebert.ops.masked_linear import check_masked
from sparsebert.ops.split_weight_grad import split_weight_grad

__all__ = ["masked_embedding", "masked_embedding_reference"]


def masked_embedding(
    ids: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    scores: Tensor | None = None,
    bits: Tensor | None = None,
    padding_idx: int | None = None,
    grid: Sequence[int] | None = None,
) -> Tensor:
    """`masked_weight[ids]`, with gradients for the mask's scores and for the weight under it.

    With P the dense gradient of a plain embedding (dY summed by row, in float32): dscores = P∘weight summed over each
    block, dweight = P∘mask. Rows looked up as `padding_idx` give no gradient.

    Args:
        ids: int64 or int32, any shape, entries in `[0, V)`.
        weight: `[V, D]`, the unmasked table (read in the backward only).
        masked_weight: `[V, D]`, the cached W·mask in the dtype computed in; a constant for autograd.
        scores: `[GV, GD]`, a grid on the table; only its gradient is of interest.
        bits: uint8 `[ceil(GV * GD / 8)]`; needed where `weight` requires a gradient.
        padding_idx: a row without gradient (negative counts from the end), or None.
        grid: `(GV, GD)` where there are no scores; else theirs.

    Returns:
        `[*ids.shape, D]` in `masked_weight`'s dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named. IndexError (from torch): an id out of range.
    """
    cells = check_masked(weight, masked_weight, scores, bits, grid)
    if ids.dtype not in (torch.int64, torch.int32) or ids.device != weight.device:
        raise ValueError(f"ids: expected int64 or int32 on {weight.device}, got {ids.dtype} on {ids.device}")
    padding = -1
    if padding_idx is not None:
        if not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise ValueError(f"padding_idx: expected a row of {weight.shape[0]}, got {padding_idx}")
        padding = padding_idx % weight.shape[0]
    wanted = (weight, scores)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)):
        return F.embedding(ids, masked_weight.detach())
    if weight.requires_grad and bits is None:
        raise ValueError("bits: needed where weight requires a gradient; give the mask's bits or freeze the weight")
    body = _forward.differentiable(ids.device)
    return body(ids, weight, masked_weight.detach(), scores, bits, padding, cells)


def masked_embedding_reference(
    ids: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    scores: Tensor | None,
    bits: Tensor | None,
    padding_idx: int,
    grid: Sequence[int],
) -> Tensor:
    """The definition of the forward."""
    return F.embedding(ids, masked_weight)


def _fake_forward(
    ids: Tensor,
    weight: Tensor,
    masked_weight: Tensor,
    scores: Any,
    bits: Any,
    padding_idx: int,
    grid: Sequence[int],
) -> Tensor:
    return masked_weight.new_empty((*ids.shape, weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, _, scores, bits, padding_idx, grid = inputs
    ctx.save_for_backward(ids, weight, bits)
    ctx.padding_idx, ctx.grid = padding_idx, list(grid)
    ctx.scores_dtype = None if scores is None else scores.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, weight, bits = ctx.saved_tensors
    need_weight, need_scores = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    if not (need_weight or need_scores):
        return None, None, None, None, None, None, None
    # torch's dense gradient is deterministic on every device: it sorts the ids where it would otherwise need atomics.
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    product = torch.ops.aten.embedding_dense_backward(wide, ids, weight.shape[0], ctx.padding_idx, False)
    grad_scores, grad_weight = split_weight_grad(product, weight, bits, ctx.grid, need_scores, need_weight)
    return (
        None,
        grad_weight if need_weight else None,
        None,
        grad_scores.to(ctx.scores_dtype) if need_scores else None,
        None,
        None,
        None,
    )


_forward = Op(
    "masked_embedding",
    masked_embedding_reference,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
    composed=True,
)
