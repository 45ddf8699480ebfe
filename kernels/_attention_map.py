"""What the losses between attention maps share: both maps recomputed a tile at a time from queries and keys.

With s = q k^T * scale of the student, t that of the teacher, p and r their softmaxes over the keys that count, n what
the mean is over, and D = d(loss * n) / ds:

    KL       sum r (log r - log p)     D = p - r                     (the rows of p and of r sum to 1)
    MSE      sum (p - r)^2             D = 2 p (p - r - delta),      delta = sum_j p (p - r) = sum p^2 - sum p r
    scores   sum (s - t)^2             D = 2 (s - t)

    dQ = scale / n * D K,      dK = scale / n * D^T Q

Nothing of the size of a map is stored. The passes, each a launch (a query or key tile a program, all deterministic):

1. statistics: the maximum and the sum of the exponentials above it of every row of s and t. For the MSE also delta:
   its two sums are kept online beside the softmax's own, scaled as these are when a larger maximum comes, so that the
   softmax's backward costs no pass more. It is off by some 1e-7 of sum p^2, which is nothing beside the rounding of D
   to 16 bits. In float32 it would be seen where p is nearly one-hot: p - r - delta then is far smaller than each, and
   only if all come from the same rounded p does what they are off by cancel. There pass 2 runs once more before, for
   the sum of the differences.
2. rows: the loss, and dQ, by query tile.
3. columns: dK by key tile, from the transposed products, so that the tile of D is the left operand as it stands.
4. the sum of the tiles' losses in a fixed order.

Where q = k (relations), s is symmetric: dX_i = scale / n * sum_j (D_ij + D_ji) x_j comes out of pass 2 alone, D_ji
from the same product and row j's statistics.

Tokens that do not count are loaded as 0 and never seen; a sequence's tiles behind its last token are skipped.
Scores are held in units of ln 2. D goes to the tensor cores in the student's dtype, its sum stays in float32, and the
factor scale / n is applied at the end. float16 has no numbers for a small D: there it is raised by 2^14 meanwhile
(|D| <= 2), scores' differences, which know no bound, lowered by 2^4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._losses import gradient_dtype
from sparsebert.kernels._triton import dot

__all__ = ["STATISTICS", "Tiles", "constants_of", "map_loss", "padded", "raised", "tiles"]

KL, MSE, SCORES = (tl.constexpr(kind) for kind in range(3))
KINDS = {"kl": KL, "mse": MSE, "scores": SCORES}
STATISTICS = {"kl": 4, "mse": 5, "scores": 0}
"""Numbers that are kept of every row."""
_LOG2_E, _LN_2 = math.log2(math.e), math.log(2)
_SUM_BLOCK = tl.constexpr(4096)
_BATCH_BLOCK = tl.constexpr(256)


@dataclass(frozen=True)
class Tiles:
    """How a pass is launched."""

    own: int
    """Queries (rows) or keys (columns) of a program."""
    other: int
    """Of a step of its loop."""
    warps: int
    stages: int


def tiles(seq: int, student_width: int, teacher_width: int, wide: bool, symmetric: bool = False) -> Tiles:
    """The tile of every pass; `wide` where student or teacher is float32."""
    widest = padded(max(student_width, teacher_width))
    if wide:
        # Small, as the high and low halves of the three products fill the registers; square, so that both passes form
        # a score in the same way.
        chosen = Tiles(16, 16, 4 if widest <= 64 else 8, 1)
    elif widest <= 64:
        chosen = Tiles(64, 64, 4, 3)
    else:
        chosen = Tiles(64, 64, 8, 2) if widest <= 128 else Tiles(64, 32, 8, 2)
    if symmetric and not wide:
        # Four exponentials of a tile at once are too many for the registers.
        chosen = Tiles(chosen.own, 32 if widest <= 64 else 16, chosen.warps, chosen.stages)
    most = max(16, triton.next_power_of_2(seq))
    return Tiles(min(chosen.own, most), min(chosen.other, most), chosen.warps, chosen.stages)


def padded(width: int) -> int:
    """A width as the tensor cores take it."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _place(heads, count):
    """`(tile, sequence and head together, sequence, head)` of this program; a head's tiles follow each other."""
    program = tl.program_id(0)
    place = program // count
    return program % count, place.to(tl.int64), (place // heads).to(tl.int64), (place % heads).to(tl.int64)


@triton.jit
def _load_rows(base, stride, rows, keep, WHOLE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """`[rows, PADDED]`, 0 where not kept and beyond the width; all are kept where WHOLE."""
    columns = tl.arange(0, PADDED)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if WHOLE and WIDTH == PADDED:
        found = tl.load(at)
    elif WHOLE:
        found = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    elif WIDTH == PADDED:
        found = tl.load(at, mask=keep[:, None], other=0.0)
    else:
        found = tl.load(at, mask=keep[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return found


@triton.jit
def _kept(mask, sequence, seq, rows):
    """Which rows are tokens that count."""
    kept = rows < seq
    if mask is not None:
        kept = tl.load(mask + sequence * seq + rows, mask=kept, other=0) != 0
    return kept


@triton.jit
def _end(lengths, sequence, seq, first):
    """Where the tokens of a sequence end, for a program whose tile begins at `first`: 0 if it begins behind them."""
    end = seq
    if lengths is not None:
        end = tl.load(lengths + sequence)
        end = tl.where(first < end, end, 0)
    return end


@triton.jit
def _chunk(base, stride, rows, keep, from_column, WHOLE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """`[rows, CHUNK]` of `_load_rows`, from a column on."""
    columns = from_column + tl.arange(0, CHUNK)
    wanted = (columns < WIDTH)[None, :]
    if not WHOLE:
        wanted = wanted & keep[:, None]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=wanted, other=0.0)


@triton.jit
def _scores(
    own, own_base, own_stride, rows, rows_kept, other, base, stride, columns, keep, factor,
    WHOLE: tl.constexpr, BARE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """`own other^T * factor`, columns that are not kept -inf unless BARE.

    float32 is multiplied a chunk of the width at a time, loaded again: of whole tiles the high and low halves, which
    its three products take, would not fit the registers. TURNED, where `own` are keys, it is multiplied as the pass by
    queries does: a score that is rounded in another way does not fit its row's statistics, and in float32 that is seen.
    """
    if TURNED:
        found = tl.zeros([columns.shape[0], rows.shape[0]], tl.float32)
    else:
        found = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    if CHUNK == PADDED:
        found = dot(other, tl.trans(own), found) if TURNED else dot(own, tl.trans(other), found)
    else:
        for at in range(0, PADDED, CHUNK):
            left = _chunk(own_base, own_stride, rows, rows_kept, at, WHOLE, WIDTH, CHUNK)
            right = _chunk(base, stride, columns, keep, at, WHOLE, WIDTH, CHUNK)
            found = dot(right, tl.trans(left), found) if TURNED else dot(left, tl.trans(right), found)
    if TURNED:
        found = tl.trans(found)
    found *= factor
    if not (WHOLE or BARE):
        found = tl.where(keep[None, :], found, -float("inf"))
    return found


@triton.jit
def _weight(lengths, batch, heads, weight, PAIRS: tl.constexpr):
    """1 / the number of rows (or pairs) that count, at least 1; `weight` where all do."""
    if lengths is not None:
        total = tl.zeros([_BATCH_BLOCK], tl.int64)
        for first in range(0, batch, _BATCH_BLOCK):
            at = first + tl.arange(0, _BATCH_BLOCK)
            count = tl.load(lengths + batch + at, mask=at < batch, other=0).to(tl.int64)
            total += count * count if PAIRS else count
        weight = 1.0 / tl.maximum(tl.sum(total) * heads, 1).to(tl.float32)
    return weight


@triton.jit
def lengths_kernel(mask, lengths, batch, seq, BLOCK: tl.constexpr):
    """By sequence: 1 + its last token (0 if none), and, `batch` further, how many count."""
    sequence = tl.program_id(0).to(tl.int64)
    count = tl.zeros([BLOCK], tl.int32)
    end = tl.zeros([BLOCK], tl.int32)
    for first in range(0, seq, BLOCK):
        at = first + tl.arange(0, BLOCK)
        kept = tl.load(mask + sequence * seq + at, mask=at < seq, other=0) != 0
        count += kept.to(tl.int32)
        end = tl.maximum(end, tl.where(kept, at + 1, 0))
    tl.store(lengths + sequence, tl.max(end))
    tl.store(lengths + batch + sequence, tl.sum(count))


@triton.jit
def statistics_kernel(
    student_q, student_k, teacher_q, teacher_k, mask, lengths, stats,
    sq_batch, sq_head, sq_token, sk_batch, sk_head, sk_token, tq_batch, tq_head, tq_token, tk_batch, tk_head, tk_token,
    heads, seq, count, student_factor, teacher_factor,
    KIND: tl.constexpr, RAGGED: tl.constexpr,
    STUDENT: tl.constexpr, STUDENT_PADDED: tl.constexpr, STUDENT_CHUNK: tl.constexpr,
    TEACHER: tl.constexpr, TEACHER_PADDED: tl.constexpr, TEACHER_CHUNK: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """`stats` `[batch * heads, 4 or 5, seq]`: of the rows of s, then of t, the maximum and the log2 of the sum of the
    exponentials above it; the MSE's delta."""
    tile, place, sequence, head = _place(heads, count)
    rows = tile * OWN + tl.arange(0, OWN)
    row_kept = _kept(mask, sequence, seq, rows)
    WHOLE: tl.constexpr = (mask is None) and (not RAGGED)
    sq = student_q + sequence * sq_batch + head * sq_head
    sk = student_k + sequence * sk_batch + head * sk_head
    tq = teacher_q + sequence * tq_batch + head * tq_head
    tk = teacher_k + sequence * tk_batch + head * tk_head
    mine = _load_rows(sq, sq_token, rows, row_kept, WHOLE, STUDENT, STUDENT_PADDED)
    theirs = _load_rows(tq, tq_token, rows, row_kept, WHOLE, TEACHER, TEACHER_PADDED)
    top_s = tl.full([OWN], -float("inf"), tl.float32)
    top_t = tl.full([OWN], -float("inf"), tl.float32)
    sum_s = tl.zeros([OWN], tl.float32)
    sum_t = tl.zeros([OWN], tl.float32)
    squares = tl.zeros([OWN], tl.float32)
    cross = tl.zeros([OWN], tl.float32)
    for first in range(0, _end(lengths, sequence, seq, tile * OWN), OTHER):
        columns = first + tl.arange(0, OTHER)
        keep = _kept(mask, sequence, seq, columns)
        k = _load_rows(sk, sk_token, columns, keep, WHOLE, STUDENT, STUDENT_PADDED)
        s = _scores(
            mine, sq, sq_token, rows, row_kept, k, sk, sk_token, columns, keep, student_factor,
            WHOLE, False, STUDENT, STUDENT_PADDED, STUDENT_CHUNK,
        )  # fmt: skip
        k = _load_rows(tk, tk_token, columns, keep, WHOLE, TEACHER, TEACHER_PADDED)
        t = _scores(
            theirs, tq, tq_token, rows, row_kept, k, tk, tk_token, columns, keep, teacher_factor,
            WHOLE, False, TEACHER, TEACHER_PADDED, TEACHER_CHUNK,
        )  # fmt: skip
        larger_s = tl.maximum(top_s, tl.max(s, 1))
        larger_t = tl.maximum(top_t, tl.max(t, 1))
        # No key yet: -inf - -inf would be NaN.
        from_s = tl.where(larger_s == -float("inf"), 0.0, larger_s)
        from_t = tl.where(larger_t == -float("inf"), 0.0, larger_t)
        e_s = tl.exp2(s - from_s[:, None])
        e_t = tl.exp2(t - from_t[:, None])
        less_s = tl.exp2(top_s - from_s)
        less_t = tl.exp2(top_t - from_t)
        sum_s = sum_s * less_s + tl.sum(e_s, 1)
        sum_t = sum_t * less_t + tl.sum(e_t, 1)
        if KIND == MSE:
            squares = squares * less_s * less_s + tl.sum(e_s * e_s, 1)
            cross = cross * less_s * less_t + tl.sum(e_s * e_t, 1)
        top_s = larger_s
        top_t = larger_t
    to = stats + place * ((5 if KIND == MSE else 4) * seq) + rows
    inside = rows < seq
    # 0 where nothing counts: what is computed from it there is finite and never used.
    tl.store(to, tl.where(row_kept, top_s, 0.0), mask=inside)
    tl.store(to + seq, tl.where(row_kept, tl.log2(sum_s), 0.0), mask=inside)
    tl.store(to + 2 * seq, tl.where(row_kept, top_t, 0.0), mask=inside)
    tl.store(to + 3 * seq, tl.where(row_kept, tl.log2(sum_t), 0.0), mask=inside)
    if KIND == MSE:
        delta = (squares / sum_s - cross / sum_t) / sum_s
        tl.store(to + 4 * seq, tl.where(row_kept, delta, 0.0), mask=inside)


@triton.jit
def _statistics(of, rows, seq, KIND: tl.constexpr):
    """Of some rows: `(maximum and log2 of s, the same of t, delta)`; 0 where there are none."""
    top_s, log_s, top_t, log_t, delta = 0.0, 0.0, 0.0, 0.0, 0.0
    if KIND != SCORES:
        inside = rows < seq
        top_s = tl.load(of + rows, mask=inside, other=0.0)
        log_s = tl.load(of + seq + rows, mask=inside, other=0.0)
        top_t = tl.load(of + 2 * seq + rows, mask=inside, other=0.0)
        log_t = tl.load(of + 3 * seq + rows, mask=inside, other=0.0)
        if KIND == MSE:
            delta = tl.load(of + 4 * seq + rows, mask=inside, other=0.0)
    return top_s, log_s, top_t, log_t, delta


@triton.jit
def _columns_difference(s, t, of, columns, seq, KIND: tl.constexpr):
    """D of a tile that has the maps' rows as its columns, but for the factor 2."""
    d = s - t
    if KIND != SCORES:
        top_s, log_s, top_t, log_t, delta = _statistics(of, columns, seq, KIND)
        p = tl.exp2((s - top_s[None, :]) - log_s[None, :])
        d = p - tl.exp2((t - top_t[None, :]) - log_t[None, :])
        if KIND == MSE:
            d = p * (d - delta[None, :])
    return d


@triton.jit
def rows_kernel(
    student_q, student_k, teacher_q, teacher_k, mask, lengths, stats, grad, partial,
    sq_batch, sq_head, sq_token, sk_batch, sk_head, sk_token, tq_batch, tq_head, tq_token, tk_batch, tk_head, tk_token,
    batch, heads, seq, count, student_factor, teacher_factor, grad_factor, weight,
    KIND: tl.constexpr, SYMMETRIC: tl.constexpr, DELTA: tl.constexpr, RAISE: tl.constexpr, RAGGED: tl.constexpr,
    STUDENT: tl.constexpr, STUDENT_PADDED: tl.constexpr, STUDENT_CHUNK: tl.constexpr,
    TEACHER: tl.constexpr, TEACHER_PADDED: tl.constexpr, TEACHER_CHUNK: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """`partial` `[programs]`: the loss of a query tile before the mean; `grad`: dQ, or dX where SYMMETRIC, or None.

    With DELTA the MSE's delta is summed from the differences and takes the place of the other in `stats`.
    """
    tile, place, sequence, head = _place(heads, count)
    rows = tile * OWN + tl.arange(0, OWN)
    row_kept = _kept(mask, sequence, seq, rows)
    inside = rows < seq
    WHOLE: tl.constexpr = (mask is None) and (not RAGGED)
    sq = student_q + sequence * sq_batch + head * sq_head
    sk = student_k + sequence * sk_batch + head * sk_head
    tq = teacher_q + sequence * tq_batch + head * tq_head
    tk = teacher_k + sequence * tk_batch + head * tk_head
    mine = _load_rows(sq, sq_token, rows, row_kept, WHOLE, STUDENT, STUDENT_PADDED)
    theirs = _load_rows(tq, tq_token, rows, row_kept, WHOLE, TEACHER, TEACHER_PADDED)
    of = stats
    if KIND != SCORES:
        of = stats + place * ((5 if KIND == MSE else 4) * seq)
    top_s, log_s, top_t, log_t, delta = _statistics(of, rows, seq, KIND)
    lost = tl.zeros([OWN], tl.float32)
    along = tl.zeros([OWN], tl.float32)
    if grad is not None:
        acc = tl.zeros([OWN, STUDENT_PADDED], tl.float32)
    for first in range(0, _end(lengths, sequence, seq, tile * OWN), OTHER):
        columns = first + tl.arange(0, OTHER)
        keep = _kept(mask, sequence, seq, columns)
        other = _load_rows(tk, tk_token, columns, keep, WHOLE, TEACHER, TEACHER_PADDED)
        # Keys that do not count are 0 in both, so the scores' own difference needs no -inf.
        t = _scores(
            theirs, tq, tq_token, rows, row_kept, other, tk, tk_token, columns, keep, teacher_factor,
            WHOLE, KIND == SCORES, TEACHER, TEACHER_PADDED, TEACHER_CHUNK,
        )  # fmt: skip
        k = _load_rows(sk, sk_token, columns, keep, WHOLE, STUDENT, STUDENT_PADDED)
        s = _scores(
            mine, sq, sq_token, rows, row_kept, k, sk, sk_token, columns, keep, student_factor,
            WHOLE, KIND == SCORES, STUDENT, STUDENT_PADDED, STUDENT_CHUNK,
        )  # fmt: skip
        if KIND == SCORES:
            d = s - t
            lost += tl.sum(d * d, 1)
        else:
            # The maximum first: their difference is exact near it, and only there is p of any size.
            s_log = (s - top_s[:, None]) - log_s[:, None]
            t_log = (t - top_t[:, None]) - log_t[:, None]
            p = tl.exp2(s_log)
            r = tl.exp2(t_log)
            d = p - r
            if KIND == KL:
                term = r * (t_log - s_log)
                lost += tl.sum(term if WHOLE else tl.where(keep[None, :], term, 0.0), 1)
            else:
                lost += tl.sum(d * d, 1)
                if DELTA:
                    along += tl.sum(d * p, 1)
                d = p * (d - delta[:, None])
        if grad is not None:
            if SYMMETRIC:
                d += _columns_difference(s, t, of, columns, seq, KIND)
            acc = dot((d * RAISE).to(k.dtype), k, acc)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(row_kept, lost, 0.0)))
    if DELTA:
        tl.store(of + 4 * seq + rows, tl.where(row_kept, along, 0.0), mask=inside)
    if grad is not None:
        acc *= _weight(lengths, batch, heads, weight, KIND != KL) * grad_factor
        _store_rows(grad, acc, rows, row_kept, sequence, head, heads, seq, STUDENT, STUDENT_PADDED)


@triton.jit
def _store_rows(grad, acc, rows, kept, sequence, head, heads, seq, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of the gradient, `[batch, seq, heads, width]` in memory; 0 where they do not count."""
    columns = tl.arange(0, PADDED)
    at = ((sequence * seq + rows) * heads + head)[:, None] * WIDTH + columns[None, :]
    found = tl.where(kept[:, None], acc, 0.0).to(grad.dtype.element_ty)
    tl.store(grad + at, found, mask=(rows < seq)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def columns_kernel(
    student_q, student_k, teacher_q, teacher_k, mask, lengths, stats, grad,
    sq_batch, sq_head, sq_token, sk_batch, sk_head, sk_token, tq_batch, tq_head, tq_token, tk_batch, tk_head, tk_token,
    batch, heads, seq, count, student_factor, teacher_factor, grad_factor, weight,
    KIND: tl.constexpr, RAISE: tl.constexpr, RAGGED: tl.constexpr,
    STUDENT: tl.constexpr, STUDENT_PADDED: tl.constexpr, STUDENT_CHUNK: tl.constexpr,
    TEACHER: tl.constexpr, TEACHER_PADDED: tl.constexpr, TEACHER_CHUNK: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """`grad`: dK of a key tile. Queries that do not count are 0, so their column of D, finite, adds nothing; keys that
    do not are left out when the rows are stored."""
    tile, place, sequence, head = _place(heads, count)
    rows = tile * OWN + tl.arange(0, OWN)
    row_kept = _kept(mask, sequence, seq, rows)
    WHOLE: tl.constexpr = (mask is None) and (not RAGGED)
    sq = student_q + sequence * sq_batch + head * sq_head
    sk = student_k + sequence * sk_batch + head * sk_head
    tq = teacher_q + sequence * tq_batch + head * tq_head
    tk = teacher_k + sequence * tk_batch + head * tk_head
    mine = _load_rows(sk, sk_token, rows, row_kept, WHOLE, STUDENT, STUDENT_PADDED)
    theirs = _load_rows(tk, tk_token, rows, row_kept, WHOLE, TEACHER, TEACHER_PADDED)
    of = stats
    if KIND != SCORES:
        of = stats + place * ((5 if KIND == MSE else 4) * seq)
    acc = tl.zeros([OWN, STUDENT_PADDED], tl.float32)
    for first in range(0, _end(lengths, sequence, seq, tile * OWN), OTHER):
        columns = first + tl.arange(0, OTHER)
        keep = _kept(mask, sequence, seq, columns)
        other = _load_rows(tq, tq_token, columns, keep, WHOLE, TEACHER, TEACHER_PADDED)
        t = _scores(
            theirs, tk, tk_token, rows, row_kept, other, tq, tq_token, columns, keep, teacher_factor,
            WHOLE, True, TEACHER, TEACHER_PADDED, TEACHER_CHUNK, teacher_q.dtype.element_ty == tl.float32,
        )  # fmt: skip
        q = _load_rows(sq, sq_token, columns, keep, WHOLE, STUDENT, STUDENT_PADDED)
        s = _scores(
            mine, sk, sk_token, rows, row_kept, q, sq, sq_token, columns, keep, student_factor,
            WHOLE, True, STUDENT, STUDENT_PADDED, STUDENT_CHUNK, student_q.dtype.element_ty == tl.float32,
        )  # fmt: skip
        d = _columns_difference(s, t, of, columns, seq, KIND)
        acc = dot((d * RAISE).to(q.dtype), q, acc)
    acc *= _weight(lengths, batch, heads, weight, KIND != KL) * grad_factor
    _store_rows(grad, acc, rows, row_kept, sequence, head, heads, seq, STUDENT, STUDENT_PADDED)


@triton.jit
def sum_kernel(partial, loss, lengths, programs, batch, heads, factor, weight, PAIRS: tl.constexpr):
    """`loss` `[]`: the partial sums in a fixed order, times `factor` and the mean's weight."""
    total = tl.zeros([_SUM_BLOCK], tl.float32)
    for first in range(0, programs, _SUM_BLOCK):
        at = first + tl.arange(0, _SUM_BLOCK)
        total += tl.load(partial + at, mask=at < programs, other=0.0)
    tl.store(loss, tl.sum(total) * factor * _weight(lengths, batch, heads, weight, PAIRS))


def map_loss(
    kind: str,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    token_mask: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, its gradients to the student's q and k)`, these `[0]` where not needed.

    Args:
        kind: "kl", "mse" or "scores".
        student_q, student_k, teacher_q, teacher_k: `[batch, heads, seq, width]`, the last dimension dense.
        token_mask: `[batch, seq]` bool, contiguous, or None.
        symmetric: q and k are one tensor; the first gradient is the sum of both and the second `[0]`.
    """
    batch, heads, seq, width = student_q.shape
    loss = student_q.new_empty((), dtype=torch.float32)
    dtype = gradient_dtype(student_q.dtype)
    grads = [student_q.new_empty(0, dtype=dtype) for _ in range(2)]
    if need_grad:
        for i in range(1 if symmetric else 2):
            grads[i] = student_q.new_empty((batch, seq, heads, width), dtype=dtype).transpose(1, 2)
    if batch * heads * seq == 0:
        return loss.zero_(), grads[0], grads[1]
    tensors = student_q, student_k, teacher_q, teacher_k
    launch = _Launch(kind, tensors, token_mask, student_scale, teacher_scale, symmetric)
    launch.statistics()
    launch.rows(loss, grads[0] if need_grad else None)
    if need_grad and not symmetric:
        launch.columns(grads[1])
    return loss, grads[0], grads[1]


class _Launch:
    """The passes of one call and what they share."""

    def __init__(
        self,
        kind: str,
        tensors: Sequence[Tensor],
        token_mask: Tensor | None,
        student_scale: float,
        teacher_scale: float,
        symmetric: bool,
    ) -> None:
        student, teacher = tensors[0], tensors[2]
        self.kind, self.tensors, self.symmetric = kind, tensors, symmetric
        self.batch, self.heads, self.seq, width = student.shape
        self.mask = None if token_mask is None else token_mask.view(torch.uint8)
        self.lengths = None if token_mask is None else student.new_empty(2 * self.batch, dtype=torch.int32)
        if self.lengths is not None:
            block = min(1024, triton.next_power_of_2(self.seq))
            lengths_kernel[(self.batch,)](self.mask, self.lengths, self.batch, self.seq, block)
        kept = self.batch * self.heads * self.seq * (1 if kind == "kl" else self.seq)
        self.weight = 1.0 / kept
        self.raised = raised(kind, student.dtype)
        unit = 1.0 if kind == "scores" else _LOG2_E
        self.factors = (student_scale * unit, teacher_scale * unit)
        self.grad_factor = student_scale * (1 if kind == "kl" else 2) / self.raised
        wide = torch.float32 in (student.dtype, teacher.dtype)
        self.exact = kind == "mse" and wide
        self.tiles = tiles(self.seq, width, teacher.shape[-1], wide, symmetric)
        self.count = -(-self.seq // self.tiles.own)
        self.programs = self.batch * self.heads * self.count
        self.strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
        self.stats: Tensor | None = None
        self.constants = {
            **constants_of(kind, self.tiles, (student.dtype, teacher.dtype), (width, teacher.shape[-1]), self.seq),
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
        }

    def statistics(self) -> None:
        if self.kind == "scores":
            return
        shape = (self.batch * self.heads, STATISTICS[self.kind], self.seq)
        self.stats = self.tensors[0].new_empty(shape, dtype=torch.float32)
        statistics_kernel[(self.programs,)](
            *self.tensors, self.mask, self.lengths, self.stats, *self.strides, self.heads, self.seq, self.count,
            *self.factors, **self.constants,
        )  # fmt: skip

    def rows(self, loss: Tensor, grad: Tensor | None) -> None:
        partial = self.tensors[0].new_empty(self.programs, dtype=torch.float32)
        passes = [(None, True), (grad, False)] if self.exact and grad is not None else [(grad, False)]
        for to, delta in passes:
            rows_kernel[(self.programs,)](
                *self.tensors, self.mask, self.lengths, self.stats, to, partial, *self.strides, self.batch, self.heads,
                self.seq, self.count, *self.factors, self.grad_factor, self.weight, SYMMETRIC=self.symmetric,
                DELTA=delta, RAISE=self.raised, **self.constants,
            )  # fmt: skip
        factor = _LN_2 if self.kind == "kl" else 1.0
        pairs = self.kind != "kl"
        sum_kernel[(1,)](
            partial, loss, self.lengths, self.programs, self.batch, self.heads, factor, self.weight, pairs, num_warps=8
        )

    def columns(self, grad: Tensor) -> None:
        columns_kernel[(self.programs,)](
            *self.tensors, self.mask, self.lengths, self.stats, grad, *self.strides, self.batch, self.heads,
            self.seq, self.count, *self.factors, self.grad_factor, self.weight, RAISE=self.raised, **self.constants,
        )  # fmt: skip


def raised(kind: str, dtype: torch.dtype) -> float:
    """What D is multiplied by while it is `dtype`."""
    if dtype != torch.float16:
        return 1.0
    return 2.0**-4 if kind == "scores" else 2.0**14


def constants_of(
    kind: str, tile: Tiles, dtypes: tuple[torch.dtype, torch.dtype], widths: tuple[int, int], seq: int
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "KIND": KINDS[kind].value,
        "RAGGED": seq % max(tile.own, tile.other) != 0,
        "OWN": tile.own,
        "OTHER": tile.other,
    }
    for name, dtype, width in zip(("STUDENT", "TEACHER"), dtypes, widths, strict=True):
        # Four chunks or more: a loop of two is unrolled, and the registers are short again.
        chunk = min(max(padded(width) // 4, 16), 32) if dtype == torch.float32 else padded(width)
        found |= {name: width, f"{name}_PADDED": padded(width), f"{name}_CHUNK": chunk}
    return found
