"""KL divergence between attention maps, from queries and keys: no map is stored, nor recomputed in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops._losses import (
    check_mask,
    gradient_dtype,
    keep_gradients,
    scaled,
    served,
    wants_gradient,
    wide_dtype,
)
from sparsebert.ops.masked_linear import full_precision

__all__ = ["attention_kl", "attention_kl_reference"]

WIDEST = 256
"""Of a head on a GPU, whose registers hold a row of it; wider ones go to the reference."""


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    token_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Mean over sequences, heads and queries of `KL(teacher's map || student's map)`, padding left out.

    A map is `softmax(q k^T * scale)` over the keys that count. The attention term of CR-ILD and of MiniLM (Wang et al.,
    2020): cross entropy in the former's code, which is the same up to a constant. All arithmetic is in float32,
    whatever the dtype; beyond the gradients, which are as large as q and k, no memory grows with seq².

    Args:
        student_q, student_k: `[batch, heads, seq, width]`, any float dtype, strides as they come from the projections;
            the gradients flow here only.
        teacher_q, teacher_k: the same but for the width, which may be another one; treated as constant.
        token_mask: `[batch, seq]` bool, True where there is a token: the others count neither as queries nor as keys
            and get a zero gradient. None means everywhere. With no token at all the loss is 0.
        scale: factor on the scores; None means `1 / sqrt(width)`, each with its own.

    Returns:
        Scalar float32 (float64 if a student or teacher tensor is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named.
        TypeError: tensors that are not floats.
    """
    check_maps(student_q, student_k, teacher_q, teacher_k, token_mask)
    arguments, supported = ready(student_q, student_k, teacher_q, teacher_k, token_mask, scale)
    need = wants_gradient(student_q, student_k)
    with full_precision(student_q.device.type):
        return _op.differentiable(student_q.device, supported)(*arguments, need)[0]


