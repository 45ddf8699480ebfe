"""What the kernels of `_attention_map` move and compute, and how they are compiled without a GPU."""

from __future__ import annotations

import torch

from sparsebert.kernels._attention_map import (
    STATISTICS,
    columns_kernel,
    constants_of,
    lengths_kernel,
    padded,
    raised,
    rows_kernel,
    statistics_kernel,
    sum_kernel,
    tiles,
)
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._losses import gradient_dtype
from sparsebert.kernels._triton import Specimen, triton_type

__all__ = ["map_cost", "map_specimens"]


def map_cost(
    kind: str,
    batch: int,
    heads: int,
    seq: int,
    widths: tuple[int, int],
    element: tuple[int, int],
    need_grad: bool,
    masked: bool,
    symmetric: bool = False,
) -> Cost:
    """What a call moves and computes; `widths` and `element` (bytes) are the student's and the teacher's.

    A head's tensors are read from memory once a pass: its tiles run side by side and find them in the cache.
    """
    tile = tiles(seq, *widths, 4 in element, symmetric)
    count = -(-seq // tile.own)
    pairs = batch * heads * count * tile.own * -(-seq // tile.other) * tile.other
    rows = batch * heads * seq
    scores_flops = 2 * pairs * (padded(widths[0]) + padded(widths[1]))
    gradient_flops = 2 * pairs * padded(widths[0])
    student, teacher = (width * size * rows for width, size in zip(widths, element, strict=True))
    tensors = (1 if symmetric else 2) * (student + teacher) + masked * batch * seq
    stats = 4 * rows * STATISTICS[kind]
    partial = 4 * batch * heads * count
    total = Cost(masked * batch * seq, masked * 8 * batch, 0, int(masked))
    if kind != "scores":
        total += Cost(tensors, stats, scores_flops)
    total += Cost(tensors + stats, partial + need_grad * student, scores_flops + need_grad * gradient_flops)
    if need_grad and kind == "mse" and 4 in element:
        total += Cost(tensors + stats, partial + 4 * rows, scores_flops)
    total += Cost(partial, 4, 0)
    if need_grad and not symmetric:
        total += Cost(tensors + stats, student, scores_flops + gradient_flops)
    return total


_POINTERS = ("student_q", "student_k", "teacher_q", "teacher_k")
_STRIDES = tuple(f"{name}_{axis}" for name in ("sq", "sk", "tq", "tk") for axis in ("batch", "head", "token"))


def map_specimens(kind: str, symmetric: bool = False, helpers: bool = False) -> list[Specimen]:
    """The kernels of one kind of loss: the dtypes, every tile, with and without a mask."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [
        (bf16, bf16, 64, 64, True),
        (bf16, bf16, 64, 64, False),
        (bf16, bf16, 128, 128, True),
        (bf16, bf16, 256, 256, True),
        (fp16, fp16, 64, 64, True),
        (fp32, fp32, 64, 64, True),
        (fp32, fp32, 128, 128, True),
        (fp32, fp32, 256, 256, True),
        (bf16, fp32, 64, 64, True),
    ]
    found = [specimen for case in cases for specimen in _specimens(kind, symmetric, *case)]
    if helpers:
        lengths = {"mask": "*u8", "lengths": "*i32", "batch": "i32", "seq": "i32"}
        found.append(Specimen("lengths", lengths_kernel, lengths, {"BLOCK": 1024}))
        sums = {"partial": "*fp32", "loss": "*fp32", "lengths": "*i32", "programs": "i32", "batch": "i32"}
        sums |= {"heads": "i32", "factor": "fp32", "weight": "fp32"}
        found.append(Specimen("sum", sum_kernel, sums, {"PAIRS": True}, warps=8))
    return found


def _specimens(
    kind: str, symmetric: bool, student: torch.dtype, teacher: torch.dtype, width: int, other: int, masked: bool
) -> list[Specimen]:
    tile = tiles(512, width, other, torch.float32 in (student, teacher), symmetric)
    constants = constants_of(kind, tile, (student, teacher), (width, other), 512) | {"RAGGED": masked}
    mine, theirs = triton_type(student), triton_type(teacher)
    tensors = dict(zip(_POINTERS, (f"*{t}" for t in (mine, mine, theirs, theirs)), strict=True))
    if masked:
        tensors |= {"mask": "*u8", "lengths": "*i32"}
    else:
        constants |= {"mask": None, "lengths": None}
    if kind != "scores":
        tensors |= {"stats": "*fp32"}
    else:
        constants |= {"stats": None}
    numbers = {
        **dict.fromkeys(_STRIDES, "i32"),
        **dict.fromkeys(("batch", "heads", "seq", "count"), "i32"),
        **dict.fromkeys(("student_factor", "teacher_factor", "grad_factor", "weight"), "fp32"),
    }
    named = f"{kind} {mine}/{theirs} {width}/{other}{' masked' if masked else ''} {tile.own}x{tile.other}"
    gradient = constants | {"RAISE": raised(kind, student)}
    usual = gradient | {"SYMMETRIC": symmetric, "DELTA": False}
    grad = f"*{triton_type(gradient_dtype(student))}"
    made = [("rows", rows_kernel, {"grad": grad, "partial": "*fp32"}, usual)]
    if kind == "mse" and torch.float32 in (student, teacher):
        made.append(("delta", rows_kernel, {"partial": "*fp32"}, usual | {"DELTA": True, "grad": None}))
    if not symmetric:
        made.append(("columns", columns_kernel, {"grad": grad}, gradient))
    if kind != "scores":
        made.append(("statistics", statistics_kernel, {}, constants))
    specimens = []
    for name, kernel, outputs, fixed in made:
        wanted = {**tensors, **outputs, **numbers}
        signature = {key: wanted[key] for key in kernel.arg_names if key in wanted}
        label = f"{name} {named}{' symmetric' if symmetric else ''}"
        specimens.append(Specimen(label, kernel, signature, fixed, tile.warps, tile.stages, divisible_by_16=_STRIDES))
    return specimens
