"""Mean squared distance between hidden states of mapped layers, and its gradient, in one pass over device memory.

All layers go in one launch: the layers' addresses are arguments of the kernel, in tuples, and a program picks its own.
A table of addresses in device memory would have to be copied there at every call, which a CUDA graph would not repeat
with other addresses and which the host would wait for; one launch a layer would be a dozen short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import Any

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

__all__ = ["LAYERS", "cost", "hidden_cost", "hidden_loss", "hidden_mse", "hidden_specimens", "picked", "specimens"]

LAYERS = 32
"""The most layers of a launch: three addresses each must fit the arguments of a kernel (4 KB)."""
_TILE = 4096


@triton.jit
def picked(pointers, which):
    """The pointer numbered `which` of a tuple."""
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        pointer = tl.where(which == i, pointers[i], pointer)
    return pointer


@triton.jit
def kept_rows(mask, row, rows, tokens):
    """Which of these rows count: row r is token r mod `tokens`."""
    counts = row < rows
    if mask is not None:
        counts = counts & (tl.load(mask + row % tokens, mask=counts, other=0) != 0)
    return counts


@triton.jit
def hidden_mse_kernel(
    students, teachers, grads, mask, kept, partials, rows, tokens, groups, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of one layer a program; `factor` = 2 over what the squares are divided by, but for `kept`.

    The width is `groups` x `VECTOR`: as a product with a constant the compiler knows how much it may load at a time.
    """
    width = groups * VECTOR
    layer = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counts = kept_rows(mask, row, rows, tokens)
    student, teacher = picked(students, layer), picked(teachers, layer)
    column = tl.arange(0, BLOCK)
    lost = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, width, BLOCK):
        inside = (column < width - first)[None, :]
        at = tl.multiple_of(row * width, VECTOR)[:, None] + (first + column)[None, :]
        s = tl.load(student + at, mask=counts[:, None] & inside, other=0.0).to(tl.float32)
        t = tl.load(teacher + at, mask=counts[:, None] & inside, other=0.0).to(tl.float32)
        difference = s - t
        lost += difference * difference
        if grads is not None:
            grad = picked(grads, layer)
            scaled = difference * share_of(kept, factor)
            tl.store(grad + at, scaled.to(grad.dtype.element_ty), mask=(row < rows)[:, None] & inside)
    tl.store(partials + layer * tl.num_programs(0) + tl.program_id(0), tl.sum(lost))


