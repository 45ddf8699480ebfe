"""Block-sparse attention in Triton: the backward, in three launches and without atomics.

The first takes `delta = rowsum(dO * O) - dlse` and the log-sum-exp in base 2. The second has a program for each tile of
keys, which walks the query blocks of the transposed lists and sums dK and dV; the third one for each tile of queries,
which walks its keys again and sums dQ. So every gradient is summed by one program in one order, for seven products in
place of the five that adding to dQ from both sides would take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
from sparsebert.kernels.block_sparse_attention import (
    CASES,
    LOG2_E,
    POINTERS,
    SIZES,
    VARIANTS,
    chunk,
    list_strides,
    sizes_of,
    strides_of,
    token_major,
)

__all__ = ["block_sparse_attention_backward", "cost", "specimens", "tiles"]

_LOG2_E = tl.constexpr(LOG2_E)
# Numbers of each of its tensors that a program of the first launch takes.
_FIRST = 2048
_KEY_SIZES, _QUERY_SIZES = (*SIZES, "k_blocks"), (*SIZES, "room")


@triton.jit(do_not_specialize=("heads", "tokens"))
def _rows(
    grad, out, lse, grad_lse, sums, deltas, g_b, g_h, g_s, o_b, o_h, o_s, row, heads, tokens,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp in base 2, inf where there was nothing (so that exp2 gives 0), and delta, 0 there."""
    tiles = (tokens + ROWS - 1) // ROWS
    both = tl.program_id(0) // tiles
    batch = (both // heads).to(tl.int64)
    head = (both % heads).to(tl.int64)
    rows = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    at = rows[:, None]
    dims = tl.arange(0, D)[None, :]
    above = tl.load(grad + batch * g_b + head * g_h + at * g_s + dims, mask=inside[:, None], other=0.0)
    result = tl.load(out + batch * o_b + head * o_h + at * o_s + dims, mask=inside[:, None], other=0.0)
    place = both.to(tl.int64) * tokens + rows
    own = tl.load(lse + place, mask=inside, other=0.0)
    delta = tl.sum(above.to(tl.float32) * result.to(tl.float32), axis=1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + place, mask=inside, other=0.0)
    nothing = own == float("-inf")
    place = both.to(tl.int64) * row + rows
    tl.store(sums + place, tl.where(nothing, float("inf"), own * _LOG2_E), mask=inside)
    tl.store(deltas + place, tl.where(nothing, 0.0, delta), mask=inside)


@triton.jit
def _poison(pointer, stride, begin, end, TILE: tl.constexpr, D: tl.constexpr):
    """NaN in the rows of a sequence that the lists do not cover: nobody computes them."""
    dims = tl.arange(0, D)[None, :]
    for past in range(begin, end, TILE):
        rows = (past + tl.arange(0, TILE)).to(tl.int64)[:, None]
        nan = tl.full([TILE, D], float("nan"), pointer.dtype.element_ty)
        tl.store(pointer + rows * stride + dims, nan, mask=rows < end)


@triton.jit
def _turned(
    dk, dv, key, value, k_rows, v_rows, used, query_rows, above_rows, sums, deltas, there, allowed, scale,
    MASKED: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One step of dK (without the scale) and dV, over queries that begin at `query_rows`; scores `[keys, queries]`."""
    dims = tl.arange(0, D)[None, :]
    if MASKED:
        query = tl.load(query_rows[:, None] + dims, mask=there[:, None], other=0.0)
        above = tl.load(above_rows[:, None] + dims, mask=there[:, None], other=0.0)
        # Of inf: the shares are 0.
        total = tl.load(sums, mask=there, other=float("inf"))
        delta = tl.load(deltas, mask=there, other=0.0)
    else:
        query, above = tl.load(query_rows[:, None] + dims), tl.load(above_rows[:, None] + dims)
        total, delta = tl.load(sums), tl.load(deltas)
    shares = tl.exp2(product(key, query, k_rows, query_rows, used, there, D, CHUNK) * scale - total[None, :])
    if BITS:
        shares = tl.where(allowed, shares, 0.0)
    dv = dot(shares.to(above.dtype), above, dv)
    grad_shares = product(value, above, v_rows, above_rows, used, there, D, CHUNK)
    grad_scores = shares * (grad_shares - delta[None, :])
    return dot(grad_scores.to(query.dtype), query, dk), dv


@triton.jit(do_not_specialize=_KEY_SIZES)
def _keys_values(
    q, k, v, grad, dk, dv, sums, deltas, columns, full_counts, counts, places, bits, key_mask, cu_seqlens, order,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, lse_b, lse_h,
    list_b, list_h, heads, q_blocks, k_blocks, bits_room, queries, keys, scale, factor,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, CHUNK: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    mask_row = keys
    batch, head, row, block, first = place_of(order, k_blocks, heads, list_b, list_h, BK, TK)
    start, queries = sequence_of(cu_seqlens, batch, queries)
    if cu_seqlens is not None:
        keys = queries
    first_key = block * BK + first
    own = first_key + tl.arange(0, TK)
    wide = own.to(tl.int64)
    dims = tl.arange(0, D)[None, :]
    columns += row * q_blocks
    places += row * q_blocks
    bits_row = (batch * list_b + head * list_h) * q_blocks
    full = tl.load(full_counts + row)
    count = tl.load(counts + row)
    live = full
    if cu_seqlens is not None:
        # A tile past its sequence's end has nothing to walk.
        limit = tl.where(first_key < keys, (queries + BQ - 1) // BQ, 0)
        live = below(columns, 0, full, limit)
        count = full + below(columns, full, count, limit)
    inside = own < keys
    kept = inside
    if key_mask is not None:
        kept = inside & (tl.load(key_mask + batch * mask_row + own, mask=inside, other=0) != 0)
    used = kept & (own < tl.where(count > 0, keys, 0))
    k_rows = k + batch * k_b + head * k_h + (start + wide) * k_s
    v_rows = v + batch * v_b + head * v_h + (start + wide) * v_s
    key = tl.load(k_rows[:, None] + dims, mask=used[:, None], other=0.0)
    value = tl.load(v_rows[:, None] + dims, mask=used[:, None], other=0.0)
    q += batch * q_b + head * q_h + start * q_s
    grad += batch * g_b + head * g_h + start * g_s
    sums += batch * lse_b + head * lse_h + start
    deltas += batch * lse_b + head * lse_h + start
    sum_k = tl.zeros([TK, D], tl.float32)
    sum_v = tl.zeros([TK, D], tl.float32)
    near = blocks_of(columns, 0, live, 0, BQ, TQ)
    for step in range(0, (live * BQ + TQ - 1) // TQ):
        rows, base, _, there = slots(near, 0, live, step, BQ, TQ)
        q_rows, g_rows = q + offsets(base, q_s, BQ, TQ), grad + offsets(base, g_s, BQ, TQ)
        near = blocks_of(columns, 0, live, step + 1, BQ, TQ)
        there = there & (rows < queries)
        sum_k, sum_v = _turned(
            sum_k, sum_v, key, value, k_rows, v_rows, used, q_rows, g_rows, sums + rows, deltas + rows, there, None,
            scale, RAGGED or TQ > BQ, False, D, CHUNK,
        )  # fmt: skip
    if bits is not None:
        near = blocks_of(columns, full, count, 0, BQ, TQ)
        for step in range(0, ((count - full) * BQ + TQ - 1) // TQ):
            rows, base, entry, there = slots(near, full, count, step, BQ, TQ)
            q_rows, g_rows = q + offsets(base, q_s, BQ, TQ), grad + offsets(base, g_s, BQ, TQ)
            which = (bits_row + near) * bits_room
            if TQ > BQ:
                which = (which + tl.load(places + entry, mask=there, other=0))[None, :]
            else:
                which += tl.load(places + entry)
            near = blocks_of(columns, full, count, step + 1, BQ, TQ)
            there = there & (rows < queries)
            allowed = bits_of(bits, which, rows[None, :], own[:, None], there[None, :], BQ, BK)
            sum_k, sum_v = _turned(
                sum_k, sum_v, key, value, k_rows, v_rows, used, q_rows, g_rows, sums + rows, deltas + rows, there,
                allowed, scale, True, True, D, CHUNK,
            )  # fmt: skip
    # What another key's mask left out may be anything here.
    sum_k = tl.where(kept[:, None], sum_k * factor, 0.0)
    sum_v = tl.where(kept[:, None], sum_v, 0.0)
    dk += batch * dk_b + head * dk_h + start * dk_s
    dv += batch * dv_b + head * dv_h + start * dv_s
    tl.store(dk + wide[:, None] * dk_s + dims, sum_k.to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv + wide[:, None] * dv_s + dims, sum_v.to(dv.dtype.element_ty), mask=inside[:, None])
    if cu_seqlens is not None and block == k_blocks - 1 and first == BK - TK:
        _poison(dk, dk_s, first_key + TK, keys, TK, D)
        _poison(dv, dv_s, first_key + TK, keys, TK, D)


@triton.jit
def _towards(
    acc, query, above, q_rows, g_rows, used, total, delta, k_rows, v_rows, key, there, mask, allowed, keys, scale,
    MASKED: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One step of dQ, without the scale, over keys that begin at `k_rows`; `mask` is the batch's key mask."""
    dims = tl.arange(0, D)[None, :]
    if MASKED:
        there = there & (key < keys)
        if mask is not None:
            there = there & (tl.load(mask + key, mask=there, other=0) != 0)
        key_tile = tl.load(k_rows[:, None] + dims, mask=there[:, None], other=0.0)
        value = tl.load(v_rows[:, None] + dims, mask=there[:, None], other=0.0)
    else:
        key_tile, value = tl.load(k_rows[:, None] + dims), tl.load(v_rows[:, None] + dims)
    shares = tl.exp2(product(query, key_tile, q_rows, k_rows, used, there, D, CHUNK) * scale - total[:, None])
    if MASKED:
        keep = there[None, :]
        if allowed is not None:
            keep = keep & allowed
        shares = tl.where(keep, shares, 0.0)
    grad_shares = product(above, value, g_rows, v_rows, used, there, D, CHUNK)
    return dot((shares * (grad_shares - delta[:, None])).to(key_tile.dtype), key_tile, acc)


@triton.jit(do_not_specialize=_QUERY_SIZES)
def _queries(
    q, k, v, grad, dq, sums, deltas, columns, full_counts, counts, bits, key_mask, cu_seqlens, order,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dq_b, dq_h, dq_s, lse_b, lse_h,
    list_b, list_h, heads, q_blocks, room, bits_room, queries, keys, scale, factor,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, CHUNK: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    mask_row = keys
    batch, head, row, block, first = place_of(order, q_blocks, heads, list_b, list_h, BQ, TQ)
    start, queries = sequence_of(cu_seqlens, batch, queries)
    if cu_seqlens is not None:
        keys = queries
    first_row = block * BQ + first
    rows = first_row + tl.arange(0, TQ)
    wide = rows.to(tl.int64)
    dims = tl.arange(0, D)[None, :]
    columns += row * room
    full = tl.load(full_counts + row)
    count = tl.load(counts + row)
    live = full
    if cu_seqlens is not None:
        limit = tl.where(first_row < queries, (keys + BK - 1) // BK, 0)
        live = below(columns, 0, full, limit)
        count = full + below(columns, full, count, limit)
    inside = rows < queries
    used = rows < tl.where(count > 0, queries, 0)
    q_rows = q + batch * q_b + head * q_h + (start + wide) * q_s
    g_rows = grad + batch * g_b + head * g_h + (start + wide) * g_s
    query = tl.load(q_rows[:, None] + dims, mask=used[:, None], other=0.0)
    above = tl.load(g_rows[:, None] + dims, mask=used[:, None], other=0.0)
    place = batch * lse_b + head * lse_h + start + rows
    total = tl.load(sums + place, mask=used, other=float("inf"))
    delta = tl.load(deltas + place, mask=used, other=0.0)
    k += batch * k_b + head * k_h + start * k_s
    v += batch * v_b + head * v_h + start * v_s
    if key_mask is not None:
        key_mask += batch * mask_row
    acc = tl.zeros([TQ, D], tl.float32)
    near = blocks_of(columns, 0, live, 0, BK, TK)
    for step in range(0, (live * BK + TK - 1) // TK):
        key, base, _, there = slots(near, 0, live, step, BK, TK)
        k_rows, v_rows = k + offsets(base, k_s, BK, TK), v + offsets(base, v_s, BK, TK)
        near = blocks_of(columns, 0, live, step + 1, BK, TK)
        acc = _towards(
            acc, query, above, q_rows, g_rows, used, total, delta, k_rows, v_rows, key, there, key_mask, None, keys,
            scale, RAGGED or TK > BK or key_mask is not None, D, CHUNK,
        )  # fmt: skip
    if bits is not None:
        near = blocks_of(columns, full, count, 0, BK, TK)
        for step in range(0, ((count - full) * BK + TK - 1) // TK):
            key, base, entry, there = slots(near, full, count, step, BK, TK)
            k_rows, v_rows = k + offsets(base, k_s, BK, TK), v + offsets(base, v_s, BK, TK)
            near = blocks_of(columns, full, count, step + 1, BK, TK)
            which = row * bits_room + entry - full
            if TK > BK:
                which = which[None, :]
            allowed = bits_of(bits, which, rows[:, None], key[None, :], there[None, :], BQ, BK)
            acc = _towards(
                acc, query, above, q_rows, g_rows, used, total, delta, k_rows, v_rows, key, there, key_mask, allowed,
                keys, scale, True, D, CHUNK,
            )  # fmt: skip
    dq += batch * dq_b + head * dq_h + start * dq_s
    tl.store(dq + wide[:, None] * dq_s + dims, (acc * factor).to(dq.dtype.element_ty), mask=inside[:, None])
    if cu_seqlens is not None and block == q_blocks - 1 and first == BQ - TQ:
        _poison(dq, dq_s, first_row + TQ, queries, TQ, D)


def tiles(
    block: Sequence[int], dim: int, dtype: torch.dtype, bits: bool
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """`(own rows, step, warps, stages)` of the tile of keys, which steps over queries, and of that of queries."""
    rows, width = block
    if dtype == torch.float32:
        if dim == 128:
            return (min(width, 32), 16, 8, 1), (min(rows, 32), 16, 4, 1)
        return (min(width, 32), 16, 4, 1), (min(rows, 32), 32, 4, 1)
    # Two sums of a key's width each against one of a query's; bits take registers too, most of them on sm_80.
    keys, stages = min(width, 64 if bits or dim == 128 else 128), 3 if dim <= 64 else 2
    warps = {16: 2 if dim <= 64 else 4, 32: 4, 64: 4, 128: 8}
    queries = min(rows, 64) if bits and dim == 128 else rows
    key_warps = 8 if keys == 64 and (bits or dim == 128) else warps[keys]
    query_warps = 8 if queries == 64 and bits and dim == 128 else warps[queries]
    key_step, query_step = (32 if bits and own >= 64 else 64 for own in (keys, queries))
    return (keys, key_step, key_warps, stages), (queries, query_step, query_warps, stages)


def block_sparse_attention_backward(
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
    """`(dq, dk, dv)`, as the op's reference."""
    batches, heads, queries, keys = sizes_of(q, k, cu_seqlens)
    dim, (rows, width), varlen = q.shape[-1], block, cu_seqlens is not None
    grads = dq, dk, dv = token_major(q), token_major(k), token_major(v)
    order, key_columns, key_full, key_counts, places, key_order = transposed
    (q_blocks, room), k_blocks = columns.shape[2:], key_columns.shape[2]
    if batches == 0 or heads == 0 or queries == 0 or keys == 0 or q_blocks == 0:
        # Nothing to attend to; or, without padding, tokens that no list or sequence has.
        nothing = math.nan if varlen else 0.0
        return dq.fill_(nothing), dk.fill_(nothing), dv.fill_(nothing)
    bits = partial_bits if partial_bits is not None and partial_bits.numel() > 0 else None
    # Rows of a multiple of 16: aligned whatever the lengths are, so that one kernel serves them all.
    row = triton.cdiv(queries, 16) * 16
    sums, deltas = (torch.empty((*lse.shape[:-1], row), dtype=torch.float32, device=q.device) for _ in range(2))
    _rows[((1 if varlen else batches) * heads * triton.cdiv(queries, _FIRST // dim),)](
        grad_out, out, lse, grad_lse, sums, deltas, *strides_of(grad_out), *strides_of(out), row, heads, queries,
        D=dim, ROWS=_FIRST // dim,
    )  # fmt: skip
    (own, step, warps, stages), (query_own, query_step, query_warps, query_stages) = tiles(
        block, dim, q.dtype, bits is not None
    )
    operands = (*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(grad_out))
    places_of_sums, lists = (0 if varlen else heads * row, row), list_strides(columns)
    bits_room = 0 if bits is None else bits.shape[3]
    numbers = (bits_room, queries, keys, scale * LOG2_E, scale)
    _keys_values[(batches * heads * k_blocks * (width // own),)](
        q, k, v, grad_out, dk, dv, sums, deltas, key_columns, key_full, key_counts, places, bits, key_mask, cu_seqlens,
        key_order, *operands, *strides_of(dk), *strides_of(dv), *places_of_sums, *lists, heads, q_blocks, k_blocks,
        *numbers, D=dim, BQ=rows, BK=width, TQ=step, TK=own, CHUNK=chunk(dim, q.dtype),
        RAGGED=varlen or queries % rows != 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _queries[(batches * heads * q_blocks * (rows // query_own),)](
        q, k, v, grad_out, dq, sums, deltas, columns, full_counts, counts, bits, key_mask, cu_seqlens, order,
        *operands, *strides_of(dq), *places_of_sums, *lists, heads, q_blocks, room, *numbers,
        D=dim, BQ=rows, BK=width, TQ=query_own, TK=query_step, CHUNK=chunk(dim, q.dtype),
        RAGGED=varlen or keys % width != 0, num_warps=query_warps, num_stages=query_stages,
    )  # fmt: skip
    return grads


def cost(
    sizes: Sequence[int],
    dim: int,
    block: Sequence[int],
    blocks: int,
    partial: int = 0,
    bytes_each: int = 2,
) -> Cost:
    """One backward; the arguments are those of the forward's cost.

    Operands of a head stay in the cache while its tiles walk them: each launch reads them once.
    """
    batches, heads, queries, keys = sizes
    width = batches * heads * dim * bytes_each
    statistics = 4 * batches * heads * queries
    q_rows, k_rows = (batches * heads * -(-n // size) for n, size in zip((queries, keys), block, strict=True))
    bits = partial * block[0] * block[1] // 8
    scores = blocks * block[0] * block[1]
    first = Cost(2 * queries * width + statistics, 2 * statistics, 2 * batches * heads * queries * dim)
    walked = 2 * (queries + keys) * width + 2 * statistics + bits
    second = Cost(walked + 4 * (blocks + partial + 3 * k_rows), 2 * keys * width, 8 * dim * scores)
    third = Cost(walked + 4 * (blocks + 3 * q_rows), queries * width, 6 * dim * scores)
    return first + second + third


_STRIDES = (*(f"{name}_{axis}" for name in "qkvg" for axis in "bhs"), "lse_b", "lse_h")
_KEY_STRIDES = (*_STRIDES, *(f"{name}_{axis}" for name in ("dk", "dv") for axis in "bhs"))
_QUERY_STRIDES = (*_STRIDES, *(f"dq_{axis}" for axis in "bhs"))


def specimens() -> list[Specimen]:
    """Every tile; see the forward's CASES."""
    found = [_rows_specimen(torch.bfloat16, 64), _rows_specimen(torch.float32, 128)]
    for case in CASES:
        found += pair(*case)
    return found


def _rows_specimen(dtype: torch.dtype, dim: int) -> Specimen:
    word = triton_type(dtype)
    signature = dict.fromkeys(("grad", "out"), f"*{word}")
    signature |= dict.fromkeys(("lse", "grad_lse", "sums", "deltas"), "*fp32")
    strides = tuple(f"{name}_{axis}" for name in "go" for axis in "bhs")
    signature |= dict.fromkeys((*strides, "row", "heads", "tokens"), "i32")
    return Specimen(
        f"{word}, D {dim}: rows", _rows, signature, {"D": dim, "ROWS": _FIRST // dim}, divisible_by_16=(*strides, "row")
    )


def pair(dtype: torch.dtype, dim: int, block: tuple[int, int], label: str) -> list[Specimen]:
    """The launches for keys and for queries of one case."""
    (types, constants), word = VARIANTS[label], triton_type(dtype)
    keys, queries = tiles(block, dim, dtype, "bits" in types)
    base = dict.fromkeys(("q", "k", "v", "grad"), f"*{word}") | dict.fromkeys(("sums", "deltas"), "*fp32")
    base |= {**dict.fromkeys((*POINTERS, "order"), "*i32"), **types, "scale": "fp32", "factor": "fp32"}
    sizes = {**constants, "D": dim, "BQ": block[0], "BK": block[1], "CHUNK": chunk(dim, dtype)}
    name = f"{word}, D {dim}, {block[0]}x{block[1]}, {label}"
    by_key = {**base, "dk": f"*{word}", "dv": f"*{word}", "places": "*i32"}
    by_key |= dict.fromkeys((*_KEY_STRIDES, *_KEY_SIZES), "i32")
    by_query = {**base, "dq": f"*{word}", **dict.fromkeys((*_QUERY_STRIDES, *_QUERY_SIZES), "i32")}
    key_sizes = {**sizes, "TK": keys[0], "TQ": keys[1]}
    query_sizes = {**sizes, "TQ": queries[0], "TK": queries[1]}
    key_label, query_label = f"{name}: keys {keys[0]}x{keys[1]}", f"{name}: queries {queries[0]}x{queries[1]}"
    return [
        Specimen(key_label, _keys_values, by_key, key_sizes, keys[2], keys[3], divisible_by_16=_KEY_STRIDES),
        Specimen(query_label, _queries, by_query, query_sizes, queries[2], queries[3], divisible_by_16=_QUERY_STRIDES),
    ]
