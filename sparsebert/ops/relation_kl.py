"""KL divergence between self-relations (MiniLMv2): attention maps whose queries and keys are the same vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops._losses import check_mask, wants_gradient, wide_dtype
from sparsebert.ops.attention_kl import (
    attention_kl_reference,
    backward_maps,
    fake_gradient,
    heads_last,
    no_gradients,
    served_maps,
    setup_maps,
    without_gaps,
)
from sparsebert.ops.masked_linear import full_precision

__all__ = ["relation_kl", "relation_kl_reference"]


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    token_mask: Tensor | None = None,
    heads: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Mean over sequences, relation heads and tokens of `KL(teacher's relation || student's relation)`.

    A relation is `softmax(x x^T * scale)` over the tokens that count, for x the queries, the keys or the values of a
    layer, cut anew into relation heads (MiniLMv2, Wang et al., 2021): so teacher and student may differ in width and
    in attention heads. CR-ILD's code has the same terms as cross entropies, equal up to a constant.

    Args:
        student: `[batch, seq, width]`, or `[batch, attention heads, seq, head width]`, whose heads are laid side by
            side first; any float dtype; the gradient flows here only.
        teacher: likewise, of the same batch and seq; treated as constant.
        token_mask: `[batch, seq]` bool, True where there is a token; the others do not count and get a zero gradient.
            None means everywhere. With no token at all the loss is 0.
        heads: relation heads, dividing both widths; None means the student's attention heads (4 dimensions only).
        scale: factor on the products; None means `1 / sqrt(width / heads)`, each with its own.

    Returns:
        Scalar float32 (float64 if student or teacher is).

    Raises:
        ValueError: shapes, heads, dtypes or devices that do not fit, named.
        TypeError: tensors that are not floats.
    """
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a float tensor, got {tensor.dtype}")
        if tensor.dim() not in (3, 4):
            raise ValueError(f"{name}: expected [batch, (heads,) seq, width], got {list(tensor.shape)}")
    if heads is None:
        if student.dim() != 4:
            raise ValueError(f"heads: needed where student is [batch, seq, width], here {list(student.shape)}")
        heads = student.shape[1]
    student, teacher = _regroup("student", student, heads), _regroup("teacher", teacher, heads)
    if teacher.shape[:3] != student.shape[:3]:
        raise ValueError(
            f"teacher: expected batch {student.shape[0]} and seq {student.shape[2]} like student, got "
            f"{teacher.shape[0]} and {teacher.shape[2]}"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher: expected on {student.device} like student, got {teacher.device}")
    check_mask("token_mask", token_mask, (student.shape[0], student.shape[2]), student.device)
    supported = served_maps(student, teacher)
    if supported:
        student, teacher = without_gaps(student), without_gaps(teacher)
        token_mask = None if token_mask is None else token_mask.contiguous()
    scales = [float(scale) if scale is not None else x.shape[-1] ** -0.5 for x in (student, teacher)]
    with full_precision(student.device.type):
        body = _op.differentiable(student.device, supported)
        return body(student, teacher.detach(), token_mask, *scales, wants_gradient(student))[0]


def relation_kl_reference(
    student: Tensor,
    teacher: Tensor,
    token_mask: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, on `[batch, heads, seq, width]`: `attention_kl` with q = k, the gradients of both uses added."""
    wide = wide_dtype(student, teacher)
    s, t = student.to(wide), teacher.to(wide)
    loss, grad_q, grad_k = attention_kl_reference(s, s, t, t, token_mask, student_scale, teacher_scale, need_grad)
    return loss, heads_last(grad_q + grad_k, student) if need_grad else no_gradients(student)[0]


def _regroup(name: str, x: Tensor, heads: int) -> Tensor:
    """`[batch, (attention heads,) seq, width]` to `[batch, heads, seq, width of all / heads]`, a view where it can."""
    if x.dim() == 4:
        if x.shape[1] == heads and x.shape[-1] > 0:
            return x
        x = x.transpose(1, 2).flatten(2)
    if heads < 1 or x.shape[-1] % heads or x.shape[-1] == 0:
        raise ValueError(f"heads: expected a divisor of {name}'s width {x.shape[-1]}, got {heads}")
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _fake(student: Tensor, teacher: Tensor, token_mask: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=wide_dtype(student, teacher)), fake_gradient(student, rest[-1])


_op = Op("relation_kl", relation_kl_reference, _fake, backward=backward_maps, setup_context=setup_maps)
