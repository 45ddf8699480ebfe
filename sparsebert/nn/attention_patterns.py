"""Which blocks a self-attention computes: the usual patterns, and those found in measured maps, as `BlockLists`.

Every function but the `from_*` takes the sequence's length first, so that `functools.partial(sliding_window,
window=256)` is a pattern for any length; `PATTERNS` has those, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.ops import BlockLists
from sparsebert.ops.bits import pack_bits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "PATTERNS",
    "dense",
    "from_attention_map",
    "from_flex",
    "from_head_mask",
    "random",
    "sliding_window",
    "strided",
]

Size = Sequence[int]
BLOCK = (64, 64)


def dense(length: int, *, keys: int | None = None, block: Size | None = None) -> BlockLists:
    """Every block of `length` queries and as many keys, or `keys` of them.

    By default in blocks of 64, smaller where the sequence is shorter.
    """
    _at_least("length", length, 0)
    sides = (length, length if keys is None else keys)
    if block is None:
        block = tuple(16 if side <= 16 else 32 if side <= 32 else 64 for side in sides)
    everywhere = torch.ones(1, 1, *_grid(sides, block), dtype=torch.bool)
    return BlockLists.from_block_map(everywhere, block, lengths=sides)


def sliding_window(
    length: int, window: int, global_tokens: int | Sequence[int] = 0, *, exact: bool = True, block: Size = BLOCK
) -> BlockLists:
    """A token attends to those at most `window // 2` away, and all to and from global tokens (Longformer, 2020).

    Args:
        length: of the sequence.
        window: the width, both sides and the token itself: `window // 2` on either side.
        global_tokens: that many at the beginning ([CLS] is 1), or their places.
        exact: token for token, with bits in the blocks at the window's edge; False rounds up to whole blocks, which
            is faster and attends to more.
        block: `(BQ, BK)`.

    Raises:
        ValueError: a length, window or token out of range, named.
    """
    _at_least("length", length, 0)
    _at_least("window", window, 1)
    places = torch.arange(length)
    mask = (places[:, None] - places).abs() <= window // 2
    chosen = list(range(min(global_tokens, length))) if isinstance(global_tokens, int) else list(global_tokens)
    if isinstance(global_tokens, int):
        _at_least("global_tokens", global_tokens, 0)
    if any(not 0 <= place < length for place in chosen):
        raise ValueError(f"global_tokens: expected places between 0 and {length - 1}, got {chosen}")
    mask[chosen] = True
    mask[:, chosen] = True
    lists = BlockLists.from_mask(mask[None, None], block)
    return lists if exact else _whole(lists)


def strided(length: int, stride: int, *, local: int = 1, block: Size = BLOCK) -> BlockLists:
    """Every `stride`-th block, counted from the block itself, and `local` blocks on either side of it.

    The strided pattern of Sparse Transformers (Child et al., 2019), both ways, with blocks in the place of tokens: of
    single tokens it would touch every block.

    Raises:
        ValueError: a length, stride or number of blocks out of range, named.
    """
    _at_least("length", length, 0)
    _at_least("stride", stride, 1)
    _at_least("local", local, 0)
    rows, columns = _grid((length, length), block)
    # In tokens, for blocks that are not square: the middle of a block of queries says which blocks are its own.
    own = (torch.arange(rows) * block[0] + block[0] // 2) // block[1]
    apart = own[:, None] - torch.arange(columns)
    return _of_map((apart % stride == 0) | (apart.abs() <= local), length, block)


def random(
    length: int, density: float, seed: int = 0, *, heads: int = 1, diagonal: bool = True, block: Size = BLOCK
) -> BlockLists:
    """Blocks drawn by chance: the same number in every row of blocks, at least one; the same ones for the same seed.

    Args:
        length: of the sequence.
        density: share of the blocks, above 0 and at most 1.
        seed: of the draw, which is made on the CPU.
        heads: 1 shares the blocks among all heads, more draw for each its own.
        diagonal: a row's own block is among them.
        block: `(BQ, BK)`.

    Raises:
        ValueError: a length, density or number of heads out of range, named.
    """
    _at_least("length", length, 0)
    _at_least("heads", heads, 1)
    _share("density", density)
    rows, columns = _grid((length, length), block)
    scores = torch.rand(1, heads, rows, columns, generator=torch.Generator().manual_seed(seed))
    if diagonal and rows:
        own = ((torch.arange(rows) * block[0] + block[0] // 2) // block[1]).clamp(max=columns - 1)
        scores[:, :, torch.arange(rows), own] = 2.0
    return _of_map(_largest(scores, max(1, round(density * columns))), length, block)


def from_attention_map(
    probs: Tensor | Iterable[Tensor],
    keep: int | float | None = None,
    *,
    mass: float | None = None,
    block: Size = BLOCK,
) -> BlockLists:
    """The blocks that hold most of measured attention, for each head its own; no row of blocks is left without one.

    Args:
        probs: attention maps `[B, H, S, S]` or `[H, S, S]` of floats, as `output_attentions=True` gives for one layer;
            or several of them, as from a loop over data. They are averaged; all of one H and S.
        keep: an int is how many blocks of every row of blocks, a float the share of all blocks of a head, wherever
            they are.
        mass: instead of `keep`: in every row of blocks the fewest that hold this share of its attention.
        block: `(BQ, BK)`.

    Raises:
        ValueError: maps of other shapes, not exactly one of `keep` and `mass`, or either out of range, named.
    """
    if (keep is None) == (mass is None):
        raise ValueError(f"keep, mass: expected exactly one of the two, got keep={keep} and mass={mass}")
    mean = _mean_map(probs)
    length = mean.shape[-1]
    sums = _block_sums(mean, block)
    if mass is not None:
        _share("mass", mass)
        found = _holding(sums, mass)
    elif isinstance(keep, int):
        _at_least("keep", keep, 1)
        found = _largest(sums, min(keep, sums.shape[-1]))
    else:
        assert keep is not None
        _share("keep", keep)
        blocks = sums.shape[-2] * sums.shape[-1]
        whole = _largest(sums.flatten(1), max(1, round(keep * blocks))) if blocks else sums.flatten(1) > 0
        found = whole.view_as(sums) | _largest(sums, 1)
    return _of_map(found, length, block)


def from_head_mask(
    head_mask: Tensor, length: int | None = None, *, blocks: BlockLists | None = None, block: Size = BLOCK
) -> BlockLists:
    """Blocks for the heads that are kept alone: a pruned head computes nothing and gives 0.

    Args:
        head_mask: bool `[H]`, True where the head is kept.
        length: of the sequence, where every block of it is attended.
        blocks: instead of `length`: what the kept heads attend to, for all heads or each its own.

    Raises:
        ValueError: a mask of another kind, or lists for another number of heads, named.
    """
    if head_mask.dim() != 1 or head_mask.dtype != torch.bool:
        raise ValueError(f"head_mask: expected bool [heads], got {head_mask.dtype} {list(head_mask.shape)}")
    if (length is None) == (blocks is None):
        raise ValueError("length, blocks: expected exactly one of the two")
    if blocks is None:
        assert length is not None
        blocks = dense(length, block=block)
    if blocks.columns.shape[1] not in (1, len(head_mask)):
        raise ValueError(f"blocks: expected lists for 1 or {len(head_mask)} heads, got {blocks.columns.shape[1]}")
    kept = head_mask.to(blocks.columns.device)[None, :, None]
    size = (-1, len(head_mask), -1)
    columns = blocks.columns.expand(*size, -1).contiguous()
    full, counts = ((x * kept).to(torch.int32).contiguous() for x in (blocks.full_counts, blocks.counts))
    bits = blocks.partial_bits
    if bits is not None:
        bits = bits.expand(*size, -1, -1, -1).contiguous()
    return BlockLists(columns, full, counts, bits, blocks.block, blocks.lengths)


def from_flex(block_mask: BlockMask) -> BlockLists:
    """The lists of a FlexAttention `BlockMask`, accepted as it is; its `mask_mod` becomes bits in the partial blocks.

    Raises:
        ValueError: not a BlockMask, or blocks of a size that is not supported, named.
    """
    if not hasattr(block_mask, "kv_num_blocks") or not hasattr(block_mask, "mask_mod"):
        raise ValueError(
            "block_mask: expected a BlockMask as torch.nn.attention.flex_attention.create_block_mask makes it, got "
            f"{type(block_mask).__name__}"
        )
    size = (int(block_mask.BLOCK_SIZE[0]), int(block_mask.BLOCK_SIZE[1]))
    sides = getattr(block_mask, "seq_lengths", None) or tuple(block_mask.shape[-2:])
    sides = (int(sides[0]), int(sides[1]))
    rows, columns = _grid(sides, size)
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, rows, columns)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, rows, columns)
    partial &= ~full
    column = torch.arange(columns, device=full.device)
    order = torch.where(full, column, torch.where(partial, column + columns, column + 2 * columns)).sort(-1).values
    listed = (order % max(columns, 1)).to(torch.int32).contiguous()
    counts = (full.sum(-1, dtype=torch.int32), (full | partial).sum(-1, dtype=torch.int32))
    return BlockLists(listed, *counts, _partial_bits(block_mask, partial, size, sides), size, sides)


PATTERNS: dict[str, Callable[..., BlockLists]] = {
    "dense": dense,
    "random": random,
    "sliding_window": sliding_window,
    "strided": strided,
}
"""Patterns that are a name and numbers, and so can stand in a model's config."""


