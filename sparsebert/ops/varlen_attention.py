"""Attention over sequences of different lengths that lie one after the other, without padding between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops._losses import served
from sparsebert.ops.masked_linear import full_precision

__all__ = ["varlen_attention", "varlen_attention_backward_reference", "varlen_attention_reference"]

WIDEST = 128
"""The widest heads, in entries, that the GPU's kernel takes; wider ones go to the reference there."""


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float | None = None) -> Tensor:
    """`softmax(scale * Q K^T) V` within every sequence and head (Vaswani et al., 2017, eq. 1).

    A token attends to all tokens of its own sequence and to no other. Products are added up in float32 and the softmax
    is taken in float32; with bfloat16 inputs the probabilities are rounded to bfloat16 where the machine multiplies
    bfloat16 (float16 alike).

    On a GPU nothing waits for it, and a CUDA graph takes other lengths of as many sequences and tokens on replay. For
    gradients the host waits once a call: the backward is plain torch, sequence by sequence.

    Args:
        q, k, v: `[tokens, heads, dim]`, float32 or bfloat16 in the compiled kernels, on a GPU float16 too, with `dim`
            up to 128 there; any float dtype and width on the reference. They may be views with any stride between
            tokens and heads.
        cu_seqlens: int32 or int64 `[B + 1]`: sequence `i` is the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]`; it
            ascends from 0 to `tokens`. Sequences may be empty. On a GPU the numbers are not looked at before the
            launch: where they do not ascend so, the whole result is NaN.
        scale: of the scores; None is `1 / sqrt(dim)`.

    Returns:
        `[tokens, heads, dim]`, contiguous, in q's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit, named.
    """
    _check(q, k, v, cu_seqlens)
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[-1], 1))
    if q.shape[-1] > 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    body = _forward.differentiable(q.device, _is_supported(q))
    with full_precision(q.device.type):
        return body(q, k, v, cu_seqlens.contiguous(), float(scale))


def varlen_attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """The definition."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows in _sequences(cu_seqlens, q.shape[0]):
        query, key, value = (x[rows].transpose(0, 1) for x in (q, k, v))
        out[rows] = (_probabilities(query, key, scale).to(v.dtype) @ value).transpose(0, 1)
    return out


def varlen_attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of the backward, with the probabilities computed again: `(dq, dk, dv)`."""
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows in _sequences(cu_seqlens, q.shape[0]):
        query, key, value, above = (x[rows].transpose(0, 1) for x in (q, k, v, grad))
        wide = _probabilities(query, key, scale)
        shares = wide.to(v.dtype)
        grad_shares = (above @ value.transpose(1, 2)).to(wide.dtype)
        grad_scores = wide * (grad_shares - (grad_shares * wide).sum(-1, keepdim=True)) * scale
        grad_scores = grad_scores.to(q.dtype)
        products = (grad_scores @ key, grad_scores.transpose(1, 2) @ query, shares.transpose(1, 2) @ above)
        for whole, part in zip(grads, products, strict=True):
            whole[rows] = part.transpose(0, 1)
    return grads[0], grads[1], grads[2]


def _sequences(cu_seqlens: Tensor, tokens: int) -> Iterator[slice]:
    """The rows of every sequence that has any."""
    starts = cu_seqlens.tolist()
    _check_starts(starts, tokens)
    for begin, end in itertools.pairwise(starts):
        if begin < end:
            yield slice(begin, end)


def _probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`[heads, length, length]` in float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.softmax((query @ key.transpose(1, 2)).to(wide) * scale, dim=-1)


def _is_supported(q: Tensor) -> bool:
    """Whether the compiled bodies for where q is take it; a plain bool also where torch.compile traces a width."""
    if q.device.type == "cuda" and q.shape[-1] > WIDEST:
        return False
    return served(q)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q: expected float [tokens, heads, dim], got {q.dtype} {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} {list(q.shape)} like q, got {x.dtype} {list(x.shape)}")
    for name, x in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        if x.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} like q, got {x.device}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    # Reading numbers would break a graph and, on a GPU, wait for it; the bodies look again.
    if not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
        _check_starts(cu_seqlens.tolist(), q.shape[0])


def _check_starts(starts: list[int], tokens: int) -> None:
    if starts[0] != 0 or starts[-1] != tokens or any(a > b for a, b in itertools.pairwise(starts)):
        shown = f"{starts[:4]}...{starts[-2:]}" if len(starts) > 8 else str(starts)
        raise ValueError(f"cu_seqlens: expected to ascend from 0 to {tokens}, the number of tokens, got {shown}")


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return first, second, third


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, scale = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)
    ctx.scale = scale


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens = ctx.saved_tensors
    with full_precision(grad.device.type):
        grads = _backward_op.pick(grad.device)(grad, q, k, v, cu_seqlens, ctx.scale)
    needed = zip(grads, ctx.needs_input_grad[:3], strict=True)
    return (*(part if need else None for part, need in needed), None, None)


_forward = Op(
    "varlen_attention", varlen_attention_reference, _fake_forward, backward=_backward, setup_context=_setup_context
)
_backward_op = Op("varlen_attention_backward", varlen_attention_backward_reference, _fake_backward, composed=True)
