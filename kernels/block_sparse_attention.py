"""Block-sparse attention in Triton: the forward.

A program takes a tile of one head's queries and walks its block row's list of keys with an online softmax (Milakov and
Gimelshein, 2018) in base 2: first the full blocks, without any mask arithmetic, then those at the edge of the sequence,
then the partial ones with their bits. A row of blocks with nothing in it loads no operands at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels._block_lists import (
    below,
    bits_of,
    blocks_of,
    offsets,
    place_of,
    product,
    sequence_of,
    slots,
)
from sparsebert.kernels._cost import Cost
from sparsebert.kernels._triton import Specimen, dot, triton_type

__all__ = ["block_sparse_attention", "cost", "specimens", "tiles"]

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
SIZES = ("list_b", "list_h", "heads", "q_blocks", "bits_room", "queries", "keys")
"""Numbers that change with a batch's lengths: no kernel is compiled again because one of them is 1 or divides by 16."""
_SIZES = (*SIZES, "lse_b", "lse_h", "room")


@triton.jit
def _attend(
    acc, total, most, q, q_rows, q_there, k_rows, v_rows, there, allowed, scale,
    MASKED: tl.constexpr, POSITIVE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over keys that begin at `k_rows`; `scale` has log2(e) in it, `most` too."""
    dims = tl.arange(0, D)[None, :]
    if MASKED:
        k = tl.load(k_rows[:, None] + dims, mask=there[:, None], other=0.0)
        v = tl.load(v_rows[:, None] + dims, mask=there[:, None], other=0.0)
    else:
        k, v = tl.load(k_rows[:, None] + dims), tl.load(v_rows[:, None] + dims)
    scores = product(q, k, q_rows, k_rows, q_there, there, D, CHUNK)
    if not POSITIVE:
        scores = scores * scale
        scale = 1.0
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
    # Scaled after the maximum, so that the scale goes into one multiply-add with the subtraction.
    now = tl.maximum(most, tl.max(scores, axis=1) * scale)
    base = now
    if MASKED:
        # A row that has met nothing yet: -inf less -inf would be NaN.
        base = tl.where(now == float("-inf"), 0.0, now)
    shares = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(most - base)
    total = total * shrink + tl.sum(shares, axis=1)
    acc = dot(shares.to(v.dtype), v, acc * shrink[:, None])
    return acc, total, now


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    q,
    k,
    v,
    out,
    lse,
    columns,
    full_counts,
    counts,
    bits,
    key_mask,
    cu_seqlens,
    order,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    o_b,
    o_h,
    o_s,
    lse_b,
    lse_h,
    list_b,
    list_h,
    heads,
    q_blocks,
    room,
    bits_room,
    queries,
    keys,
    scale,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    CHUNK: tl.constexpr,
    RAGGED: tl.constexpr,
    POSITIVE: tl.constexpr,
):
    mask_row = keys
    batch, head, row, block, first = place_of(order, q_blocks, heads, list_b, list_h, BQ, TQ)
    start, queries = sequence_of(cu_seqlens, batch, queries)
    if cu_seqlens is not None:
        keys = queries
    first_row = block * BQ + first
    rows = first_row + tl.arange(0, TQ)
    wide = rows.to(tl.int64)
    dims = tl.arange(0, D)
    out += batch * o_b + head * o_h + start * o_s
    lse += batch * lse_b + head * lse_h + start
    columns += row * room
    full = tl.load(full_counts + row)
    count = tl.load(counts + row)
    live, clear = full, full
    if cu_seqlens is not None:
        # A tile past its sequence's end has nothing to walk.
        limit = tl.where(first_row < queries, (keys + BK - 1) // BK, 0)
        live = below(columns, 0, full, limit)
        count = full + below(columns, full, count, limit)
    if RAGGED:
        clear = below(columns, 0, live, keys // BK)
    inside = rows < queries
    # With nothing to attend to, nothing is loaded.
    used = rows < tl.where(count > 0, queries, 0)
    q_rows = q + batch * q_b + head * q_h + (start + wide) * q_s
    query = tl.load(q_rows[:, None] + dims[None, :], mask=used[:, None], other=0.0)
    k += batch * k_b + head * k_h + start * k_s
    v += batch * v_b + head * v_h + start * v_s
    acc = tl.zeros([TQ, D], tl.float32)
    total = tl.zeros([TQ], tl.float32)
    most = tl.full([TQ], float("-inf"), tl.float32)
    steps = 0
    if key_mask is None:
        steps = clear * BK // TK
        near = blocks_of(columns, 0, clear, 0, BK, TK)
        for step in range(0, steps):
            _, base, _, there = slots(near, 0, clear, step, BK, TK)
            k_rows, v_rows = k + offsets(base, k_s, BK, TK), v + offsets(base, v_s, BK, TK)
            near = blocks_of(columns, 0, clear, step + 1, BK, TK)
            acc, total, most = _attend(
                acc, total, most, query, q_rows, used, k_rows, v_rows, there, None, scale, False, POSITIVE, D, CHUNK
            )
    if RAGGED or TK > BK or key_mask is not None:
        near = blocks_of(columns, 0, live, steps, BK, TK)
        for step in range(steps, (live * BK + TK - 1) // TK):
            key, base, _, there = slots(near, 0, live, step, BK, TK)
            k_rows, v_rows = k + offsets(base, k_s, BK, TK), v + offsets(base, v_s, BK, TK)
            near = blocks_of(columns, 0, live, step + 1, BK, TK)
            there = there & (key < keys)
            if key_mask is not None:
                there = there & (tl.load(key_mask + batch * mask_row + key, mask=there, other=0) != 0)
            allowed = there[None, :]
            acc, total, most = _attend(
                acc, total, most, query, q_rows, used, k_rows, v_rows, there, allowed, scale, True, POSITIVE, D, CHUNK
            )
    if bits is not None:
        near = blocks_of(columns, full, count, 0, BK, TK)
        for step in range(0, ((count - full) * BK + TK - 1) // TK):
            key, base, entry, there = slots(near, full, count, step, BK, TK)
            k_rows, v_rows = k + offsets(base, k_s, BK, TK), v + offsets(base, v_s, BK, TK)
            near = blocks_of(columns, full, count, step + 1, BK, TK)
            there = there & (key < keys)
            if key_mask is not None:
                there = there & (tl.load(key_mask + batch * mask_row + key, mask=there, other=0) != 0)
            which = row * bits_room + entry - full
            if TK > BK:
                which = which[None, :]
            allowed = bits_of(bits, which, rows[:, None], key[None, :], there[None, :], BQ, BK)
            acc, total, most = _attend(
                acc, total, most, query, q_rows, used, k_rows, v_rows, there, allowed, scale, True, POSITIVE, D, CHUNK
            )
    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(out + wide[:, None] * o_s + dims[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])
    sums = (most + tl.log2(tl.where(nothing, 1.0, total))) * _LN_2
    tl.store(lse + wide, tl.where(nothing, float("-inf"), sums), mask=inside)
    if cu_seqlens is not None and block == q_blocks - 1 and first == BQ - TQ:
        # A sequence longer than the lists are: what nobody computes is not to look like a result.
        for past in range(first_row + TQ, queries, TQ):
            wide = (past + tl.arange(0, TQ)).to(tl.int64)
            beyond = tl.full([TQ, D], float("nan"), out.dtype.element_ty)
            tl.store(out + wide[:, None] * o_s + dims[None, :], beyond, mask=(wide < queries)[:, None])
            tl.store(lse + wide, tl.full([TQ], float("nan"), tl.float32), mask=wide < queries)


def tiles(block: Sequence[int], dim: int, dtype: torch.dtype, bits: bool) -> tuple[int, int, int, int]:
    """`(queries, keys, warps, stages)` of the forward's tile.

    A tile of queries is a block's, as no other rows have the same list; steps of keys are long enough for the tensor
    cores, over several small blocks together, and shorter where `bits` take registers too.
    """
    rows, width = block
    if dtype == torch.float32:
        return min(rows, 64), 16, 8 if rows >= 64 else 4, 1
    keys = 128 if width == 128 and dim <= 64 and not bits else 64
    if dim == 128 and rows >= 64 and bits:
        keys = 32
    warps = {16: 2 if dim <= 64 else 4, 32: 4, 64: 4, 128: 8}[rows]
    return rows, keys, warps, 3 if dim <= 64 else 2


def chunk(dim: int, dtype: torch.dtype) -> int:
    """How much of a head's width goes into a product at a time."""
    return min(dim // 2, 32) if dtype == torch.float32 else dim


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Between batches, heads and tokens, of `[B, H, S, D]` or `[tokens, H, D]`."""
    if x.dim() == 3:
        return 0, x.stride(1), x.stride(0)
    return x.stride(0), x.stride(1), x.stride(2)


def token_major(x: Tensor) -> Tensor:
    """An empty tensor in x's shape, tokens outermost in memory."""
    if x.dim() == 3:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batches, heads, tokens, dim = x.shape
    return torch.empty((batches, tokens, heads, dim), dtype=x.dtype, device=x.device).transpose(1, 2)


def list_strides(columns: Tensor) -> tuple[int, int]:
    """Rows of blocks between batches and between heads, over their number in a head: 0 where lists are shared."""
    batches, heads = columns.shape[:2]
    return heads if batches > 1 else 0, 1 if heads > 1 else 0


def sizes_of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """`(batches, heads, queries, keys)`; with cu_seqlens the last two are all tokens."""
    if cu_seqlens is None:
        return q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    return cu_seqlens.shape[0] - 1, q.shape[1], q.shape[0], k.shape[0]


def block_sparse_attention(
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
    """`(out, lse)`, as the op's reference. `transposed[0]` is the order in which a head's rows are taken."""
    batches, heads, queries, keys = sizes_of(q, k, cu_seqlens)
    out = token_major(q)
    lse = torch.empty(q.shape[:3] if q.dim() == 4 else (heads, queries), dtype=torch.float32, device=q.device)
    rows, width = block
    bits = partial_bits if partial_bits is not None and partial_bits.numel() > 0 else None
    tile, step, warps, stages = tiles(block, q.shape[-1], q.dtype, bits is not None)
    q_blocks, room = columns.shape[2:]
    programs = batches * heads * q_blocks * (rows // tile)
    if programs == 0 or queries == 0:
        # Nothing to compute, or tokens that no list or sequence has.
        return out.fill_(math.nan), lse.fill_(math.nan)
    _forward[(programs,)](
        q, k, v, out, lse,
        columns, full_counts, counts, bits, key_mask, cu_seqlens, transposed[0] if transposed else None,
        *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out),
        0 if cu_seqlens is not None else heads * queries, queries,
        *list_strides(columns), heads, q_blocks, room, 0 if bits is None else bits.shape[3],
        queries, keys, scale * LOG2_E,
        D=q.shape[-1], BQ=rows, BK=width, TQ=tile, TK=step, CHUNK=chunk(q.shape[-1], q.dtype),
        RAGGED=cu_seqlens is not None or keys % width != 0, POSITIVE=scale > 0,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def cost(
    sizes: Sequence[int],
    dim: int,
    block: Sequence[int],
    blocks: int,
    partial: int = 0,
    bytes_each: int = 2,
) -> Cost:
    """One forward over `sizes` = `(batches, heads, queries, keys)`.

    Args:
        sizes, dim, block: as the op has them.
        blocks: blocks computed, over all batches and heads; `partial` of them with bits.
        bytes_each: of an element of q, k and v.

    Keys and values of a head stay in the cache while its tiles walk them: they are counted once.
    """
    batches, heads, queries, keys = sizes
    rows = batches * heads * -(-queries // block[0])
    operands = batches * heads * dim * bytes_each * (queries + 2 * keys)
    lists = 4 * (blocks + 3 * rows) + partial * block[0] * block[1] // 8
    written = batches * heads * queries * (dim * bytes_each + 4)
    return Cost(operands + lists, written, 4 * dim * blocks * block[0] * block[1])


POINTERS = ("columns", "full_counts", "counts")
_STRIDES = tuple(f"{name}_{axis}" for name in "qkvo" for axis in "bhs")
_ABSENT: dict[str, Any] = {"bits": None, "key_mask": None, "cu_seqlens": None}
VARIANTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "full blocks": ({}, {**_ABSENT, "RAGGED": False}),
    "bits, key mask": ({"bits": "*u8", "key_mask": "*i1"}, {"cu_seqlens": None, "RAGGED": True}),
    "bits, varlen": ({"bits": "*u8", "cu_seqlens": "*i32"}, {"key_mask": None, "RAGGED": True}),
}
"""What a call's optional parts make of a kernel: `(types, constants)`."""
CASES = (
    *((torch.bfloat16, 64, (rows, rows), "bits, key mask") for rows in (16, 32, 64, 128)),
    *((torch.bfloat16, 64, (rows, rows), "full blocks") for rows in (64, 128)),
    *((dtype, 64, (64, 64), "bits, varlen") for dtype in (torch.bfloat16, torch.float16)),
    *((torch.bfloat16, 128, (rows, rows), "bits, key mask") for rows in (64, 128)),
    (torch.bfloat16, 32, (128, 128), "bits, key mask"),
    (torch.float32, 64, (64, 64), "bits, key mask"),
    (torch.float32, 128, (128, 128), "bits, key mask"),
)
"""The cases to compile: every tile there is, with what takes most registers, and the plain ones of the usual blocks."""


def specimens() -> list[Specimen]:
    """Every tile; see CASES."""
    return [specimen(*case) for case in CASES]


def specimen(dtype: torch.dtype, dim: int, block: tuple[int, int], label: str) -> Specimen:
    """The forward of one case."""
    types, constants = VARIANTS[label]
    tile, step, warps, stages = tiles(block, dim, dtype, "bits" in types)
    word = triton_type(dtype)
    signature = {name: f"*{word}" for name in ("q", "k", "v", "out")}
    signature |= {"lse": "*fp32", **dict.fromkeys((*POINTERS, "order"), "*i32"), **types}
    signature |= {**dict.fromkeys((*_STRIDES, *_SIZES), "i32"), "scale": "fp32"}
    sizes = {"D": dim, "BQ": block[0], "BK": block[1], "TQ": tile, "TK": step}
    sizes |= {"CHUNK": chunk(dim, dtype), "POSITIVE": True}
    name = f"{word}, D {dim}, {block[0]}x{block[1]}, {label}: {tile}x{step}"
    return Specimen(name, _forward, signature, {**constants, **sizes}, warps, stages, divisible_by_16=_STRIDES)
