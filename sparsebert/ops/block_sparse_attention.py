"""Attention over some blocks of the score matrix alone, those that lists name; the others cost nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import Op, constant_result, forced_backend
from sparsebert.ops.block_lists import BlockLists, lists_to_mask
from sparsebert.ops.masked_linear import full_precision

__all__ = [
    "block_sparse_attention",
    "block_sparse_attention_backward_reference",
    "block_sparse_attention_reference",
]

DTYPES = (torch.float32, torch.bfloat16)
HEAD_DIMS = (32, 64, 128)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockLists,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(scale * Q K^T) V` over the scores that `blocks` attends, and no others.

    Products are summed in float32 and the softmax is taken in float32 (float64 for float64). A query with nothing to
    attend to gets exactly 0, and so do its gradients. A key that `key_mask` leaves out is not read at all, and gets
    gradient 0; a NaN in any other key of an attended block may reach the whole block's rows, also from behind the bits
    of a partial one. Gradients flow to q, k and v, from the result and from the log-sum-exp, and are the same bits
    every time.

    Args:
        q: `[B, H, Sq, D]`, float32 or bfloat16 (float16 too on a GPU) and D 32, 64 or 128 in the kernels; any float
            dtype and D on the reference. Any strides. With `cu_seqlens`: `[tokens, H, D]`, sequences one after the
            other without padding.
        k, v: `[B, H, Sk, D]`, or `[tokens, H, D]`, in q's dtype.
        blocks: lists of blocks on q's device, for lengths `(Sq, Sk)`. With `cu_seqlens` every sequence takes their
            upper left part, as long as it is, so they are made for the longest one. Their content is taken on trust;
            `BlockLists.check` validates it.
        key_mask: bool `[B, Sk]`, True where there is a token; not with `cu_seqlens`.
        cu_seqlens: int32 or int64 `[B + 1]`: sequence `i` is the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]`. On a
            GPU it is not read here: rows of a sequence longer than the lists are become NaN.
        scale: of the scores; None is `1 / sqrt(D)`.
        return_lse: also return the log-sum-exp of every row's scores.

    Returns:
        As q in shape and dtype, tokens outermost in memory (`[B, Sq, H, D]`), so that joining the heads copies nothing.
        With `return_lse` also float32 (float64 for float64) `[B, H, Sq]` or `[H, tokens]`, -inf where there was nothing
        to attend to.

    Raises:
        ValueError: shapes, dtypes, devices, lists or lengths that do not fit, named.
    """
    _check(q, k, v, blocks, key_mask, cu_seqlens)
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[-1], 1))
    if q.shape[-1] > 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    lists = (blocks.columns, blocks.full_counts, blocks.counts, blocks.partial_bits)
    masks = tuple(None if x is None else x.contiguous() for x in (key_mask, cu_seqlens))
    transposed = blocks.transposed() if recorded else blocks.order()
    body = _forward.differentiable(q.device, _is_supported(q))
    with full_precision(q.device.type):
        out, lse = body(q, k, v, *lists, *masks, transposed, list(blocks.block), float(scale))
    return (out, lse) if return_lse else out


def block_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    full_counts: Tensor,
    counts: Tensor,
    partial_bits: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    transposed: Sequence[Tensor],
    block: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition: `(out, log-sum-exp)`.

    `transposed` is `BlockLists.transposed()`, `BlockLists.order()` or empty: in what order to work, and the backward.
    """
    out, lse = _token_major(q), _row_sums(q)
    lists = (columns, full_counts, counts, partial_bits)
    for part, allowed in _parts(q, k, lists, key_mask, cu_seqlens, block):
        query, key, value = (_part(x, part) for x in (q, k, v))
        scores = _scores(query, key, allowed, scale)
        sums = torch.logsumexp(scores, dim=-1)
        shares = _shares(scores, sums).to(v.dtype)
        _part(out, part).copy_(shares @ _kept(value, allowed))
        _part(lse, part, heads_first=True).copy_(sums)
    return out, lse


def block_sparse_attention_backward_reference(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    columns: Tensor,
    full_counts: Tensor,
    counts: Tensor,
    partial_bits: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    transposed: Sequence[Tensor],
    block: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of the backward: `(dq, dk, dv)`; the log-sum-exp gives back the probabilities."""
    grads = (_token_major(q), _token_major(k), _token_major(v))
    lists = (columns, full_counts, counts, partial_bits)
    for part, allowed in _parts(q, k, lists, key_mask, cu_seqlens, block):
        query, key, value, above, result = (_part(x, part) for x in (q, k, v, grad_out, out))
        key, value = _kept(key, allowed), _kept(value, allowed)
        query, above = (_kept(x, allowed.transpose(-1, -2)) for x in (query, above))
        wide = _shares(_scores(query, key, allowed, scale), _part(lse, part, heads_first=True))
        delta = (above.to(wide.dtype) * result.to(wide.dtype)).sum(-1)
        if grad_lse is not None:
            delta = delta - _part(grad_lse, part, heads_first=True)
        grad_shares = (above @ value.transpose(-1, -2)).to(wide.dtype)
        grad_scores = wide * (grad_shares - delta[..., None]) * scale
        # Filled, not multiplied: a row without anything has no gradient, whatever its log-sum-exp of -inf was used for.
        grad_scores = grad_scores.masked_fill(~allowed, 0.0).to(q.dtype)
        shares = wide.to(v.dtype)
        products = (grad_scores @ key, grad_scores.transpose(-1, -2) @ query, shares.transpose(-1, -2) @ above)
        for whole, product in zip(grads, products, strict=True):
            _part(whole, part).copy_(product)
    return grads


