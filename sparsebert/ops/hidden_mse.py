"""Mean squared distance between hidden states of mapped layers, padding left out, loss and gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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

__all__ = ["hidden_mse", "hidden_mse_reference"]


def hidden_mse(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    token_mask: Tensor | None = None,
    projection: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Sum over layers, tokens and width of the squared difference, over layers · tokens · width.

    The hidden-state term of TinyBERT (Jiao et al., 2020, eq. 8), of SPD (which sums over the layers: multiply by their
    number) and of CR-ILD, for all layers in one pass. All arithmetic is in float32, whatever the dtype.

    Args:
        student: the mapped layers' states, `[batch, seq, width]` each, or stacked `[layers, batch, seq, width]`; any
            float dtype; the gradient flows here only.
        teacher: as many, of the same shape; treated as constant. Of another width with `projection` alone.
        token_mask: `[batch, seq]` bool, True where there is a token; None means everywhere. With no token at all the
            loss is 0. Whatever stands at a padded place, a NaN too, does not count and gets a zero gradient.
        projection: `[teacher's width, student's width]`, for all layers or one for each: the student's states times its
            transpose are compared, in the wider dtype of the two. It gets a gradient.

    Returns:
        Scalar float32 (float64 if the states are).

    Raises:
        ValueError: layers, shapes, dtypes or devices that do not fit, named.
        TypeError: states that are not floats.
    """
    if projection is not None:
        student = _projected(student, projection, token_mask)
    return run_hidden(_op, student, teacher, token_mask)


def _projected(
    student: Tensor | Sequence[Tensor], projection: Tensor | Sequence[Tensor], token_mask: Tensor | None
) -> Tensor | list[Tensor]:
    """The student's layers in the teacher's width; padded places are zeros, which any padding's gradient is too."""
    layers = _as_list("student", student)
    weights = [projection] * len(layers) if isinstance(projection, Tensor) else list(projection)
    if len(weights) != len(layers):
        raise ValueError(f"projection: expected one for all layers or {len(layers)}, got {len(weights)}")
    made = []
    for i, (state, weight) in enumerate(zip(layers, weights, strict=True)):
        name = "projection" if isinstance(projection, Tensor) else f"projection[{i}]"
        if not weight.is_floating_point() or not state.is_floating_point():
            raise TypeError(f"{name}: expected floats as student[{i}], got {weight.dtype} and {state.dtype}")
        if weight.dim() != 2 or weight.shape[1] != state.shape[-1]:
            raise ValueError(f"{name}: expected [teacher's width, {state.shape[-1]}], got {list(weight.shape)}")
        if weight.device != state.device:
            raise ValueError(f"{name}: expected on {state.device} like student[{i}], got {weight.device}")
        check_mask("token_mask", token_mask, state.shape[-3:-1], state.device)
        wide = torch.promote_types(state.dtype, weight.dtype)
        if token_mask is not None:
            # A NaN at a padded place must not reach the projection's gradient: its own is 0, and 0 times NaN is NaN.
            state = state.masked_fill(~token_mask.unsqueeze(-1), 0.0)
        with torch.autocast(state.device.type, enabled=False):
            made.append(F.linear(state.to(wide), weight.to(wide)))
    return made[0] if isinstance(student, Tensor) else made


