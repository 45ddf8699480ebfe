"""What the Triton kernels of the distillation losses share: the second stage of the sum.

A loss is summed in two stages, each in a fixed order, so that it has the same bits every time: every program writes the
sum of its own part, and one program adds those. What counts is counted on the device and never waited for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen

__all__ = [
    "count_of",
    "gradient_dtype",
    "power_of_2",
    "scale_",
    "scale_kernel",
    "share_of",
    "total",
    "total_cost",
    "total_kernel",
    "total_specimens",
]

_BLOCK = 2048
_SCALE_BLOCK = 4096
_SCALE_PROGRAMS = 1024


@triton.jit
def share_of(kept, factor):
    """`factor` over the number of entries that count, at least 1; `factor` itself where all do (`kept` None)."""
    if kept is not None:
        return factor / tl.maximum(tl.load(kept), 1).to(tl.float32)
    return factor


@triton.jit
def total_kernel(partials, kept, loss, programs, factor, BLOCK: tl.constexpr):
    """`loss` `[]` = the sum of `partials` `[programs]` times `factor` over what counts; one program."""
    place = tl.arange(0, BLOCK)
    lost = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        lost += tl.load(partials + first + place, mask=place < programs - first, other=0.0).to(tl.float64)
    tl.store(loss, tl.sum(lost, 0).to(tl.float32) * share_of(kept, factor))


@triton.jit
def scale_kernel(tensor, factor, entries, BLOCK: tl.constexpr):
    """`tensor` `[entries]` times `factor` `[]`, in place; where that is 1 nothing is read or written."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, entries, step):
            at = first + tl.arange(0, BLOCK)
            found = tl.load(tensor + at, mask=at < entries, other=0.0).to(tl.float32)
            tl.store(tensor + at, (found * by).to(tensor.dtype.element_ty), mask=at < entries)


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor`, dense in memory, times `factor` `[]`, in place; costs a launch where that is 1, without waiting."""
    entries = tensor.numel()
    if entries:
        programs = min(-(-entries // _SCALE_BLOCK), _SCALE_PROGRAMS)
        scale_kernel[(programs,)](tensor, factor, entries, BLOCK=_SCALE_BLOCK, num_warps=8)
    return tensor


def count_of(mask: Tensor | None) -> Tensor | None:
    """How many entries of a bool mask are True, `[]` int64 on the mask's device; None for None."""
    return None if mask is None else mask.sum()


def total(partials: Tensor, kept: Tensor | None, factor: float) -> Tensor:
    """The sum of `partials` `[programs]` fp32 times `factor`, over `kept` if there is one; scalar fp32."""
    loss = torch.empty((), dtype=torch.float32, device=partials.device)
    total_kernel[(1,)](partials, kept, loss, partials.numel(), factor, BLOCK=_BLOCK, num_warps=8)
    return loss


def total_specimens() -> list[Specimen]:
    """The second stage, with and without a mask, and what the backward launches."""
    made = [
        Specimen(f"scale {kind}", scale_kernel, {"tensor": f"*{kind}", "factor": "*fp32", "entries": "i32"},
                 {"BLOCK": _SCALE_BLOCK}, warps=8)
        for kind in ("fp32", "bf16", "fp16")
    ]  # fmt: skip
    for masked in (False, True):
        signature = {"partials": "*fp32", "kept": "*i64", "loss": "*fp32", "programs": "i32", "factor": "fp32"}
        constants: dict[str, object] = {"BLOCK": _BLOCK}
        if not masked:
            del signature["kept"]
            constants["kept"] = None
        made.append(Specimen(f"total{', masked' if masked else ''}", total_kernel, signature, constants, warps=8))
    return made


def total_cost(programs: int, mask_entries: int | None = None) -> Cost:
    """Of `total` and, where there is a mask, of counting it."""
    cost = Cost(4 * programs, 4, programs)
    return cost if mask_entries is None else cost + Cost(mask_entries, 8, mask_entries)


def gradient_dtype(student: torch.dtype) -> torch.dtype:
    """Of the gradient to a student's tensor: float32 for float16, whose range a mean's gradient leaves."""
    return torch.float32 if student == torch.float16 else student


def power_of_2(number: int) -> int:
    """The least power of 2 that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()