Part = int | slice
"""A batch of `[B, H, S, D]`, or the rows of a sequence of `[tokens, H, D]`."""


def _parts(
    q: Tensor,
    k: Tensor,
    lists: tuple[Tensor, Tensor, Tensor, Tensor | None],
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    block: Sequence[int],
) -> Iterator[tuple[Part, Tensor]]:
    """Every batch or sequence that has queries, with the scores it attends, bool `[H or 1, queries, keys]`."""
    if cu_seqlens is None:
        allowed = lists_to_mask(*lists, block, (q.shape[2], k.shape[2]))
        for batch in range(q.shape[0]):
            own = allowed[batch if allowed.shape[0] > 1 else 0]
            yield batch, own if key_mask is None else own & key_mask[batch]
        return
    starts = cu_seqlens.tolist()
    longest = _check_starts(starts, q.shape[0], lists[0].shape[2] * block[0])
    allowed = lists_to_mask(*lists, block, (longest, longest))
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        if begin < end:
            own = allowed[i if allowed.shape[0] > 1 else 0]
            yield slice(begin, end), own[:, : end - begin, : end - begin]


def _part(x: Tensor, part: Part, heads_first: bool = False) -> Tensor:
    """`[H, length, ...]` of one batch or sequence; `heads_first` where x is `[B, H, S]` or `[H, tokens]`."""
    if isinstance(part, int):
        return x[part]
    return x[:, part] if heads_first else x[part].transpose(0, 1)


def _scores(query: Tensor, key: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`[H, queries, keys]` in float32 at least, -inf where nothing is attended."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return ((query @ key.transpose(-1, -2)).to(wide) * scale).masked_fill(~allowed, -math.inf)


def _shares(scores: Tensor, sums: Tensor) -> Tensor:
    """The probabilities; 0 in rows with nothing to attend to."""
    return torch.exp(scores - sums.masked_fill(sums == -math.inf, 0.0)[..., None])


def _kept(x: Tensor, allowed: Tensor) -> Tensor:
    """Keys or values `[H, keys, D]`, 0 where no query attends to them; or queries, with `allowed` transposed.

    What stands there is not to be seen.
    """
    return torch.where(allowed.any(dim=-2)[..., None], x, 0.0)


def _token_major(x: Tensor) -> Tensor:
    """An empty tensor in x's shape and dtype, tokens outermost in memory."""
    if x.dim() == 3:
        return x.new_empty(tuple(x.shape))
    batches, heads, tokens, dim = x.shape
    return x.new_empty((batches, tokens, heads, dim)).transpose(1, 2)


def _row_sums(q: Tensor) -> Tensor:
    """An empty tensor for the log-sum-exp."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return q.new_empty(tuple(shape), dtype=torch.promote_types(q.dtype, torch.float32))


def _is_supported(q: Tensor) -> bool:
    """Whether the compiled bodies take it: the CPU's any width, the Triton one float16 too."""
    if q.device.type == "cpu" and not _triton_is_forced():
        return q.dtype in DTYPES
    dtypes = (*DTYPES, torch.float16)
    # A plain bool also where torch.compile does not take the width for fixed.
    for dim in HEAD_DIMS:
        if q.shape[-1] == dim:
            return q.dtype in dtypes
    return False


@constant_result
def _triton_is_forced() -> bool:
    return forced_backend() == "triton"


def _check(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockLists, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    wanted = "[B, H, Sq, D]" if cu_seqlens is None else "[tokens, H, D] with cu_seqlens"
    dims = 4 if cu_seqlens is None else 3
    if q.dim() != dims or not q.is_floating_point():
        raise ValueError(f"q: expected float {wanted}, got {q.dtype} {list(q.shape)}")
    like = list(q.shape) if cu_seqlens is not None or k.dim() != 4 else [*q.shape[:2], k.shape[2], q.shape[3]]
    for name, x in (("k", k), ("v", v)):
        if list(x.shape) != like or x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} {like} to fit q, got {x.dtype} {list(x.shape)}")
    if not isinstance(blocks, BlockLists):
        raise ValueError(f"blocks: expected BlockLists, got {type(blocks).__name__}; BlockLists.from_mask makes them")
    others = (("k", k), ("v", v), ("blocks", blocks.columns), ("key_mask", key_mask), ("cu_seqlens", cu_seqlens))
    for name, other in others:
        if other is not None and other.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} like q, got {other.device}")
    if cu_seqlens is not None:
        _check_lengths(q, cu_seqlens, key_mask, blocks)
    elif (q.shape[2], k.shape[2]) != tuple(blocks.lengths):
        made = f"lists for {blocks.lengths[0]} queries and {blocks.lengths[1]} keys"
        raise ValueError(f"blocks: expected lists for {q.shape[2]} queries and {k.shape[2]} keys, got {made}")
    batches = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, own, many in (("batches", 0, batches), ("heads", 1, q.shape[1])):
        # Compared one by one: torch.compile does not look into a tuple for a size that is not fixed.
        if blocks.columns.shape[own] != 1 and blocks.columns.shape[own] != many:
            raise ValueError(f"blocks: expected lists for 1 or {many} {name}, got {blocks.columns.shape[own]}")
    if key_mask is not None and (key_mask.dtype != torch.bool or list(key_mask.shape) != [q.shape[0], k.shape[2]]):
        shown = f"{key_mask.dtype} {list(key_mask.shape)}"
        raise ValueError(
            f"key_mask: expected bool [{q.shape[0]}, {k.shape[2]}], True where there is a token, got {shown}"
        )


