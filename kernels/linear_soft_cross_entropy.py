"""Soft cross entropy from hidden states and vocabulary matrices: the logits live in registers, a tile at a time.

1. `compact_kernel` lists the tokens that count, so that the others cost nothing, without waiting for their number.
2. `statistics_kernel` walks the vocabulary and keeps, for each token, both running log-sum-exps and the cross term;
   several programs share a token's vocabulary and `combine_kernel` joins what they found.
3. For the gradient the vocabulary is cut into slabs and the tokens into chunks. `difference_kernel` makes the logits of
   a slab and a chunk again and writes `softmax(student) - softmax(teacher)` in the student's dtype, few enough for the
   L2 cache; `hidden_kernel` and `weight_kernel` multiply it with weights and states, adding in float32 in fixed order.

Probabilities are made in float32 from float32 logits. The difference is rounded once, after the subtraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._losses import gradient_dtype, power_of_2, share_of, total, total_cost, total_specimens
from sparsebert.kernels._triton import INTERPRETED, Specimen, dot, multiprocessors, triton_type

__all__ = ["Plan", "Tiles", "cost", "linear_soft_cross_entropy", "plan", "specimens", "tiles", "workspace"]

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
GAIN = 1024.0
"""The differences are stored times this, a power of 2: float16 has few digits left below 6e-5."""
_COMPACT_BLOCK = 2048
_COMBINE_BLOCK = 128
_BUFFER = 2**25
"""Bytes of a slab's differences."""
_CHUNK = 4096
"""Tokens of a chunk."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of the products: of the logits, and of the gradients."""

    m: int
    n: int
    k: int
    statistics_n: int
    """Fewer words at a time: the running statistics need the registers."""
    warps: int
    stages: int
    grad_m: int
    grad_n: int
    grad_k: int
    grad_warps: int
    grad_stages: int


def tiles(tokens: int, vocabulary: int, student_width: int, bytes_per_element: int) -> Tiles:
    """The tiles for operands of `bytes_per_element` at the most."""
    wide = bytes_per_element > 2
    m = min(max(power_of_2(tokens), 16), 64 if wide else 128)
    n = min(max(power_of_2(vocabulary), 16), 64 if wide else 128)
    grad_n = min(max(power_of_2(student_width), 16), 64 if wide else 128)
    k = 32 if wide else 64
    warps = 8 if wide or m * n > 64 * 64 else 4
    return Tiles(
        m, n, k, min(n, 32 if wide else 64), warps, 3, m, grad_n, min(k, n), 8 if wide or m * grad_n > 64 * 64 else 4, 3
    )


@dataclass(frozen=True)
class Plan:
    """How a call is cut: parts of the vocabulary in the statistics, then slabs and chunks in the gradient."""

    parts: int
    per_part: int
    """Words of a part, a multiple of the tile's."""
    slab: int
    """Words of a slab, a multiple of the tile's."""
    chunk: int
    """Tokens of a chunk, a multiple of the tile's."""


