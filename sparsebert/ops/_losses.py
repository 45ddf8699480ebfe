"""What the distillation losses share: checks, when a gradient is wanted, and its scaling in the backward.

Each loss op returns the gradient for a loss of weight 1 beside the loss: both need the same differences, exponentials
and products, so the backward has only to scale it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import constant_result, forced_backend, or_else

__all__ = [
    "LOSS_DTYPES",
    "check_mask",
    "check_pair",
    "gradient_dtype",
    "keep_gradients",
    "kept_entries",
    "scaled",
    "served",
    "wants_gradient",
    "wide_dtype",
]

LOSS_DTYPES = (torch.float32, torch.bfloat16)
"""What the compiled bodies of the CPU take; other dtypes go to the reference."""


# Under torch.compile the backend is a fact of the process, not part of the graph.
@constant_result
def _takes_float16(device_type: str) -> bool:
    return device_type == "cuda" or forced_backend() == "triton"


def served(*tensors: Tensor) -> bool:
    """Whether the bodies for where these are take their dtypes: Triton's take float16 beside `LOSS_DTYPES`."""
    dtypes = {tensor.dtype for tensor in tensors}
    if torch.float16 in dtypes and _takes_float16(tensors[0].device.type):
        dtypes.remove(torch.float16)
    return dtypes <= set(LOSS_DTYPES)


def check_pair(names: tuple[str, str], student: Tensor, teacher: Tensor) -> None:
    """Raise unless the two are float tensors of one shape on one device."""
    for name, tensor in zip(names, (student, teacher), strict=True):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a float tensor, got {tensor.dtype}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"{names[1]}: expected {list(student.shape)} like {names[0]}, got {list(teacher.shape)}; map the layers or "
            "classes before"
        )
    if teacher.device != student.device:
        raise ValueError(f"{names[1]}: expected on {student.device} like {names[0]}, got {teacher.device}")


def check_mask(name: str, mask: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """Raise unless `mask` is None or a bool tensor of `shape`."""
    if mask is None:
        return
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        hint = "; an attention mask of 0 and 1 becomes one by .bool()" if mask.dtype != torch.bool else ""
        raise ValueError(f"{name}: expected bool {list(shape)}, got {mask.dtype} {list(mask.shape)}{hint}")
    if mask.device != device:
        raise ValueError(f"{name}: expected on {device} like the student, got {mask.device}")


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a reference computes in: the widest of the tensors', float32 at the least."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def kept_entries(mask: Tensor | None, total: int, wide: torch.dtype, device: torch.device) -> Tensor:
    """How many entries count, as a number to divide by: at least 1."""
    if mask is None:
        return torch.full((), float(max(total, 1)), dtype=wide, device=device)
    return mask.sum(dtype=wide).clamp(min=1)


def gradient_dtype(student: Tensor) -> torch.dtype:
    """In which an op returns the gradient to `student`: float32 for float16, whose range a mean's gradient leaves.

    Whoever trains in float16 scales the loss for that, which an op learns of in its backward.
    """
    return torch.float32 if student.dtype == torch.float16 else student.dtype


def scaled(gradient: Tensor, grad_loss: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`grad_loss * gradient` in `dtype`; the gradient itself where that factor is 1, None for None.

    Raises:
        NotImplementedError: a second derivative is being recorded; the saved gradient is a constant and has none.
    """
    if grad_loss is None:
        return None
    if type(grad_loss) is Tensor and not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            raise NotImplementedError("distillation losses have no second derivatives; drop create_graph=True")
        # Only on the CPU is reading the number free of a wait.
        if grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:
            return gradient.to(dtype)
        by_kernel = grad_loss.is_cuda and forced_backend() in (None, "triton")
        if by_kernel and gradient.dtype == dtype and not _graph_is_kept():
            return _in_place()(gradient, grad_loss)
    return (gradient * grad_loss).to(dtype)


def _graph_is_kept() -> bool:
    """Whether this backward may come again (`retain_graph=True`) and needs its tensors as they are."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


@functools.cache
def _in_place() -> Callable[[Tensor, Tensor], Tensor]:
    """A gradient times a factor where it lies: a pass less over memory than a copy where the factor is 1."""
    try:
        from sparsebert.kernels._losses import scale_
    except ImportError:
        return torch.mul
    return or_else("the scaling of a loss's gradient", scale_, torch.mul)


def keep_gradients(ctx: Any, gradients: Sequence[Tensor], student: Tensor) -> None:
    """Save an op's gradients for its backward; nothing flows back through these outputs themselves."""
    ctx.dtype = student.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
