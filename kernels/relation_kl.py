"""KL divergence between self-relations (see `_attention_map`): queries and keys are one, so the scores are symmetric
and the whole gradient comes out of one pass."""

from __future__ import annotations

from torch import Tensor

from sparsebert.kernels._attention_map import map_loss
from sparsebert.kernels._attention_map_table import map_cost, map_specimens
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen

__all__ = ["cost", "relation_kl", "specimens"]


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    token_mask: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """`(loss, its gradient to the student)`; that is `[0]` where not needed."""
    tensors = student, student, teacher, teacher
    loss, grad, _ = map_loss("kl", *tensors, token_mask, student_scale, teacher_scale, need_grad, symmetric=True)
    return loss, grad


def specimens() -> list[Specimen]:
    """Every kernel it may launch, but for those of `attention_kl` that are the same."""
    return map_specimens("kl", symmetric=True)


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
) -> Cost:
    """What a call moves and computes, padding not skipped; widths are a relation head's, `*_bytes` an element's."""
    return map_cost("kl", batch, heads, seq, (student_width, teacher_width), (student_bytes, teacher_bytes),
                    need_grad, masked, symmetric=True)  # fmt: skip