def attention_kl_reference(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    token_mask: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: `(loss, its gradients to the student's q and k)`; these are `[0]` where not needed."""
    wide = wide_dtype(student_q, teacher_q)
    q, k, student = scores(student_q, student_k, token_mask, student_scale, wide)
    _, _, teacher = scores(teacher_q, teacher_k, token_mask, teacher_scale, wide)
    log_s, log_t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    p_s, p_t = log_s.exp(), log_t.exp()
    query, pair = kept_pairs(student, token_mask)
    kept = query.sum(dtype=wide).clamp(min=1)
    zero = torch.zeros((), dtype=wide, device=student.device)
    loss = torch.where(pair, p_t * (log_t - log_s), zero).sum() / kept
    if not need_grad:
        return loss, *no_gradients(student_q)
    difference = torch.where(pair, p_s - p_t, zero) * (student_scale / kept)
    return loss, heads_last(difference @ k, student_q), heads_last(difference.mT @ q, student_k)


def scores(
    q: Tensor, k: Tensor, token_mask: Tensor | None, scale: float, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`(q, k, q k^T * scale)` in `wide`, padded tokens' rows 0 and padded keys' scores -inf."""
    q, k = q.to(wide), k.to(wide)
    if token_mask is None:
        return q, k, (q @ k.mT) * scale
    zero = torch.zeros((), dtype=wide, device=q.device)
    q, k = (torch.where(token_mask[:, None, :, None], x, zero) for x in (q, k))
    return q, k, ((q @ k.mT) * scale).masked_fill(~token_mask[:, None, None, :], -torch.inf)


def kept_pairs(like: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`([batch, heads, seq], [batch, heads, seq, seq])` bool: the queries and the pairs that count."""
    if token_mask is None:
        pair = torch.ones_like(like, dtype=torch.bool)
        return pair[..., 0] if like.shape[-1] else pair.any(-1), pair
    query = token_mask[:, None, :].expand(like.shape[:-1])
    return query, query.unsqueeze(-1) & token_mask[:, None, None, :]


def heads_last(gradient: Tensor, like: Tensor) -> Tensor:
    """`gradient` to `like`, laid out `[batch, seq, heads, width]` in memory: as the projection wants it."""
    return gradient.transpose(1, 2).to(gradient_dtype(like)).contiguous().transpose(1, 2)


def no_gradients(like: Tensor) -> tuple[Tensor, Tensor]:
    """`[0]` twice, for gradients to q and k that are not needed."""
    return like.new_empty(0, dtype=gradient_dtype(like)), like.new_empty(0, dtype=gradient_dtype(like))


def check_maps(
    student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, token_mask: Tensor | None
) -> None:
    """Raise unless the four make two sets of attention maps of one shape."""
    named = {"student_q": student_q, "student_k": student_k, "teacher_q": teacher_q, "teacher_k": teacher_k}
    for name, tensor in named.items():
        against = "teacher_q" if name == "teacher_k" else "student_q"
        like = named[against]
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a float tensor, got {tensor.dtype}")
        if tensor.dim() != 4 or tensor.shape[-1] == 0:
            raise ValueError(f"{name}: expected [batch, heads, seq, width], width >= 1, got {list(tensor.shape)}")
        same = tensor.shape if name != "teacher_q" else (*tensor.shape[:3], like.shape[3])
        if tuple(same) != tuple(like.shape):
            raise ValueError(
                f"{name}: expected {list(like.shape)} like {against}{', but for the width' * (name == 'teacher_q')}, "
                f"got {list(tensor.shape)}"
            )
        if name != "teacher_q" and tensor.dtype != like.dtype:
            raise ValueError(f"{name}: expected {like.dtype} like {against}, got {tensor.dtype}")
        if tensor.device != student_q.device:
            raise ValueError(f"{name}: expected on {student_q.device} like student_q, got {tensor.device}")
    check_mask("token_mask", token_mask, (student_q.shape[0], student_q.shape[2]), student_q.device)


def ready(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    token_mask: Tensor | None,
    scale: float | None,
) -> tuple[tuple[Any, ...], bool]:
    """`(the op's arguments up to the scales, whether the compiled body takes them)`."""
    supported = served_maps(student_q, teacher_q)
    if supported:
        student_q, student_k, teacher_q, teacher_k = (
            without_gaps(x) for x in (student_q, student_k, teacher_q, teacher_k)
        )
        token_mask = None if token_mask is None else token_mask.contiguous()
    scales = [float(scale) if scale is not None else x.shape[-1] ** -0.5 for x in (student_q, teacher_q)]
    return (student_q, student_k, teacher_q.detach(), teacher_k.detach(), token_mask, *scales), supported


def served_maps(student: Tensor, teacher: Tensor) -> bool:
    """Whether the bodies for where these are take their dtypes and widths."""
    narrow = student.device.type == "cpu" or max(student.shape[-1], teacher.shape[-1]) <= WIDEST
    return narrow and served(student, teacher)


def without_gaps(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def fake_maps(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the loss and the gradients to q and k."""
    need_grad = rest[-1]
    loss = student_q.new_empty((), dtype=wide_dtype(student_q, teacher_q))
    return loss, fake_gradient(student_q, need_grad), fake_gradient(student_k, need_grad)


def fake_gradient(like: Tensor, need_grad: bool) -> Tensor:
    """A gradient as `heads_last` lays it out, or `[0]`."""
    if not need_grad:
        return no_gradients(like)[0]
    batch, heads, seq, width = like.shape
    return like.new_empty((batch, seq, heads, width), dtype=gradient_dtype(like)).transpose(1, 2)


def setup_maps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the gradients, for ops that return them after the loss."""
    keep_gradients(ctx, output[1:], inputs[0])
    ctx.constants = len(inputs) - len(output[1:])


def backward_maps(ctx: Any, grad_loss: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the student's tensors, which come first; none for the rest."""
    saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[: len(saved)]
    gradients = (scaled(g, grad_loss, ctx.dtype) if need else None for g, need in zip(saved, needed, strict=True))
    return *gradients, *[None] * ctx.constants


_op = Op("attention_kl", attention_kl_reference, fake_maps, backward=backward_maps, setup_context=setup_maps)
