"""Soft cross entropy of two sets of logits, and its gradient to the student's, in one pass over device memory.

Rows that fit a multiprocessor's registers are read once and stay there (`resident_kernel`), many short ones a program.
Longer ones are walked twice (`streaming_kernel`): for the statistics, then for the gradient, when they come from the L2
cache, since only one long row a multiprocessor is under way. Either way the device's memory moves each logit once and
its gradient once. All arithmetic is float32 on the logits as they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._losses import (
    count_of,
    gradient_dtype,
    power_of_2,
    share_of,
    total,
    total_cost,
    total_specimens,
)
from sparsebert.kernels._triton import Specimen, triton_type

__all__ = ["Tiles", "cost", "soft_cross_entropy", "specimens", "tiles"]

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
_AHEAD = 64 * 1024
"""Bytes that a program of `streaming_kernel` asks for ahead of their use."""
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
"""Below every logit but -inf: a running maximum that starts at -inf would make NaN of the first one."""


@dataclass(frozen=True)
class Tiles:
    """How the rows are cut into programs."""

    rows: int
    """Rows of a program."""
    block: int
    """Classes taken at a time: all of them in `resident_kernel`."""
    resident: bool
    warps: int
    stages: int = 1

    def constants(self, vector: int) -> dict[str, int]:
        """The kernel's own, for loads of `vector` classes."""
        if self.resident:
            return {"ROWS": self.rows, "BLOCK": self.block, "VECTOR": vector}
        lanes = min(32 * self.warps * vector, self.block)
        return {"BLOCK": self.block, "LANES": lanes, "VECTOR": vector, "STAGES": self.stages}


