"""Mean cosine distance between hidden states of mapped layers, and its gradient, in one pass over device memory.

All layers go in one launch, as in `hidden_mse`. A row is read into registers once where it fits; a wider one is read
again for the gradient, from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._losses import power_of_2, share_of, total_specimens
from sparsebert.kernels._triton import Specimen
from sparsebert.kernels.hidden_mse import hidden_cost, hidden_loss, hidden_specimens, kept_rows, picked

__all__ = ["cost", "hidden_cosine", "specimens", "tiles"]

EPS: tl.constexpr = tl.constexpr(1e-8)
"""The least length divided by, as in the op's definition."""
_WHOLE = 1024
_TILE = 4096


@triton.jit
def _sums(student, teacher, at, mask, ss, tt, st):
    """`(s, t)` in float32, and the running sums of their products."""
    s = tl.load(student + at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(teacher + at, mask=mask, other=0.0).to(tl.float32)
    return s, t, ss + tl.sum(s * s, 1), tt + tl.sum(t * t, 1), st + tl.sum(s * t, 1)


@triton.jit
def hidden_cosine_kernel(
    students, teachers, grads, mask, kept, partials, rows, tokens, groups, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of one layer a program, `groups` x `VECTOR` wide; `factor`: 1 over what counts, but for `kept`."""
    width = groups * VECTOR
    layer = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counts = kept_rows(mask, row, rows, tokens)
    student, teacher = picked(students, layer), picked(teachers, layer)
    column = tl.arange(0, BLOCK)
    at = tl.multiple_of(row * width, VECTOR)[:, None] + column[None, :]
    zeros = tl.zeros((ROWS,), tl.float32)
    s, t, ss, tt, st = _sums(student, teacher, at, counts[:, None] & (column < width)[None, :], zeros, zeros, zeros)
    for first in range(BLOCK, width, BLOCK):
        inside = counts[:, None] & (column < width - first)[None, :]
        _, _, ss, tt, st = _sums(student, teacher, at + first, inside, ss, tt, st)
    length_s, length_t = tl.sqrt_rn(ss), tl.sqrt_rn(tt)
    # In turn, not by their product, which might be too small for a number.
    scale = (1.0 / tl.maximum(length_s, EPS)) * (1.0 / tl.maximum(length_t, EPS))
    cosine = st * scale
    tl.store(partials + layer * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(counts, 1.0 - cosine, 0.0), 0))
    if grads is not None:
        grad = picked(grads, layer)
        share = share_of(kept, factor)
        # A length that is clamped does not change with s. What does not count was read as zeros, and gives zeros.
        along = (tl.where(length_s < EPS, 0.0, cosine / ss) * share)[:, None]
        across = (scale * share)[:, None]
        exists = (row < rows)[:, None]
        difference = tl.where(counts[:, None], s * along - t * across, 0.0)
        tl.store(grad + at, difference.to(grad.dtype.element_ty), mask=exists & (column < width)[None, :])
        for first in range(BLOCK, width, BLOCK):
            inside = (column < width - first)[None, :]
            s = tl.load(student + at + first, mask=counts[:, None] & inside, other=0.0).to(tl.float32)
            t = tl.load(teacher + at + first, mask=counts[:, None] & inside, other=0.0).to(tl.float32)
            difference = tl.where(counts[:, None], s * along - t * across, 0.0)
            tl.store(grad + at + first, difference.to(grad.dtype.element_ty), mask=exists & inside)


def tiles(width: int) -> tuple[int, int, int]:
    """`(rows, columns taken at a time, warps)` for states of `width`."""
    block = min(power_of_2(width), _WHOLE)
    return (_TILE if block >= 256 else _TILE // 4) // block, block, 8


def hidden_cosine(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_mask: Tensor | None, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """`(loss, its gradient to each student layer)`; the list is empty where not needed."""
    return hidden_loss(hidden_cosine_kernel, tiles, student, teacher, token_mask, need_grad, 1.0, 1.0)


def specimens() -> list[Specimen]:
    """Every kernel it may launch: a few layers and many, of each dtype."""
    return list(hidden_specimens(hidden_cosine_kernel, tiles, (768, 1024, 312, 25, 4096))) + total_specimens()


def cost(
    layers: int, rows: int, width: int, student_bytes: int = 2, teacher_bytes: int = 2,
    need_grad: bool = True, masked: bool = True,
) -> Cost:  # fmt: skip
    """What a call moves and computes, with every row counting; `*_bytes`: of an element. Wide rows are cached."""
    flops = layers * rows * width * (6 + 3 * need_grad)
    return hidden_cost(tiles(width)[0], layers, rows, width, (student_bytes, teacher_bytes), flops, need_grad, masked)