def tiles(width: int) -> tuple[int, int, int]:
    """`(rows, columns taken at a time, warps)` for states of `width`."""
    # 768 is three times 256: no lane of a tile is idle.
    block = min(power_of_2(width), 256 if width % 512 else 512)
    return (_TILE if block >= 256 else _TILE // 4) // block, block, 8


def hidden_mse(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_mask: Tensor | None, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """`(loss, its gradient to each student layer)`; the list is empty where not needed."""
    width = student[0].shape[-1]
    return hidden_loss(hidden_mse_kernel, tiles, student, teacher, token_mask, need_grad, 1 / max(width, 1), 2.0)


def hidden_loss(
    kernel: Any,
    tiles: Callable[[int], tuple[int, int, int]],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    token_mask: Tensor | None,
    need_grad: bool,
    weight: float,
    slope: float,
) -> tuple[Tensor, list[Tensor]]:
    """A loss on layers by a kernel of theirs: `weight` times the mean over rows; `slope`: the gradient's own factor."""
    first = student[0]
    width = first.shape[-1]
    grads = [torch.empty_like(layer, dtype=gradient_dtype(layer.dtype)) for layer in student] if need_grad else []
    if first.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=first.device), grads
    rows, tokens = first.numel() // width, first.shape[-3] * first.shape[-2]
    tile, block, warps = tiles(width)
    vector = gcd(width, 16 // min(first.element_size(), teacher[0].element_size()))
    programs = -(-rows // tile)
    partials = torch.empty(len(student) * programs, dtype=torch.float32, device=first.device)
    kept = count_of(token_mask)
    # What counts is counted in tokens; a row stands for one of them in one layer.
    weight /= len(student) * (rows // tokens) * (1 if token_mask is not None else tokens)
    for start in range(0, len(student), LAYERS):
        part = slice(start, start + LAYERS)
        kernel[(programs, len(student[part]))](
            tuple(student[part]), tuple(teacher[part]), tuple(grads[part]) if need_grad else None, token_mask, kept,
            partials[start * programs :], rows, tokens, width // vector, weight * slope,
            ROWS=tile, BLOCK=block, VECTOR=vector, num_warps=warps,
        )  # fmt: skip
    return total(partials, kept, weight), grads


def specimens() -> list[Specimen]:
    """Every kernel it may launch: a few layers and many, of each dtype."""
    return list(hidden_specimens(hidden_mse_kernel, tiles, (768, 1024, 312, 25))) + total_specimens()


def hidden_specimens(
    kernel: Any, tiles: Callable[[int], tuple[int, int, int]], widths: Sequence[int]
) -> Iterator[Specimen]:
    """A kernel on layers of these widths, for each dtype and for 1, 13 and the most layers."""
    same = [(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    mixed = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    for dtypes in same + mixed:
        for width in widths:
            yield _specimen(kernel, tiles(width), dtypes, width, 13, True, True)
    for layers in (1, LAYERS):
        yield _specimen(kernel, tiles(widths[0]), same[1], widths[0], layers, True, True)
    for masked, need_grad in ((False, True), (True, False), (False, False)):
        yield _specimen(kernel, tiles(widths[0]), same[1], widths[0], 13, masked, need_grad)


def _specimen(
    kernel: Any,
    tile: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    width: int,
    layers: int,
    masked: bool,
    need_grad: bool,
) -> Specimen:
    student, teacher = (triton_type(dtype) for dtype in dtypes)
    vector = gcd(width, 16 // min(dtype.itemsize for dtype in dtypes))
    signature: dict[str, Any] = {"students": (f"*{student}",) * layers, "teachers": (f"*{teacher}",) * layers}
    grad = triton_type(gradient_dtype(dtypes[0]))
    signature |= {"grads": (f"*{grad}",) * layers, "mask": "*i1", "kept": "*i64", "partials": "*fp32"}
    signature |= {"rows": "i32", "tokens": "i32", "groups": "i32", "factor": "fp32"}
    absent = [name for name, there in (("mask", masked), ("kept", masked), ("grads", need_grad)) if not there]
    return Specimen(
        ", no ".join([f"{student}/{teacher} {layers} layers of {width}", *absent]),
        kernel,
        {name: kind for name, kind in signature.items() if name not in absent},
        {"ROWS": tile[0], "BLOCK": tile[1], "VECTOR": vector, **dict.fromkeys(absent)},
        warps=tile[2],
        divisible_by_16=("groups",) if width // vector % 16 == 0 else (),
    )


def cost(
    layers: int, rows: int, width: int, student_bytes: int = 2, teacher_bytes: int = 2,
    need_grad: bool = True, masked: bool = True,
) -> Cost:  # fmt: skip
    """What a call moves and computes, with every row counting; `*_bytes`: of an element."""
    flops = layers * rows * width * (3 + need_grad)
    return hidden_cost(tiles(width)[0], layers, rows, width, (student_bytes, teacher_bytes), flops, need_grad, masked)


def hidden_cost(
    tile: int, layers: int, rows: int, width: int, element: tuple[int, int], flops: int, need_grad: bool, masked: bool
) -> Cost:
    """What a loss on layers costs, `tile` rows of `width` a program."""
    programs, elements = layers * -(-rows // tile), layers * rows * width
    read = elements * sum(element) + (layers * rows if masked else 0)
    launches = -(-layers // LAYERS)
    return Cost(read, elements * element[0] * need_grad + 4 * programs, flops, launches) + total_cost(
        programs, rows if masked else None
    )
