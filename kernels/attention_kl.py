"""KL divergence between attention maps, from queries and keys (see `_attention_map`): no map is stored."""

from __future__ import annotations

from torch import Tensor

from sparsebert.kernels._attention_map import map_loss
from sparsebert.kernels._attention_map_table import map_cost, map_specimens
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen

__all__ = ["attention_kl", "cost", "specimens"]


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    token_mask: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, its gradients to the student's q and k)`; these are `[0]` where not needed."""
    tensors = student_q, student_k, teacher_q, teacher_k
    return map_loss("kl", *tensors, token_mask, student_scale, teacher_scale, need_grad)


def specimens() -> list[Specimen]:
    """Every kernel it may launch."""
    return map_specimens("kl", helpers=True)


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
    """What a call moves and computes, padding not skipped; `*_bytes`: of an element."""
    return map_cost("kl", batch, heads, seq, (student_width, teacher_width), (student_bytes, teacher_bytes),
                    need_grad, masked)  # fmt: skip