def tiles(classes: int, bytes_per_class: int) -> Tiles:
    """The tiles for rows of `classes`, `bytes_per_class` of student and teacher together."""
    block = max(power_of_2(classes), 2)
    if block <= 8192:
        rows = max(2048 // block, 1)
        # 16 classes a thread at the most leave room for the exponentials of both.
        return Tiles(rows, block, True, min(max(rows * block // 512, 4), 16))
    # What is under way is to stay in the L2 cache: two rows a multiprocessor, or one of twice the threads.
    warps = 8 if classes * bytes_per_class <= 128 * 1024 else 16
    # 16 classes a thread; of float32 half of that, which sm_80 has registers for.
    block = 512 * warps if bytes_per_class <= 4 else 4096
    return Tiles(1, block, False, warps, 1 + _AHEAD // (block * bytes_per_class))


@triton.jit
def resident_kernel(
    student, teacher, mask, kept, grad, partials, rows, groups, scale, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`ROWS` whole rows of `groups` x `VECTOR` classes a program.

    `scale` = log2(e) / T; `factor` = T, over the rows too where all count. Without `grad` there is none.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counts = row < rows
    if mask is not None:
        counts = counts & (tl.load(mask + row, mask=counts, other=0) != 0)
    column = tl.arange(0, BLOCK)
    # As a product with a constant the compiler knows that it may load `VECTOR` at a time up to the very end.
    classes = groups * VECTOR
    inside = (column < classes)[None, :]
    offsets = tl.multiple_of(row * classes, VECTOR)[:, None] + column[None, :]
    s = tl.load(student + offsets, mask=counts[:, None] & inside, other=float("-inf")).to(tl.float32)
    t = tl.load(teacher + offsets, mask=counts[:, None] & inside, other=float("-inf")).to(tl.float32)
    # Differences first: a product of huge logits would be rounded by more than they differ.
    s = (s - tl.max(s, 1)[:, None]) * scale
    t = (t - tl.max(t, 1)[:, None]) * scale
    exp_s, exp_t = tl.exp2(s), tl.exp2(t)
    sum_s, sum_t = tl.sum(exp_s, 1), tl.sum(exp_t, 1)
    cross = tl.sum(tl.where(inside, exp_t * s, 0.0), 1)
    lost = LN2 * (tl.log2(sum_s) - cross / sum_t)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(counts, lost, 0.0), 0))
    if grad is not None:
        difference = exp_s * (1.0 / sum_s)[:, None] - exp_t * (1.0 / sum_t)[:, None]
        difference = tl.where(counts[:, None], difference * share_of(kept, factor), 0.0)
        tl.store(grad + offsets, difference.to(grad.dtype.element_ty), mask=(row < rows)[:, None] & inside)


@triton.jit
def _pair(
    student, teacher, start, first, classes, other, policy: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`BLOCK` classes of a row from `first` on, `[BLOCK / LANES, LANES]` float32 of both, and which there are: all
    where WHOLE."""
    place, inside = _places(classes - first, BLOCK, LANES)
    # A scalar address and constant distances from it: 64-bit sums for each class would take as long as the arithmetic.
    at = tl.multiple_of(start + first, VECTOR)
    if WHOLE:
        s = tl.load(student + at + place, eviction_policy=policy)
        t = tl.load(teacher + at + place, eviction_policy=policy)
    else:
        s = tl.load(student + at + place, mask=inside, other=other, eviction_policy=policy)
        t = tl.load(teacher + at + place, mask=inside, other=other, eviction_policy=policy)
    return s.to(tl.float32), t.to(tl.float32), inside


@triton.jit
def _places(left, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Where the classes of a step lie from its first on, and which of them are among the `left` ones."""
    place = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return place, place < left


@triton.jit
def _add(s, t, inside, top_s, mass_s, top_t, mass_t, cross, scale, WHOLE: tl.constexpr):
    """By lane: both running maxima and sums of exponentials, and the cross term, with the rows of `s` and `t` added."""
    most_s, most_t = tl.maximum(top_s, tl.max(s, 0)), tl.maximum(top_t, tl.max(t, 0))
    s, exp_t = (s - most_s[None, :]) * scale, tl.exp2((t - most_t[None, :]) * scale)
    # Counted from the lane's largest student logit, which keeps its numbers small.
    term = exp_t * s if WHOLE else tl.where(inside, exp_t * s, 0.0)
    less, old = (top_s - most_s) * scale, tl.exp2((top_t - most_t) * scale)
    cross = tl.where(mass_t > 0, cross + mass_t * less, 0.0) * old + tl.sum(term, 0)
    mass_s = mass_s * tl.exp2(less) + tl.sum(tl.exp2(s), 0)
    return most_s, mass_s, most_t, mass_t * old + tl.sum(exp_t, 0), cross


@triton.jit
def streaming_kernel(
    student, teacher, mask, kept, grad, partials, rows, groups, scale, factor,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row a program, `BLOCK` classes at a time, twice; other arguments as of `resident_kernel`.

    The last step alone has a mask: instructions are as scarce as bytes here. For the same reason a thread keeps one
    maximum for all classes of a lane, not one for each that it holds.
    """
    row = tl.program_id(0).to(tl.int64)
    classes = groups * VECTOR
    start = row * classes
    whole = classes // BLOCK * BLOCK
    place, _ = _places(0, BLOCK, LANES)
    counts = True
    if mask is not None:
        counts = tl.load(mask + row) != 0
    lost = 0.0
    if counts:
        low: tl.constexpr = float("-inf")
        top_s, top_t = tl.full((LANES,), LOWEST, tl.float32), tl.full((LANES,), LOWEST, tl.float32)
        mass_s, mass_t = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
        cross = tl.zeros((LANES,), tl.float32)
        # The stages ask for loads ahead of their use; without them a lone program would wait for each.
        for first in tl.range(0, whole, BLOCK, num_stages=STAGES):
            s, t, inside = _pair(student, teacher, start, first, classes, low, "evict_last", BLOCK, LANES, VECTOR, True)
            top_s, mass_s, top_t, mass_t, cross = _add(s, t, inside, top_s, mass_s, top_t, mass_t, cross, scale, True)
        if whole < classes:
            s, t, inside = _pair(
                student, teacher, start, whole, classes, low, "evict_last", BLOCK, LANES, VECTOR, False
            )
            top_s, mass_s, top_t, mass_t, cross = _add(s, t, inside, top_s, mass_s, top_t, mass_t, cross, scale, False)
        most_s, most_t = tl.max(top_s, 0), tl.max(top_t, 0)
        sum_s = tl.sum(mass_s * tl.exp2((top_s - most_s) * scale), 0)
        share_t = tl.exp2((top_t - most_t) * scale)
        moved = tl.where(mass_t == 0, 0.0, cross + mass_t * ((top_s - most_s) * scale))
        sum_t, sum_cross = tl.sum(mass_t * share_t, 0), tl.sum(moved * share_t, 0)
        lost = LN2 * (tl.log2(sum_s) - sum_cross / sum_t)
        if grad is not None:
            share = share_of(kept, factor)
            share_s, share_t = share / sum_s, share / sum_t
            for first in tl.range(0, whole, BLOCK, num_stages=STAGES):
                s, t, inside = _pair(
                    student, teacher, start, first, classes, 0.0, "evict_first", BLOCK, LANES, VECTOR, True
                )
                difference = tl.exp2((s - most_s) * scale) * share_s - tl.exp2((t - most_t) * scale) * share_t
                tl.store(grad + tl.multiple_of(start + first, VECTOR) + place, difference.to(grad.dtype.element_ty))
            if whole < classes:
                s, t, inside = _pair(
                    student, teacher, start, whole, classes, 0.0, "evict_first", BLOCK, LANES, VECTOR, False
                )
                difference = tl.exp2((s - most_s) * scale) * share_s - tl.exp2((t - most_t) * scale) * share_t
                at = tl.multiple_of(start + whole, VECTOR) + place
                tl.store(grad + at, difference.to(grad.dtype.element_ty), mask=inside)
    elif grad is not None:
        column = tl.arange(0, BLOCK)
        for first in range(0, classes, BLOCK):
            at = tl.multiple_of(start + first, VECTOR) + column
            tl.store(grad + at, tl.zeros((BLOCK,), grad.dtype.element_ty), mask=column < classes - first)
    tl.store(partials + row, lost)


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, temperature: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """`(loss, its gradient to the student)`; the gradient is `[0]` where not needed."""
    classes = student_logits.shape[-1]
    rows = student_logits.numel() // classes
    dtype = gradient_dtype(student_logits.dtype)
    grad = student_logits.new_empty(student_logits.shape if need_grad else 0, dtype=dtype)
    if rows == 0:
        return torch.zeros((), dtype=torch.float32, device=student_logits.device), grad
    bytes_each = student_logits.element_size(), teacher_logits.element_size()
    tile, vector = tiles(classes, sum(bytes_each)), gcd(classes, 16 // min(bytes_each))
    programs = -(-rows // tile.rows)
    partials = torch.empty(programs, dtype=torch.float32, device=student_logits.device)
    kept = count_of(mask)
    share = 1.0 if mask is not None else 1.0 / rows
    kernel = resident_kernel if tile.resident else streaming_kernel
    kernel[(programs,)](
        student_logits, teacher_logits, mask, kept, grad if need_grad else None, partials, rows, classes // vector,
        LOG2E / temperature, temperature * share,
        **tile.constants(vector), num_warps=tile.warps,
    )  # fmt: skip
    return total(partials, kept, temperature * temperature * share), grad


def specimens() -> list[Specimen]:
    """Every kernel it may launch: rows short, long and longest, of each dtype."""
    pairs = [(d, d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    mixed = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    made = [_specimen(pair, classes, True, True) for pair in pairs for classes in (3, 100, 1000, 8192, 30522, 50265)]
    made += [_specimen(pair, classes, True, True) for pair in mixed for classes in (3, 1000, 30522)]
    bare = [(False, True), (True, False), (False, False)]
    made += [_specimen(pairs[1], classes, *which) for classes in (3, 30522) for which in bare]
    return made + total_specimens()


def _specimen(dtypes: tuple[torch.dtype, torch.dtype], classes: int, masked: bool, need_grad: bool) -> Specimen:
    tile = tiles(classes, sum(d.itemsize for d in dtypes))
    student, teacher = (triton_type(d) for d in dtypes)
    signature = {"student": f"*{student}", "teacher": f"*{teacher}", "mask": "*i1", "kept": "*i64"}
    signature |= {"grad": f"*{triton_type(gradient_dtype(dtypes[0]))}", "partials": "*fp32"}
    signature |= {"rows": "i32", "groups": "i32", "scale": "fp32", "factor": "fp32"}
    vector = gcd(classes, 16 // min(d.itemsize for d in dtypes))
    absent = [name for name, there in (("mask", masked), ("kept", masked), ("grad", need_grad)) if not there]
    label = f"{student}/{teacher} {classes} classes"
    return Specimen(
        ", no ".join([label, *absent]),
        resident_kernel if tile.resident else streaming_kernel,
        {name: kind for name, kind in signature.items() if name not in absent},
        {**tile.constants(vector), **dict.fromkeys(absent)},
        warps=tile.warps,
        divisible_by_16=("groups",) if classes // vector % 16 == 0 else (),
    )


def cost(
    rows: int,
    classes: int,
    student_bytes: int = 2,
    teacher_bytes: int = 2,
    need_grad: bool = True,
    masked: bool = False,
) -> Cost:
    """What a call moves and computes, with every row counting; `*_bytes`: of a logit. Exponentials count as one."""
    tile = tiles(classes, student_bytes + teacher_bytes)
    programs = -(-rows // tile.rows)
    read = rows * classes * (student_bytes + teacher_bytes) + (rows if masked else 0)
    written = rows * classes * student_bytes * need_grad + 4 * programs
    # A maximum, a difference, a scale, an exponential and a sum of each, the cross term; then the gradient.
    flops = rows * classes * (12 + (4 if need_grad else 0))
    return Cost(read, written, flops) + total_cost(programs, rows if masked else None)
