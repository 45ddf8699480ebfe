"""Soft cross entropy: a student's logits against a teacher's at a temperature, loss and gradient in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops._losses import (
    check_mask,
    check_pair,
    gradient_dtype,
    keep_gradients,
    kept_entries,
    scaled,
    served,
    wants_gradient,
    wide_dtype,
)

__all__ = ["soft_cross_entropy", "soft_cross_entropy_reference"]


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """`T² · mean over rows of -sum softmax(teacher / T) · log_softmax(student / T)` (Hinton et al., 2015).

    The factor T² keeps the gradient's size as T changes. It is `T² · KL(teacher || student)` plus T² times the
    teacher's entropy: the gradients are the same, and the loss of a perfect student is that entropy, not 0. The mean is
    over rows; code that takes it over rows and classes (SPD's) has this divided by C. All arithmetic is in float32 on
    the logits as they come, whatever their dtype.

    Args:
        student_logits: `[..., C]`, any float dtype; the gradient flows here only.
        teacher_logits: same shape, any float dtype; treated as constant. A class at -inf has probability 0.
        mask: `[...]` bool, True where a row counts (the masked tokens, say); None means all. With no row at all the
            loss is 0.
        temperature: T > 0.

    Returns:
        Scalar float32 (float64 if one of the logits is). It is not finite where a student's logit that counts is not.

    Raises:
        ValueError: shapes, devices or a temperature that do not fit, named.
        TypeError: logits that are not floats.
    """
    check_pair(("student_logits", "teacher_logits"), student_logits, teacher_logits)
    if student_logits.dim() < 1 or student_logits.shape[-1] == 0:
        raise ValueError(f"student_logits: expected [..., C] with C >= 1, got {list(student_logits.shape)}")
    check_mask("mask", mask, student_logits.shape[:-1], student_logits.device)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    supported = served(student_logits, teacher_logits)
    if supported:
        student_logits, teacher_logits = student_logits.contiguous(), teacher_logits.contiguous()
        mask = None if mask is None else mask.contiguous()
    body = _op.differentiable(student_logits.device, supported)
    loss, _ = body(student_logits, teacher_logits.detach(), mask, float(temperature), wants_gradient(student_logits))
    return loss


def soft_cross_entropy_reference(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, temperature: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """The definition: `(loss, its gradient to the student)`; the gradient is `[0]` where not needed.

    A gradient to float16 is float32.
    """
    wide = wide_dtype(student_logits, teacher_logits)
    log_student = torch.log_softmax(student_logits.to(wide) / temperature, -1)
    teacher = torch.softmax(teacher_logits.to(wide) / temperature, -1)
    keep = torch.ones_like(teacher[..., 0], dtype=torch.bool) if mask is None else mask
    kept = kept_entries(keep, keep.numel(), wide, keep.device)
    # where, not a product: a NaN in a row left out must not count.
    zero = torch.zeros((), dtype=wide, device=keep.device)
    rows = torch.where(keep, -(teacher * log_student).sum(-1), zero)
    loss = rows.sum() * (temperature**2 / kept)
    if not need_grad:
        return loss, student_logits.new_empty(0, dtype=gradient_dtype(student_logits))
    difference = torch.where(keep.unsqueeze(-1), log_student.exp() - teacher, zero)
    return loss, (difference * (temperature / kept)).to(gradient_dtype(student_logits))


def _fake(
    student_logits: Tensor, teacher_logits: Tensor, mask: Any, temperature: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    loss = student_logits.new_empty((), dtype=wide_dtype(student_logits, teacher_logits))
    shape = tuple(student_logits.shape) if need_grad else (0,)
    return loss, student_logits.new_empty(shape, dtype=gradient_dtype(student_logits))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    keep_gradients(ctx, output[1:], inputs[0])


def _backward(ctx: Any, grad_loss: Tensor, _unused: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return scaled(gradient, grad_loss, ctx.dtype), None, None, None, None


_op = Op("soft_cross_entropy", soft_cross_entropy_reference, _fake, backward=_backward, setup_context=_setup_context)
