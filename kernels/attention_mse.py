"""Squared distance between attention maps or their scores, from queries and keys (see `_attention_map`)."""

from __future__ import annotations

from torch import Tensor

from sparsebert.kernels._attention_map import map_loss
from sparsebert.kernels._attention_map_table import map_cost, map_specimens
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen

__all__ = ["attention_mse", "cost", "specimens"]


def attention_mse(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    token_mask: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    on_scores: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, its gradients to the student's q and k)`; these are `[0]` where not needed."""
    tensors = student_q, student_k, teacher_q, teacher_k
    return map_loss(_kind(on_scores), *tensors, token_mask, student_scale, teacher_scale, need_grad)


def specimens() -> list[Specimen]:
    """Every kernel it may launch, but for those of `attention_kl` that are the same."""
    return [*map_specimens("mse"), *map_specimens("scores")]


def cost(
    batch: int,
    heads: int,
    seq: int,
    student_width: int,
    teacher_width: int,
    student_bytes: int = 2,
    teacher_bytes: int = 2,
    need_grad: bool = True,
    masked: bool = True,
    on_scores: bool = False,
) -> Cost:
    """What a call moves and computes, padding not skipped; `*_bytes`: of an element."""
    return map_cost(_kind(on_scores), batch, heads, seq, (student_width, teacher_width), (student_bytes, teacher_bytes),
                    need_grad, masked)  # fmt: skip


def _kind(on_scores: bool) -> str:
    return "scores" if on_scores else "mse"