def _check_lengths(q: Tensor, cu_seqlens: Tensor, key_mask: Tensor | None, blocks: BlockLists) -> None:
    if key_mask is not None:
        raise ValueError("key_mask: expected None with cu_seqlens, whose sequences have no padding")
    if blocks.lengths[0] != blocks.lengths[1]:
        raise ValueError(f"blocks: expected as many queries as keys with cu_seqlens, got {tuple(blocks.lengths)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        shown = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens: expected int32 or int64 [B + 1], got {shown}")
    # Reading numbers would break a graph and, on a GPU, wait for it; the CPU's bodies look again.
    if not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
        _check_starts(cu_seqlens.tolist(), q.shape[0], blocks.lengths[0])


def _check_starts(starts: list[int], tokens: int, room: int) -> int:
    """The longest sequence's length; ValueError unless they cover all tokens and the lists cover them."""
    lengths = [end - begin for begin, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or any(length < 0 for length in lengths):
        shown = f"{starts[:4]}...{starts[-2:]}" if len(starts) > 8 else str(starts)
        raise ValueError(f"cu_seqlens: expected to ascend from 0 to {tokens}, the number of tokens, got {shown}")
    longest = max(lengths, default=0)
    if longest > room:
        raise ValueError(f"cu_seqlens: expected sequences of at most {room} tokens, as the lists have, got {longest}")
    return longest


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Any,
    full_counts: Any,
    counts: Any,
    partial_bits: Any,
    key_mask: Any,
    cu_seqlens: Any,
    transposed: Any,
    block: Any,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _token_major(q), _row_sums(q)


def _fake_backward(
    grad_out: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *_lists: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _token_major(q), _token_major(k), _token_major(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, transposed, block, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output, *transposed)
    ctx.block, ctx.scale, ctx.transposed = list(block), scale, len(transposed)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, *lists, out, lse = ctx.saved_tensors[:11]
    transposed = list(ctx.saved_tensors[11:])
    none = (*(None,) * 6, _linear.no_grads(ctx, 9, ctx.transposed), None, None)
    if grad_out is None and grad_lse is None:
        return (None, None, None, *none)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    with full_precision(grad_out.device.type):
        body = _backward_op.pick(grad_out.device, _is_supported(q))
        grads = body(grad_out, grad_lse, q, k, v, out, lse, *lists, transposed, ctx.block, ctx.scale)
    needed = zip(grads, ctx.needs_input_grad[:3], strict=True)
    return (*(part if need else None for part, need in needed), *none)


_forward = Op(
    "block_sparse_attention",
    block_sparse_attention_reference,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
_backward_op = Op("block_sparse_attention_backward", block_sparse_attention_backward_reference, _fake_backward)