def plan(tokens: int, vocabulary: int, tile: Tiles, bytes_per_element: int, programs: int) -> Plan:
    """The plan for a device that runs `programs` side by side; `bytes_per_element` of the student."""
    words, rows = -(-vocabulary // tile.statistics_n), max(-(-tokens // tile.m), 1)
    # Two waves at least, so that the last one is not all of it; a part has a word at least.
    parts = min(max(-(-2 * programs // rows), 1), words)
    per_part = -(-words // parts)
    chunk = min(rows * tile.m, max(_CHUNK // tile.m, 1) * tile.m)
    slab = min(max(_BUFFER // (chunk * bytes_per_element) // tile.n, 1), -(-vocabulary // tile.n))
    return Plan(-(-words // per_part), per_part * tile.statistics_n, slab * tile.n, chunk)


@triton.jit
def compact_kernel(keep, order, kept, tokens, BLOCK: tl.constexpr):
    """`order` `[tokens]` int32: those that count first, then the others, in order; `kept`: how many; one program."""
    place = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, tokens, BLOCK):
        count += (tl.load(keep + first + place, mask=place < tokens - first, other=0) != 0).to(tl.int32)
    whole = tl.sum(count, 0)
    tl.store(kept, whole.to(tl.int64))
    before = tl.zeros((1,), tl.int32)
    for first in range(0, tokens, BLOCK):
        inside = place < tokens - first
        counts = (tl.load(keep + first + place, mask=inside, other=0) != 0).to(tl.int32)
        rank = before + tl.cumsum(counts, 0) - counts
        other = whole + (first + place) - rank
        tl.store(order + tl.where(counts != 0, rank, other), first + place, mask=inside)
        before += tl.sum(counts, 0)


@triton.jit
def _rows_of(order, kept, first, tokens, BLOCK: tl.constexpr):
    """Which tokens the places `first`... stand for, and which places count."""
    place = first + tl.arange(0, BLOCK)
    if order is None:
        row, counts = place.to(tl.int64), place < tokens
    else:
        row = tl.load(order + place, mask=place < tokens, other=0).to(tl.int64)
        counts = place < tl.load(kept)
    return row, counts


@triton.jit
def _counted(kept, tokens):
    """How many tokens count."""
    if kept is None:  # noqa: SIM108 (a ternary would load from None)
        count = tokens
    else:
        count = tl.load(kept)
    return count


@triton.jit
def _logits(hidden, weight, bias, row, counts, word, inside, width, scale, M: tl.constexpr, N: tl.constexpr,
            K: tl.constexpr):  # fmt: skip
    """`[M, N]` float32: the logits of rows and words times `scale`; garbage outside."""
    inner = tl.arange(0, K)
    left = hidden + (row * width)[:, None] + inner[None, :]
    right = weight + (word * width)[None, :] + inner[:, None]
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, width, K):
        here = inner < width - k
        a = tl.load(left + k, mask=counts[:, None] & here[None, :], other=0.0)
        b = tl.load(right + k, mask=inside[None, :] & here[:, None], other=0.0)
        acc = dot(a, b, acc)
    if bias is not None:
        acc += tl.load(bias + word, mask=inside, other=0.0).to(tl.float32)[None, :]
    return acc * scale


@triton.jit
def _seen(top, mass, x):
    """A running maximum (base 2) and sum of exponentials with the columns of `x`; the old sum's factor and exp2(x)."""
    most = tl.maximum(top, tl.max(x, 1))
    # Nothing but -inf so far: its exponentials are 0, not those of -inf minus -inf.
    base = tl.where(most == float("-inf"), 0.0, most)
    old, exponentials = tl.exp2(top - base), tl.exp2(x - base[:, None])
    return most, mass * old + tl.sum(exponentials, 1), old, exponentials


@triton.jit
def statistics_kernel(
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, order, kept, stats,
    tokens, vocabulary, per_part, student_width, teacher_width, scale,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`stats` `[parts, 5, tokens]`: maximum and sum of student and teacher, cross term; `scale` = log2(e) / T."""
    first, part = tl.program_id(0).to(tl.int64) * M, tl.program_id(1).to(tl.int64)
    if first < _counted(kept, tokens):
        row, counts = _rows_of(order, kept, first, tokens, M)
        top_s, top_t = tl.full((M,), float("-inf"), tl.float32), tl.full((M,), float("-inf"), tl.float32)
        mass_s, mass_t = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
        cross = tl.zeros((M,), tl.float32)
        for step in range(0, per_part, N):
            word = part * per_part + step + tl.arange(0, N)
            inside = word < vocabulary
            s = _logits(student, student_weight, student_bias, row, counts, word, inside, student_width, scale, M, N, K)
            top_s, mass_s, _, _ = _seen(top_s, mass_s, tl.where(inside[None, :], s, float("-inf")))
            t = _logits(teacher, teacher_weight, teacher_bias, row, counts, word, inside, teacher_width, scale, M, N, K)
            top_t, mass_t, old, weights = _seen(top_t, mass_t, tl.where(inside[None, :], t, float("-inf")))
            cross = cross * old + tl.sum(tl.where(inside[None, :], weights * s, 0.0), 1)
        place = first + tl.arange(0, M)
        at = stats + part * 5 * tokens + place
        tl.store(at, top_s, mask=place < tokens)
        tl.store(at + tokens, mass_s, mask=place < tokens)
        tl.store(at + 2 * tokens, top_t, mask=place < tokens)
        tl.store(at + 3 * tokens, mass_t, mask=place < tokens)
        tl.store(at + 4 * tokens, cross, mask=place < tokens)


@triton.jit
def combine_kernel(stats, sums, partials, kept, tokens, parts, BLOCK: tl.constexpr):
    """`sums` `[2, tokens]`: log2-sum-exp2 of student and teacher; `partials`: a program's loss, in nats."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = place < _counted(kept, tokens)
    top_s, top_t = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    mass_s, mass_t = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    at = stats + place
    for _ in range(0, parts):
        new_s = tl.load(at, mask=counts, other=0.0)
        new_t = tl.load(at + 2 * tokens, mask=counts, other=0.0)
        most_s, most_t = tl.maximum(top_s, new_s), tl.maximum(top_t, new_t)
        base_s = tl.where(most_s == float("-inf"), 0.0, most_s)
        base_t = tl.where(most_t == float("-inf"), 0.0, most_t)
        more_s = tl.load(at + tokens, mask=counts, other=0.0)
        mass_s = mass_s * tl.exp2(top_s - base_s) + more_s * tl.exp2(new_s - base_s)
        old, new = tl.exp2(top_t - base_t), tl.exp2(new_t - base_t)
        mass_t = mass_t * old + tl.load(at + 3 * tokens, mask=counts, other=0.0) * new
        cross = cross * old + tl.load(at + 4 * tokens, mask=counts, other=0.0) * new
        top_s, top_t = most_s, most_t
        at += 5 * tokens
    sum_s, sum_t = top_s + tl.log2(mass_s), top_t + tl.log2(mass_t)
    tl.store(sums + place, sum_s, mask=counts)
    tl.store(sums + tokens + place, sum_t, mask=counts)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(counts, LN2 * (sum_s - cross / mass_t), 0.0), 0))


@triton.jit
def difference_kernel(
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, order, kept, sums, differences,
    bias_parts, chunk_start, slab_start, slab, tokens, vocabulary, student_width, teacher_width, scale, gain,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`differences` `[chunk, slab]`: gain * (softmax of student - of teacher); 0 outside. `bias_parts`: column sums."""
    tile = tl.program_id(0).to(tl.int64)
    first = chunk_start + tile * M
    if first < _counted(kept, tokens):
        row, counts = _rows_of(order, kept, first, tokens, M)
        column = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
        word = slab_start + column
        inside = word < vocabulary
        place = first + tl.arange(0, M)
        # Of inf: what does not count has no share of anything.
        s = _logits(student, student_weight, student_bias, row, counts, word, inside, student_width, scale, M, N, K)
        s = tl.exp2(s - tl.load(sums + place, mask=counts, other=float("inf"))[:, None])
        t = _logits(teacher, teacher_weight, teacher_bias, row, counts, word, inside, teacher_width, scale, M, N, K)
        t = tl.exp2(t - tl.load(sums + tokens + place, mask=counts, other=float("inf"))[:, None])
        difference = tl.where(inside[None, :], (s - t) * gain, 0.0)
        at = (tile * M + tl.arange(0, M))[:, None] * slab + column[None, :]
        tl.store(differences + at, difference.to(differences.dtype.element_ty))
        if bias_parts is not None:
            # The zeros in place of what does not count give NaN with an infinite weight.
            difference = tl.where(counts[:, None], difference, 0.0)
            tl.store(bias_parts + (first // M) * vocabulary + word, tl.sum(difference, 0), mask=inside)


@triton.jit
def hidden_kernel(
    differences, weight, sum_so_far, grad, order, kept, chunk_start, slab_start, words, slab, tokens, width, factor,
    FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Adds a slab's differences times its weights to `sum_so_far` `[tokens, width]` fp32, by place; at last `grad`."""
    tile = tl.program_id(0).to(tl.int64)
    first = chunk_start + tile * M
    column = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    inside = column < width
    place = first + tl.arange(0, M)
    row, counts = _rows_of(order, kept, first, tokens, M)
    acc = tl.zeros((M, N), tl.float32)
    own = sum_so_far + (place * width)[:, None] + column[None, :]
    exists = counts[:, None] & inside[None, :]
    if first < _counted(kept, tokens):
        inner = tl.arange(0, K)
        left = differences + ((tile * M + tl.arange(0, M)) * slab)[:, None] + inner[None, :]
        right = weight + ((slab_start + inner).to(tl.int64) * width)[:, None] + column[None, :]
        for k in range(0, words, K):
            here = inner < words - k
            a = tl.load(left + k, mask=here[None, :], other=0.0)
            b = tl.load(right, mask=here[:, None] & inside[None, :], other=0.0)
            acc = dot(a, b, acc)
            right += K * width
        # Not before the loop, over which the addresses would take registers.
        if not FIRST:
            acc += tl.load(own, mask=exists, other=0.0)
        if not LAST:
            tl.store(own, acc, mask=exists)
    if LAST:
        # The tokens that do not count get zeros.
        result = tl.where(counts[:, None], acc * share_of(kept, factor), 0.0)
        at = grad + (row * width)[:, None] + column[None, :]
        tl.store(at, result.to(grad.dtype.element_ty), mask=(place < tokens)[:, None] & inside[None, :])


@triton.jit
def weight_kernel(
    differences, hidden, sum_so_far, grad, order, kept, chunk_start, slab_start, words, slab, chunk, tokens, width,
    factor, FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Adds a chunk's differences, transposed, times its states to `sum_so_far` `[slab, width]` fp32; at last `grad`."""
    column = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    across = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    exists = (column < words)[:, None] & (across < width)[None, :]
    own = sum_so_far + (column * width)[:, None] + across[None, :]
    acc = tl.zeros((M, N), tl.float32)
    inner = tl.arange(0, K)
    # The interpreter cannot take a loop's end from memory; what lies past it is masked either way.
    bound = chunk if INTERPRETED else tl.minimum(_counted(kept, tokens) - chunk_start, chunk)
    for k in range(0, bound, K):
        row, counts = _rows_of(order, kept, chunk_start + k, tokens, K)
        a = tl.load(
            differences + (k + inner).to(tl.int64)[None, :] * slab + column[:, None],
            mask=counts[None, :] & (column < words)[:, None], other=0.0,
        )  # fmt: skip
        b = tl.load(
            hidden + (row * width)[:, None] + across[None, :],
            mask=counts[:, None] & (across < width)[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc)
    if not FIRST:
        acc += tl.load(own, mask=exists, other=0.0)
    if LAST:
        at = grad + ((slab_start + column) * width)[:, None] + across[None, :]
        tl.store(at, (acc * share_of(kept, factor)).to(grad.dtype.element_ty), mask=exists)
    else:
        tl.store(own, acc, mask=exists)


def linear_soft_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, gradients to the student's hidden, weight and bias)`; a gradient is `[0]` where not needed."""
    call = _Call(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        keep,
        temperature,
    )
    loss = call.loss()
    return loss, *call.gradients(need_hidden, need_weight, need_bias)


_Side = tuple[Tensor, Tensor, "Tensor | None"]


class _Call:
    """One call's tensors and plan."""

    def __init__(self, student: _Side, teacher: _Side, keep: Tensor | None, temperature: float) -> None:
        self.student, self.teacher = student, teacher
        self.like = student[0]
        self.tokens, self.width = student[0].shape
        self.vocabulary = student[1].shape[0]
        widest = max(student[0].element_size(), teacher[0].element_size())
        self.tile = tiles(self.tokens, self.vocabulary, self.width, widest)
        programs = multiprocessors(self.like.device)
        self.plan = plan(self.tokens, self.vocabulary, self.tile, self.like.element_size(), programs)
        self.temperature, self.scale = temperature, LOG2E / temperature
        self.order = self.kept = None
        if keep is not None and self.tokens:
            self.order, self.kept = self._new(self.tokens, torch.int32), self._new((), torch.int64)
            compact_kernel[(1,)](keep, self.order, self.kept, self.tokens, BLOCK=_COMPACT_BLOCK, num_warps=8)
        self.share = 1.0 if keep is not None else 1.0 / max(self.tokens, 1)
        self.logits = {"M": self.tile.m, "N": self.tile.n, "K": self.tile.k}
        self.options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}

    def _new(self, shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def loss(self) -> Tensor:
        """The statistics of every token that counts, and the loss of them all."""
        tokens, cut = self.tokens, self.plan
        if tokens == 0:
            return torch.zeros((), dtype=torch.float32, device=self.like.device)
        self.sums, stats = self._new((2, tokens)), self._new((cut.parts, 5, tokens))
        statistics_kernel[(-(-tokens // self.tile.m), cut.parts)](
            *self.student, *self.teacher, self.order, self.kept, stats, tokens, self.vocabulary, cut.per_part,
            self.width, self.teacher[0].shape[1], self.scale,
            **self.logits | {"N": self.tile.statistics_n}, **self.options,
        )  # fmt: skip
        programs = -(-tokens // _COMBINE_BLOCK)
        partials = self._new(programs)
        combine_kernel[(programs,)](
            stats, self.sums, partials, self.kept, tokens, cut.parts, BLOCK=_COMBINE_BLOCK, num_warps=4
        )
        return total(partials, self.kept, self.temperature**2 * self.share)

    def gradients(self, need_hidden: bool, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to hidden states, weight and bias, slab by slab and chunk by chunk."""
        dtype = gradient_dtype(self.like.dtype)
        of_hidden = self._new(tuple(self.like.shape) if need_hidden else 0, dtype)
        of_weight = self._new((self.vocabulary, self.width) if need_weight else 0, dtype)
        if self.tokens == 0 or self.width == 0 or not (need_hidden or need_weight or need_bias):
            bias = torch.zeros(self.vocabulary if need_bias else 0, dtype=dtype, device=self.like.device)
            return of_hidden.zero_(), of_weight.zero_(), bias
        cut, tile, vocabulary = self.plan, self.tile, self.vocabulary
        slabs, chunks = range(0, vocabulary, cut.slab), range(0, self.tokens, cut.chunk)
        differences = self._new((cut.chunk, cut.slab), self.like.dtype)
        # Tiles of tokens that do not count write no column sums.
        rows = -(-self.tokens // tile.m) if need_bias else 0
        bias_parts = torch.zeros((rows, vocabulary), device=self.like.device) if need_bias else None
        hidden_sum = self._new((self.tokens, self.width) if need_hidden and len(slabs) > 1 else 1)
        weight_sum = self._new((cut.slab, self.width) if need_weight and len(chunks) > 1 else 1)
        factor = self.temperature * self.share / GAIN
        for slab in slabs:
            words = min(cut.slab, vocabulary - slab)
            for chunk in chunks:
                self._differences(differences, bias_parts, chunk, slab, words)
                count = min(cut.chunk, self.tokens - chunk)
                if need_hidden:
                    ends = {"FIRST": slab == 0, "LAST": slab == slabs[-1]}
                    hidden_kernel[self._grid(count, tile.grad_m)](
                        differences, self.student[1], hidden_sum, of_hidden, self.order, self.kept, chunk, slab, words,
                        cut.slab, self.tokens, self.width, factor, **ends, **self._grad_options(),
                    )  # fmt: skip
                if need_weight:
                    ends = {"FIRST": chunk == 0, "LAST": chunk == chunks[-1]}
                    weight_kernel[self._grid(words, tile.grad_m)](
                        differences, self.like, weight_sum, of_weight, self.order, self.kept, chunk, slab, words,
                        cut.slab, cut.chunk, self.tokens, self.width, factor, **ends, **self._grad_options(),
                    )  # fmt: skip
        return of_hidden, of_weight, self._bias_gradient(bias_parts, factor, dtype)

    def _grid(self, rows: int, tile: int) -> tuple[int, int]:
        return -(-rows // tile), -(-self.width // self.tile.grad_n)

    def _grad_options(self) -> dict[str, int]:
        tile = self.tile
        return {
            "M": tile.grad_m, "N": tile.grad_n, "K": tile.grad_k,
            "num_warps": tile.grad_warps, "num_stages": tile.grad_stages,
        }  # fmt: skip

    def _differences(self, out: Tensor, bias_parts: Tensor | None, chunk: int, slab: int, words: int) -> None:
        rows = min(self.plan.chunk, self.tokens - chunk)
        difference_kernel[(-(-rows // self.tile.m), -(-words // self.tile.n))](
            *self.student, *self.teacher, self.order, self.kept, self.sums, out, bias_parts, chunk, slab,
            self.plan.slab, self.tokens, self.vocabulary, self.width, self.teacher[0].shape[1], self.scale, GAIN,
            **self.logits, **self.options,
        )  # fmt: skip

    def _bias_gradient(self, parts: Tensor | None, factor: float, dtype: torch.dtype) -> Tensor:
        if parts is None:
            return self._new(0, dtype)
        whole = parts.sum(0) * factor
        return (whole if self.kept is None else whole / self.kept.clamp(min=1)).to(dtype)


def specimens() -> list[Specimen]:
    """Every kernel it may launch: of each dtype at its full tiles, of bfloat16 for few tokens too."""
    half = torch.bfloat16
    pairs = [(d, d) for d in (torch.float32, half, torch.float16)] + [(half, torch.float32), (torch.float32, half)]
    made = [one for pair in pairs for one in _specimens(pair, 4096, True, True)]
    made += [one for tokens in (16, 64) for one in _specimens((half, half), tokens, True, True)]
    made += _specimens((half, half), 4096, False, False)
    place = {"order": "*i32", "kept": "*i64", "tokens": "i32"}
    made.append(Specimen("compact", compact_kernel, {"keep": "*i1"} | place, {"BLOCK": _COMPACT_BLOCK}, warps=8))
    signature = {
        "stats": "*fp32",
        "sums": "*fp32",
        "partials": "*fp32",
        "kept": "*i64",
        "tokens": "i32",
        "parts": "i32",
    }
    made.append(Specimen("combine", combine_kernel, signature, {"BLOCK": _COMBINE_BLOCK}))
    return made + total_specimens()


def _specimens(dtypes: tuple[torch.dtype, torch.dtype], tokens: int, masked: bool, biased: bool) -> list[Specimen]:
    tile = tiles(tokens, 30522, 768, max(d.itemsize for d in dtypes))
    mine, theirs = (f"*{triton_type(d)}" for d in dtypes)
    grad = f"*{triton_type(gradient_dtype(dtypes[0]))}"
    side = {"student": mine, "student_weight": mine, "student_bias": mine}
    sides = side | {"teacher": theirs, "teacher_weight": theirs, "teacher_bias": theirs}
    place = {"order": "*i32", "kept": "*i64"}
    ints = {"tokens": "i32", "vocabulary": "i32", "per_part": "i32", "student_width": "i32", "teacher_width": "i32"}
    statistics = sides | place | {"stats": "*fp32"} | ints | {"scale": "fp32"}
    cut = {"chunk_start": "i32", "slab_start": "i32", "slab": "i32"}
    ints.pop("per_part")
    difference = sides | place | {"sums": "*fp32", "differences": mine, "bias_parts": "*fp32"} | cut | ints
    difference |= {"scale": "fp32", "gain": "fp32"}
    product = {"differences": mine, "weight": mine, "hidden": mine, "sum_so_far": "*fp32", "grad": grad} | place | cut
    product |= {"words": "i32", "chunk": "i32", "tokens": "i32", "width": "i32", "factor": "fp32"}
    logits = {"M": tile.m, "N": tile.n, "K": tile.k}
    grads = {"M": tile.grad_m, "N": tile.grad_n, "K": tile.grad_k}
    wanted: list[tuple[str, Any, dict[str, str], dict[str, int]]] = [
        ("statistics", statistics_kernel, statistics, logits | {"N": tile.statistics_n}),
        ("differences", difference_kernel, difference, logits),
    ]
    for first, last in ((True, True), (True, False), (False, True), (False, False)):
        ends = grads | {"FIRST": first, "LAST": last}
        wanted.append((f"hidden{first:d}{last:d}", hidden_kernel, product, ends))
        wanted.append((f"weight{first:d}{last:d}", weight_kernel, product, ends))
    absent = [] if masked else ["order", "kept"]
    absent += [] if biased else ["student_bias", "teacher_bias", "bias_parts"]
    made = []
    for label, kernel, signature, constants in wanted:
        names = [name for name in kernel.arg_names if name in signature]
        ours = kernel in (statistics_kernel, difference_kernel)
        made.append(
            Specimen(
                ", no ".join(
                    [f"{label} {mine[1:]}/{theirs[1:]} {tile.m}x{tile.n}", *[n for n in absent if n in names]]
                ),
                kernel,
                {name: signature[name] for name in names if name not in absent},
                constants | dict.fromkeys(n for n in absent if n in names),
                warps=tile.warps if ours else tile.grad_warps,
                stages=tile.stages if ours else tile.grad_stages,
                divisible_by_16=(
                    "student_width",
                    "teacher_width",
                    "width",
                    "slab",
                    "slab_start",
                    "chunk_start",
                    "chunk",
                ),
            )
        )
    return made


def cost(
    tokens: int, vocabulary: int, student_width: int, teacher_width: int,
    student_bytes: int = 2, teacher_bytes: int = 2,
    need_grad: bool = True, masked: bool = False, biased: bool = True, programs: int = 132,
) -> Cost:  # fmt: skip
    """What a call moves and computes, with every token counting and all gradients or none.

    `programs` is the device's multiprocessors. The token tiles that run side by side walk the vocabulary together, so a
    weight is read once for as many of them.
    """
    tile = tiles(tokens, vocabulary, student_width, max(student_bytes, teacher_bytes))
    cut = plan(tokens, vocabulary, tile, student_bytes, programs)
    rows = -(-tokens // tile.m)
    both, states = student_width * student_bytes + teacher_width * teacher_bytes, tokens * student_width
    biases = biased * vocabulary * (student_bytes + teacher_bytes)
    padded, stats = rows * tile.m, 20 * cut.parts * tokens
    flops = 2 * padded * cut.parts * cut.per_part * (student_width + teacher_width)
    passes = -(-rows // programs)
    found = Cost(tokens, 4 * tokens + 8, tokens) if masked else Cost(0, 0, 0, 0)
    found += Cost(passes * (vocabulary * both + biases) + tokens * cut.parts * both, stats, flops)
    partials = -(-tokens // _COMBINE_BLOCK)
    found += Cost(stats, 8 * tokens + 4 * partials, 12 * tokens * cut.parts) + total_cost(partials)
    if not need_grad:
        return found
    slabs, chunks = -(-vocabulary // cut.slab), -(-tokens // cut.chunk)
    launches, words = slabs * chunks, -(-vocabulary // tile.n) * tile.n
    differences = padded * words * student_bytes
    columns = 4 * rows * vocabulary if biased else 0
    flops = 2 * padded * words * (student_width + teacher_width)
    found += Cost(
        chunks * (vocabulary * both + biases) + slabs * tokens * (both + 8), differences + columns, flops, launches
    )
    # Each product reads the differences, its other operand and the sum so far, and writes the sum or the gradient.
    sums = 4 * (slabs - 1) * states
    weights = vocabulary * student_width
    found += Cost(differences + chunks * weights * student_bytes + sums, sums + states * student_bytes,
                  2 * padded * vocabulary * student_width, launches)  # fmt: skip
    sums = 4 * (chunks - 1) * weights
    found += Cost(differences + slabs * states * student_bytes + sums, sums + weights * student_bytes,
                  2 * words * tokens * student_width, launches)  # fmt: skip
    return found + (Cost(columns, vocabulary * student_bytes, rows * vocabulary) if biased else Cost(0, 0, 0, 0))


def workspace(tokens: int, vocabulary: int, width: int, bytes_per_element: int, programs: int = 132) -> int:
    """Bytes of device memory that a call takes beside its gradients, the bias's column sums included."""
    tile = tiles(tokens, vocabulary, width, bytes_per_element)
    cut = plan(tokens, vocabulary, tile, bytes_per_element, programs)
    sums = (tokens * width if cut.slab < vocabulary else 1) + (cut.slab * width if cut.chunk < tokens else 1)
    columns = -(-tokens // tile.m) * vocabulary
    stats = (2 + 5 * cut.parts) * tokens
    return cut.chunk * cut.slab * bytes_per_element + 4 * (sums + columns + stats) + 4 * tokens
