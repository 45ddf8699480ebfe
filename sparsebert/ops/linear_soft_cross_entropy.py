"""Soft cross entropy from hidden states and vocabulary matrices: what masked-LM distillation needs, without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops import soft_cross_entropy as _soft
from sparsebert.ops._backend import Op
from sparsebert.ops._losses import gradient_dtype, keep_gradients, scaled, served, wants_gradient, wide_dtype

__all__ = ["linear_soft_cross_entropy", "linear_soft_cross_entropy_reference"]

_LOGITS = 1 << 22
"""Logits of each model that are held at a time."""


def linear_soft_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """`soft_cross_entropy` of `hidden @ weight.T + bias` of student and teacher, whose logits are never stored whole.

    `T² · mean over tokens of -sum softmax(teacher / T) · log_softmax(student / T)`, for the distillation of masked
    language models: with 30,522 words the logits of 16,384 tokens and their gradient would take 6 GB in float32, here
    it is at most some 100 MB beside the gradients. Logits are in float32, whatever the dtype, and autocast does not
    change that.

    Args:
        student_hidden: `[T, Hs]`, any float dtype: the states that the student's decoder takes.
        student_weight: `[V, Hs]`, its matrix, which may be the word embedding; taken to the states' dtype.
        teacher_hidden: `[T, Ht]`; constant, as are the teacher's weight and bias.
        teacher_weight: `[V, Ht]`.
        student_bias: `[V]` or None.
        teacher_bias: `[V]` or None; a word at -inf has probability 0.
        labels: `[T]` integers; tokens at `ignore_index` do not count and get a zero gradient, whatever their states.
            The labels have no other meaning here. None means that every token counts; with none at all the loss is 0.
        ignore_index: see `labels`.
        temperature: T > 0.

    Returns:
        Scalar float32 (float64 if the states are). Gradients go to the student's states, weight and bias.

    Raises:
        ValueError: shapes, devices or a temperature that do not fit, named.
        TypeError: states, weights or biases that are not floats, labels that are not integers.
    """
    _check_side("student", student_hidden, student_weight, student_bias, student_hidden, student_weight)
    _check_side("teacher", teacher_hidden, teacher_weight, teacher_bias, student_hidden, student_weight)
    keep = _kept(labels, ignore_index, student_hidden)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    s, ws, bs = _alike(student_hidden, student_weight, student_bias)
    t, wt, bt = _alike(
        teacher_hidden.detach(), teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach()
    )
    needs = [tensor is not None and wants_gradient(tensor) for tensor in (s, ws, bs)]
    body = _op.differentiable(s.device, served(s, t))
    return body(s, ws, t, wt, bs, bt, keep, float(temperature), *needs)[0]


def linear_soft_cross_entropy_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    keep: Tensor | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: `(loss, its gradients to the student's hidden, weight, bias)`, some tokens at a time.

    A gradient is `[0]` where not needed. Those of float16 operands are float32, whose range they may need.
    """
    wide = wide_dtype(student_hidden, teacher_hidden)
    s, ws, t, wt = (x.to(wide) for x in (student_hidden, student_weight, teacher_hidden, teacher_weight))
    bs, bt = (None if x is None else x.to(wide) for x in (student_bias, teacher_bias))
    needs = need_hidden, need_weight, need_bias
    shapes = [shape if need else (0,) for shape, need in zip((s.shape, ws.shape, ws.shape[:1]), needs, strict=True)]
    of_hidden, of_weight, of_bias = (torch.zeros(shape, dtype=wide, device=s.device) for shape in shapes)
    tokens = torch.arange(s.shape[0], device=s.device) if keep is None else keep.nonzero()[:, 0]
    loss = torch.zeros((), dtype=wide, device=s.device)
    with torch.autocast(s.device.type, enabled=False):
        for part in tokens.split(max(_LOGITS // ws.shape[0], 1)):
            logits = F.linear(s[part], ws, bs), F.linear(t[part], wt, bt)
            body = _soft._op.pick(s.device, served(*logits))
            value, gradient = body(*logits, None, temperature, any(needs))
            share = len(part) / max(len(tokens), 1)
            loss += value * share
            if need_hidden:
                of_hidden[part] = (gradient @ ws) * share
            if need_weight:
                of_weight.addmm_(gradient.T, s[part], alpha=share)
            if need_bias:
                of_bias += gradient.sum(0) * share
    dtype = gradient_dtype(student_hidden)
    return loss, of_hidden.to(dtype), of_weight.to(dtype), of_bias.to(dtype)


def _alike(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contiguous, in the states' dtype."""
    bias = None if bias is None else bias.to(hidden.dtype).contiguous()
    return hidden.contiguous(), weight.to(hidden.dtype).contiguous(), bias


def _check_side(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, words: Tensor) -> None:
    """Raise unless these are states, a matrix and a bias of as many tokens and words as the student's."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{side}_{name}: expected a float tensor, got {tensor.dtype}")
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{side}_{name}: expected on {first.device} like student_hidden, got {tensor.device}")
    if hidden.dim() != 2 or hidden.shape[0] != first.shape[0]:
        tokens = first.shape[0] if first.dim() == 2 else "T"
        raise ValueError(f"{side}_hidden: expected [{tokens}, width], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] != words.shape[0]:
        rows = words.shape[0] if words.dim() == 2 and side == "teacher" else "V"
        raise ValueError(f"{side}_weight: expected [{rows}, {hidden.shape[1]}], got {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"{side}_weight: expected at least one word, got {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{side}_bias: expected [{weight.shape[0]}], got {list(bias.shape)}")


def _kept(labels: Tensor | None, ignore_index: int, hidden: Tensor) -> Tensor | None:
    """Which tokens count, `[T]` bool; None for all."""
    if labels is None:
        return None
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if tuple(labels.shape) != (hidden.shape[0],):
        raise ValueError(f"labels: expected [{hidden.shape[0]}], one for each token, got {list(labels.shape)}")
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected on {hidden.device} like student_hidden, got {labels.device}")
    return (labels != ignore_index).contiguous()


def _fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_bias: Any,
    teacher_bias: Any,
    keep: Any,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = gradient_dtype(student_hidden)
    shapes = tuple(student_hidden.shape), tuple(student_weight.shape), (student_weight.shape[0],)
    needs = need_hidden, need_weight, need_bias
    hidden, weight, bias = (
        student_hidden.new_empty(shape if need else (0,), dtype=dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )
    return student_hidden.new_empty((), dtype=wide_dtype(student_hidden, teacher_hidden)), hidden, weight, bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_gradients(ctx, output[1:], inputs[0])


def _backward(ctx: Any, grad_loss: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = (
        scaled(gradient, grad_loss, ctx.dtype) if need else None
        for gradient, need in zip(ctx.saved_tensors, (*ctx.needs_input_grad[:2], ctx.needs_input_grad[4]), strict=True)
    )
    return hidden, weight, None, None, bias, *[None] * 6


_op = Op(
    "linear_soft_cross_entropy",
    linear_soft_cross_entropy_reference,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
