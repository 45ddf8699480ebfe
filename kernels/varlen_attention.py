"""Attention over sequences of different lengths without padding between them, in Triton: the forward.

A program takes a tile of one head's queries and walks all keys of their sequence with the online softmax of
block-sparse attention. Its lists are no use here: they count blocks of the longest sequence, whose length only the
device knows, and no list would name another block than the next one.

The grid comes from shapes alone, so that the host waits for nothing and a CUDA graph takes other lengths on replay.
Sequence i has the *slots* from `start // TQ + i` on, start being its first token: always at least as many as it has
tiles of TQ queries, and at most one more. Whatever the lengths, `tokens // TQ` and one more for every sequence are
enough; a program finds the sequence of its slot among all, and looks at the same time whether they ascend from 0 to
the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, triton_type
from sparsebert.kernels.block_sparse_attention import LOG2_E, _attend, chunk

__all__ = ["cost", "specimens", "tiles", "varlen_attention"]

_WRONG = tl.constexpr(2**31 - 1)
_SPAN = 128
"""How many lengths a program reads at a time."""


@triton.jit
def _sequence_at(cu_seqlens, slot, sequences, tokens, TQ: tl.constexpr, SPAN: tl.constexpr):
    """The sequence that `slot` belongs to; `_WRONG` where cu_seqlens does not ascend from 0 to `tokens`."""
    found = tl.zeros([SPAN], tl.int32)
    for first in range(0, sequences + 1, SPAN):
        i = first + tl.arange(0, SPAN)
        start = tl.load(cu_seqlens + i, mask=i <= sequences, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + i + 1, mask=i < sequences, other=tokens).to(tl.int64)
        wrong = (start > end) | ((i == 0) & (start != 0)) | ((i == sequences) & (start != tokens))
        own = (i < sequences) & (start // TQ + i <= slot)
        found = tl.maximum(found, tl.where(wrong, _WRONG, tl.where(own, i, 0)))
    return tl.max(found, axis=0)


@triton.jit(do_not_specialize=("sequences", "tokens"))
def _forward(
    q, k, v, out, cu_seqlens,
    q_h, q_s, k_h, k_s, v_h, v_s, o_h, o_s, heads, sequences, tokens, scale,
    D: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, CHUNK: tl.constexpr, POSITIVE: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    # The heads of a tile follow each other: a token's heads lie side by side in memory.
    head = (tl.program_id(0) % heads).to(tl.int64)
    slot = tl.program_id(0) // heads
    sequence = _sequence_at(cu_seqlens, slot, sequences, tokens, TQ, SPAN)
    wrong = sequence == _WRONG
    sequence = tl.where(wrong, 0, sequence)
    begin = tl.load(cu_seqlens + sequence, mask=sequence < tl.where(wrong, 0, sequences), other=0).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < tl.where(wrong, 0, sequences), other=0).to(tl.int64)
    first = (slot - sequence - (begin // TQ).to(tl.int32)) * TQ
    length = (end - begin).to(tl.int32)
    # A slot that no tile needs has nothing to do.
    keys = tl.where(first < length, length, 0)
    rows = first + tl.arange(0, TQ)
    wide = begin + rows
    used = rows < keys
    dims = tl.arange(0, D)
    q_rows = q + head * q_h + wide * q_s
    query = tl.load(q_rows[:, None] + dims[None, :], mask=used[:, None], other=0.0)
    key = tl.arange(0, TK)
    k_rows = k + head * k_h + (begin + key) * k_s
    v_rows = v + head * v_h + (begin + key) * v_s
    k_step, v_step = TK * k_s.to(tl.int64), TK * v_s.to(tl.int64)
    acc = tl.zeros([TQ, D], tl.float32)
    total = tl.zeros([TQ], tl.float32)
    most = tl.full([TQ], float("-inf"), tl.float32)
    steps = keys // TK
    if CHUNK < D:
        # The loop below alone: twice the code would take more registers than there are, and masks cost little here.
        steps = 0
    every = key < TK
    for _ in range(0, steps):
        acc, total, most = _attend(
            acc, total, most, query, q_rows, used, k_rows, v_rows, every, None, scale, False, POSITIVE, D, CHUNK
        )
        k_rows += k_step
        v_rows += v_step
    for step in range(steps, (keys + TK - 1) // TK):
        there = key < keys - step * TK
        allowed = there[None, :]
        acc, total, most = _attend(
            acc, total, most, query, q_rows, used, k_rows, v_rows, there, allowed, scale, True, POSITIVE, D, CHUNK
        )
        k_rows += k_step
        v_rows += v_step
    acc = acc / tl.where(used, total, 1.0)[:, None]
    # Of lengths that fit no tokens nothing is computed, and what comes is not to look like a result.
    acc = tl.where(wrong, float("nan"), acc)
    inside = rows < tl.where(wrong, tokens, keys)
    to = out + head * o_h + wide * o_s
    tl.store(to[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])


def tiles(mean: int, dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """`(queries, keys, warps, stages)` of a tile, for sequences of `mean` tokens on average.

    Long tiles load keys and values less often, short ones leave fewer rows idle at a sequence's end.
    """
    if dtype == torch.float32:
        return (64, 16, 8, 1) if mean > 32 else (32, 16, 4, 1)
    if mean <= 32:
        return 32, 32, 4, 3
    if dim > 64:
        # With 64 keys, or 64 queries by half the warps, the registers do not do on sm_80.
        return 128, 32, 8, 3
    rows = 128 if mean >= 192 else 64
    return rows, 64, rows // 16, 3


def padded(dim: int) -> int:
    """The width that heads of `dim` are computed at."""
    return max(32, triton.next_power_of_2(dim))


def slots(tokens: int, sequences: int, tile: int) -> int:
    """Tiles of `tile` queries that are enough for any lengths; at least one, which tells where there can be none."""
    return tokens // tile + max(sequences, 1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """As the op's reference; NaN all over where `cu_seqlens` does not ascend from 0 to the number of tokens."""
    tokens, heads, dim = q.shape
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    width, sequences = padded(dim), cu_seqlens.shape[0] - 1
    if width != dim:
        # Zeros add nothing to a score.
        q, k, v = (F.pad(x, (0, width - dim)) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile, step, warps, stages = tiles(tokens // max(sequences, 1), width, q.dtype)
    _forward[(slots(tokens, sequences, tile) * heads,)](
        q, k, v, out, cu_seqlens,
        *(x.stride(i) for x in (q, k, v, out) for i in (1, 0)), heads, sequences, tokens, scale * LOG2_E,
        D=width, TQ=tile, TK=step, CHUNK=chunk(width, q.dtype), POSITIVE=scale > 0, SPAN=_SPAN,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out if width == dim else out[..., :dim].contiguous()


def cost(lengths: Sequence[int], heads: int, dim: int, bytes_each: int = 2) -> Cost:
    """One forward over sequences of these `lengths`.

    Args:
        lengths, heads, dim: as the op has them.
        bytes_each: of an element of q, k and v.

    A sequence's keys and values stay in the cache while its tiles walk them: they are counted once; so are the int64
    `cu_seqlens`.
    """
    tokens, width = sum(lengths), padded(dim)
    dtype = torch.float32 if bytes_each == 4 else torch.bfloat16
    tile, step, *_ = tiles(tokens // max(len(lengths), 1), width, dtype)
    scores = sum(-(-length // tile) * tile * (-(-length // step) * step) for length in lengths)
    size = tokens * heads * width * bytes_each
    return Cost(3 * size + 8 * (len(lengths) + 1), size, 4 * width * heads * scores)


_INTEGERS = (*(f"{name}_{axis}" for name in "qkvo" for axis in "hs"), "heads", "sequences", "tokens")
CASES = (
    *((torch.bfloat16, dim, mean) for dim in (64, 32) for mean in (300, 100, 20)),
    *((torch.bfloat16, 128, mean) for mean in (300, 20)),
    *((torch.float16, 64, mean) for mean in (300, 20)),
    *((torch.float32, dim, mean) for dim in (32, 64, 128) for mean in (100, 20)),
)
"""The cases to compile: `(dtype, head's width, mean length)`, every tile there is."""


def specimens() -> list[Specimen]:
    """Every tile; see CASES."""
    return [_specimen(*case) for case in CASES]


def _specimen(dtype: torch.dtype, dim: int, mean: int) -> Specimen:
    tile, step, warps, stages = tiles(mean, dim, dtype)
    word = triton_type(dtype)
    signature = {name: f"*{word}" for name in ("q", "k", "v", "out")}
    signature |= {"cu_seqlens": "*i64", **dict.fromkeys(_INTEGERS, "i32"), "scale": "fp32"}
    constants = {"D": dim, "TQ": tile, "TK": step, "CHUNK": chunk(dim, dtype), "POSITIVE": True, "SPAN": _SPAN}
    name = f"{word}, D {dim}: {tile}x{step}"
    return Specimen(name, _forward, signature, constants, warps, stages, divisible_by_16=_INTEGERS[:8])