def _listed(counts: Tensor, indices: Tensor, rows: int, columns: int) -> Tensor:
    """bool `[B, H, rows, columns]` of FlexAttention's counts and indices."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # What is not used goes to a column past the last.
    target = torch.where(used, indices.long(), columns).clamp(max=columns)
    found = torch.zeros(*indices.shape[:3], columns + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(3, target, True)[:, :, :rows, :columns]


def _partial_bits(
    block_mask: BlockMask, partial: Tensor, size: tuple[int, int], sides: tuple[int, int]
) -> Tensor | None:
    """The mask_mod's answers in the partial blocks alone, as `BlockLists.partial_bits`."""
    most = int(partial.sum(-1).max()) if partial.numel() else 0
    if most == 0:
        return None
    batch, head, row, column = partial.nonzero(as_tuple=True)
    device = partial.device
    # Kept within the sequence, since a mask_mod may look into a tensor of its length; bits beyond it are ignored.
    query = (row[:, None] * size[0] + torch.arange(size[0], device=device)).clamp(max=sides[0] - 1)
    key = (column[:, None] * size[1] + torch.arange(size[1], device=device)).clamp(max=sides[1] - 1)
    of_keys = torch.vmap(block_mask.mask_mod, in_dims=(None, None, None, 0))
    of_both = torch.vmap(of_keys, in_dims=(None, None, 0, None))
    answers = torch.vmap(of_both)(batch, head, query, key)
    bits = torch.zeros(*partial.shape[:3], most, size[0], size[1] // 8, dtype=torch.uint8, device=device)
    place = (partial.cumsum(-1) - 1)[batch, head, row, column]
    bits[batch, head, row, place] = pack_bits(answers.bool()).view(len(row), size[0], size[1] // 8)
    return bits


def _mean_map(probs: Tensor | Iterable[Tensor]) -> Tensor:
    """`[H, S, S]` in float32 at least: the mean over all maps and their batches."""
    total, count = None, 0
    for maps in [probs] if isinstance(probs, Tensor) else probs:
        if maps.dim() not in (3, 4) or maps.shape[-1] != maps.shape[-2] or not maps.is_floating_point():
            raise ValueError(
                f"probs: expected float maps [B, H, S, S] or [H, S, S], got {maps.dtype} {list(maps.shape)}"
            )
        wide = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
        summed = wide.sum(0) if maps.dim() == 4 else wide
        if total is not None and total.shape != summed.shape:
            raise ValueError(f"probs: expected maps of one size {list(total.shape)}, got {list(summed.shape)}")
        total = summed if total is None else total + summed
        count += maps.shape[0] if maps.dim() == 4 else 1
    if total is None or count == 0:
        raise ValueError("probs: expected at least one map")
    return total / count


def _block_sums(values: Tensor, block: Size) -> Tensor:
    """`[H, S, S]` summed over blocks: `[H, QB, KB]`."""
    heads, length, _ = values.shape
    rows, columns = _grid((length, length), block)
    beyond = (0, columns * block[1] - length, 0, rows * block[0] - length)
    return torch.nn.functional.pad(values, beyond).view(heads, rows, block[0], columns, block[1]).sum((2, 4))


def _largest(scores: Tensor, count: int) -> Tensor:
    """bool like scores: the `count` largest along the last dimension, the first ones among equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _holding(sums: Tensor, mass: float) -> Tensor:
    """bool like sums: along the last dimension the fewest that hold the share `mass` of all, at least one."""
    values, order = sums.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    wanted = before < mass * values.sum(-1, keepdim=True)
    wanted[..., :1] = True
    return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, order, wanted)


def _of_map(found: Tensor, length: int, block: Size) -> BlockLists:
    """Lists of a bool map `[QB, KB]`, `[H, QB, KB]` or `[1, H, QB, KB]`."""
    whole = found[(None,) * (4 - found.dim())]
    return BlockLists.from_block_map(whole, block, lengths=(length, length))


def _whole(lists: BlockLists) -> BlockLists:
    """The same with every partial block full, in order again."""
    columns = lists.columns.shape[3]
    used = torch.arange(columns, device=lists.columns.device) < lists.counts[..., None]
    ordered = torch.where(used, lists.columns, 2**30).sort(-1).values
    ordered = torch.where(used, ordered, 0).contiguous()
    return BlockLists(ordered, lists.counts, lists.counts, None, lists.block, lists.lengths)


def _grid(sides: Size, block: Size) -> tuple[int, int]:
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block: expected (query rows, keys), got {tuple(block)}")
    return -(-sides[0] // block[0]), -(-sides[1] // block[1])


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected above 0 and at most 1, got {value!r}")
