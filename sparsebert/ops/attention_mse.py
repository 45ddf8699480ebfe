"""Mean squared distance between attention maps, or between the scores under them, from queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebert.errors import unknown
from sparsebert.ops._backend import Op
from sparsebert.ops._losses import wants_gradient, wide_dtype
from sparsebert.ops.attention_kl import (
    backward_maps,
    check_maps,
    fake_maps,
    heads_last,
    kept_pairs,
    no_gradients,
    ready,
    scores,
    setup_maps,
)
from sparsebert.ops.masked_linear import full_precision

__all__ = ["attention_mse", "attention_mse_reference"]

ON = ("probabilities", "scores")


def attention_mse(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    token_mask: Tensor | None = None,
    scale: float | None = None,
    on: str = "probabilities",
) -> Tensor:
    """Mean over sequences, heads and pairs of tokens of the squared difference of the maps, padding left out.

    With `on="probabilities"` the maps are `softmax(q k^T * scale)`, as in SPD (which counts padding too, and sums over
    the layers); with `on="scores"` they are `q k^T * scale` itself, as in TinyBERT (Jiao et al., 2020, eq. 7).

    Args:
        student_q, student_k, teacher_q, teacher_k, token_mask, scale: as in `attention_kl`.
        on: "probabilities" or "scores".

    Returns:
        Scalar float32 (float64 if a student or teacher tensor is).

    Raises:
        ValueError: shapes, dtypes, devices or a word that do not fit, named.
        TypeError: tensors that are not floats.
    """
    if on not in ON:
        raise unknown("on", on, ON)
    check_maps(student_q, student_k, teacher_q, teacher_k, token_mask)
    arguments, supported = ready(student_q, student_k, teacher_q, teacher_k, token_mask, scale)
    need = wants_gradient(student_q, student_k)
    with full_precision(student_q.device.type):
        return _op.differentiable(student_q.device, supported)(*arguments, on == "scores", need)[0]


def attention_mse_reference(
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
    """The definition: `(loss, its gradients to the student's q and k)`; these are `[0]` where not needed."""
    wide = wide_dtype(student_q, teacher_q)
    q, k, student = scores(student_q, student_k, token_mask, student_scale, wide)
    _, _, teacher = scores(teacher_q, teacher_k, token_mask, teacher_scale, wide)
    _, pair = kept_pairs(student, token_mask)
    kept = pair.sum(dtype=wide).clamp(min=1)
    zero = torch.zeros((), dtype=wide, device=student.device)
    if not on_scores:
        student, teacher = torch.softmax(student, -1), torch.softmax(teacher, -1)
    difference = torch.where(pair, student - teacher, zero)
    loss = difference.square().sum() / kept
    if not need_grad:
        return loss, *no_gradients(student_q)
    if not on_scores:
        student = torch.where(pair, student, zero)
        difference = student * (difference - (difference * student).sum(-1, keepdim=True))
    difference = difference * (2 * student_scale / kept)
    return loss, heads_last(difference @ k, student_q), heads_last(difference.mT @ q, student_k)


_op = Op("attention_mse", attention_mse_reference, fake_maps, backward=backward_maps, setup_context=setup_maps)
