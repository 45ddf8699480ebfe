"""Mean cosine distance between hidden states of mapped layers, padding left out, loss and gradient in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsebert.ops._losses import gradient_dtype, wide_dtype
from sparsebert.ops.hidden_mse import hidden_op, kept_tokens, run_hidden

__all__ = ["hidden_cosine", "hidden_cosine_reference"]

EPS = 1e-8
"""The least length divided by, as in torch's `cosine_similarity`."""


def hidden_cosine(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], token_mask: Tensor | None = None
) -> Tensor:
    """Mean over layers and tokens of `1 - cos(student's state, teacher's state)`.

    The distillation term of TAMT (Liu et al., 2022), which counts padding too: give no mask for that. The cosine is
    torch's `cosine_similarity`: lengths below 1e-8 are taken for 1e-8, a constant. Lengths and
    products are in float32, whatever the dtype.

    Args:
        student: the mapped layers' states, `[batch, seq, width]` each, or stacked `[layers, batch, seq, width]`; any
            float dtype; the gradient flows here only.
        teacher: as many, of the same shape; treated as constant.
        token_mask: `[batch, seq]` bool, True where there is a token; None means everywhere. With no token at all the
            loss is 0. Whatever stands at a padded place, a NaN too, does not count and gets a zero gradient.

    Returns:
        Scalar float32 (float64 if the states are), in `[0, 2]`.

    Raises:
        ValueError: layers, shapes, dtypes or devices that do not fit, named.
        TypeError: states that are not floats.
    """
    return run_hidden(_op, student, teacher, token_mask)


def hidden_cosine_reference(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_mask: Tensor | None, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """The definition: `(loss, its gradient to each student layer)`; the list is empty where not needed.

    Gradients to float16 are float32.
    """
    wide = wide_dtype(student[0], teacher[0])
    keep, kept = kept_tokens(student, token_mask, wide)
    zero = torch.zeros((), dtype=wide, device=student[0].device)
    losses, gradients = [], []
    for narrow_s, narrow_t in zip(student, teacher, strict=True):
        s, t = narrow_s.to(wide), narrow_t.to(wide)
        length_s, length_t = (x.square().sum(-1, keepdim=True).sqrt() for x in (s, t))
        scale = 1 / (length_s.clamp(min=EPS) * length_t.clamp(min=EPS))
        cosine = (s * t).sum(-1, keepdim=True) * scale
        losses.append(torch.where(keep, 1 - cosine, zero).sum())
        if need_grad:
            # A length that is clamped does not change with s.
            along = torch.where(length_s < EPS, zero, cosine / length_s.square())
            gradients.append((torch.where(keep, s * along - t * scale, zero) / kept).to(gradient_dtype(narrow_s)))
    return torch.stack(losses).sum() / kept, gradients


_op = hidden_op("hidden_cosine", hidden_cosine_reference)