def hidden_mse_reference(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_mask: Tensor | None, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """The definition: `(loss, its gradient to each student layer)`; the list is empty where not needed.

    Gradients to float16 are float32.
    """
    wide = wide_dtype(student[0], teacher[0])
    keep, kept = kept_tokens(student, token_mask, wide)
    count = kept * max(student[0].shape[-1], 1)
    zero = torch.zeros((), dtype=wide, device=student[0].device)
    # where, not a product: a NaN at a padded place must not count.
    differences = [torch.where(keep, s.to(wide) - t.to(wide), zero) for s, t in zip(student, teacher, strict=True)]
    loss = torch.stack([difference.square().sum() for difference in differences]).sum() / count
    gradients = (
        [(2 * difference / count).to(gradient_dtype(student[0])) for difference in differences] if need_grad else []
    )
    return loss, gradients


def kept_tokens(student: Sequence[Tensor], token_mask: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(bool that broadcasts over a layer, tokens of all layers that count)`, the latter at least 1."""
    like = student[0]
    keep = torch.ones(like.shape[-3:-1], dtype=torch.bool, device=like.device) if token_mask is None else token_mask
    layers = len(student) * (like.shape[0] if like.dim() == 4 else 1)
    return keep.unsqueeze(-1), (kept_entries(keep, keep.numel(), wide, like.device) * layers).clamp(min=1)


def run_hidden(
    op: Op, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], token_mask: Tensor | None
) -> Tensor:
    """Check the arguments of a loss on hidden states and call its op."""
    student, teacher = _as_list("student", student), _as_list("teacher", teacher)
    if len(student) != len(teacher) or not student:
        counts = f"{len(teacher)} and {len(student)}"
        raise ValueError(f"teacher: expected as many layers as student, at least 1, got {counts}")
    first = student[0]
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        check_pair((f"student[{i}]", f"teacher[{i}]"), s, t)
        if s.shape != first.shape or s.dtype != first.dtype or s.device != first.device:
            raise ValueError(
                f"student[{i}]: expected {first.dtype} {list(first.shape)} on {first.device} like student[0], got "
                f"{s.dtype} {list(s.shape)} on {s.device}"
            )
        if t.dtype != teacher[0].dtype:
            raise ValueError(f"teacher[{i}]: expected {teacher[0].dtype} like teacher[0], got {t.dtype}")
    check_mask("token_mask", token_mask, first.shape[-3:-1], first.device)
    supported = served(first, teacher[0])
    if supported:
        student, teacher = [s.contiguous() for s in student], [t.contiguous() for t in teacher]
        token_mask = None if token_mask is None else token_mask.contiguous()
    # The registered formula: an autograd.Function of tensors in a list would not see them.
    loss, _ = op.pick(first.device, supported)(
        student, [t.detach() for t in teacher], token_mask, wants_gradient(*student)
    )
    return loss


def _as_list(name: str, states: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(states, Tensor):
        if states.dim() not in (3, 4):
            raise ValueError(f"{name}: expected [(layers,) batch, seq, width], got {list(states.shape)}")
        return [states]
    for i, state in enumerate(states):
        if state.dim() != 3:
            raise ValueError(f"{name}[{i}]: expected [batch, seq, width], got {list(state.shape)}")
    return list(states)


def fake_hidden(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_mask: Any, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Shapes and dtypes of a loss on hidden states and its gradients."""
    loss = student[0].new_empty((), dtype=wide_dtype(student[0], teacher[0]))
    dtype = gradient_dtype(student[0])
    return loss, [state.new_empty(tuple(state.shape), dtype=dtype) for state in student] if need_grad else []


def setup_hidden(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    """Save the gradients; for the registration of an op on lists of layers."""
    keep_gradients(ctx, output[1], inputs[0][0])
    ctx.layers = len(inputs[0])


def backward_hidden(ctx: Any, grad_loss: Tensor, _unused: Any) -> tuple[Any, ...]:
    """The gradient of each student layer; none for teacher and mask."""
    needed = ctx.needs_input_grad[0]
    pairs = zip(ctx.saved_tensors, needed, strict=True)
    gradients = [scaled(g, grad_loss, ctx.dtype) if need else None for g, need in pairs]
    return gradients, [None] * ctx.layers, None, None


def hidden_op(name: str, reference: Callable[..., Any]) -> Op:
    """Register a loss on lists of hidden states."""
    return Op(name, reference, fake_hidden, backward=backward_hidden, setup_context=setup_hidden)


_op = hidden_op("hidden_mse", hidden_mse_reference)
