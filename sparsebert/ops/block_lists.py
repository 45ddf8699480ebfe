"""Which blocks of an attention's score matrix are computed: lists of key blocks, one for each block of query rows.

A score matrix `[Sq, Sk]` is cut into blocks of `BQ x BK`; the last ones may hang over its edge. Every block is left
out, *full* (all of it attended, no mask arithmetic at all) or *partial* (a bit for each score). FlexAttention's
`BlockMask` holds the same, with a function in place of the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import Op, _interpreted, constant_result, forced_backend
from sparsebert.ops.bits import pack_bits, unpack_bits

__all__ = [
    "BLOCK_SIZES",
    "BlockLists",
    "block_lists_reference",
    "block_order_reference",
    "lists_to_mask",
    "transposed_block_lists_reference",
]

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The blocks that are attended, by rows of blocks; for all batches and heads, or for each its own.

    With `QB = ceil(Sq / BQ)` and `KB = ceil(Sk / BK)` blocks on the sides; `Bm` and `Hm` are 1 where all batches or
    heads share the lists. Shapes and dtypes are checked when it is made, the content by `check()`: making it waits for
    no GPU. The `from_*` functions make right ones.
    """

    columns: Tensor
    """int32 `[Bm, Hm, QB, L]`: a row's key blocks, first the full ones, then the partial ones, each ascending; what
    stands after the first `counts` is ignored."""
    full_counts: Tensor
    """int32 `[Bm, Hm, QB]`: how many of them are full."""
    counts: Tensor
    """int32 `[Bm, Hm, QB]`: how many there are, full and partial."""
    partial_bits: Tensor | None
    """uint8 `[Bm, Hm, QB, P, BQ, BK / 8]`: the scores attended in a row's partial blocks, in the columns' order, least
    significant bit first; None where there are none. Bits beyond the edges are ignored."""
    block: tuple[int, int]
    """`(BQ, BK)`: 16, 32, 64 or 128 each."""
    lengths: tuple[int, int]
    """`(Sq, Sk)`: of the sequences, the longest ones where they differ."""
    _cache: dict[str, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_sizes(self.block, self.lengths)
        if self.columns.dim() != 4 or self.columns.dtype != torch.int32:
            raise ValueError(
                f"columns: expected int32 [batch or 1, heads or 1, query blocks, L], got {_shown(self.columns)}"
            )
        rows = self.columns.shape[:3]
        if rows[2] != _blocks(self.lengths[0], self.block[0]):
            raise ValueError(
                f"columns: expected {_blocks(self.lengths[0], self.block[0])} rows of blocks for {self.lengths[0]} "
                f"queries in blocks of {self.block[0]}, got {rows[2]}"
            )
        for name, counts in (("full_counts", self.full_counts), ("counts", self.counts)):
            if counts.shape != rows or counts.dtype != torch.int32:
                raise ValueError(f"{name}: expected int32 {list(rows)} as columns has rows, got {_shown(counts)}")
        bits = self.partial_bits
        if bits is not None and (
            bits.dtype != torch.uint8
            or bits.dim() != 6
            or bits.shape[:3] != rows
            or tuple(bits.shape[4:]) != (self.block[0], self.block[1] // 8)
        ):
            wanted = f"[{', '.join(map(str, rows))}, P, {self.block[0]}, {self.block[1] // 8}]"
            raise ValueError(f"partial_bits: expected uint8 {wanted}, got {_shown(bits)}")
        for name, tensor in self._tensors().items():
            if not tensor.is_contiguous() or tensor.device != self.columns.device:
                raise ValueError(f"{name}: expected contiguous, on {self.columns.device} like columns")

    @classmethod
    def from_block_map(
        cls,
        block_map: Tensor,
        block: Sequence[int] = (64, 64),
        element_mask: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> BlockLists:
        """Lists of the blocks that are True in a map of blocks.

        Args:
            block_map: bool `[Bm, Hm, QB, KB]`.
            block: `(BQ, BK)`.
            element_mask: bool `[Bm, Hm, Sq, Sk]` (1 for Bm and Hm shares it): which scores within those blocks are
                attended. A block without any is left out, one with all is full. Needs one wait for a GPU.
            lengths: `(Sq, Sk)`; by default the mask's, or else whole blocks.

        Raises:
            ValueError: shapes or dtypes that do not fit, named.
        """
        size = (int(block[0]), int(block[1]))
        if block_map.dim() != 4 or block_map.dtype != torch.bool:
            raise ValueError(
                "block_map: expected bool [batch or 1, heads or 1, query blocks, key blocks], got " + _shown(block_map)
            )
        if element_mask is not None:
            _check_mask("element_mask", element_mask)
            lengths = element_mask.shape[2:] if lengths is None else lengths
        if lengths is None:
            lengths = (block_map.shape[2] * size[0], block_map.shape[3] * size[1])
        sides = (int(lengths[0]), int(lengths[1]))
        _check_sizes(size, sides)
        grid = (_blocks(sides[0], size[0]), _blocks(sides[1], size[1]))
        if tuple(block_map.shape[2:]) != grid:
            raise ValueError(
                f"block_map: expected {list(grid)} blocks of {size[0]} x {size[1]} for {sides[0]} queries and "
                f"{sides[1]} keys, got {list(block_map.shape[2:])}"
            )
        if element_mask is None:
            columns, full_counts, counts = _made(_lists, block_lists_reference, block_map, None)
            return cls(columns, full_counts, counts, None, size, sides)
        if tuple(element_mask.shape[2:]) != sides:
            raise ValueError(f"element_mask: expected {list(sides)} scores, got {list(element_mask.shape[2:])}")
        return cls._with_bits(block_map, element_mask, size, sides)

    @classmethod
    def from_mask(cls, mask: Tensor, block: Sequence[int] = (64, 64)) -> BlockLists:
        """Lists of the blocks in which a bool mask `[Bm, Hm, Sq, Sk]` is True anywhere; one wait for a GPU.

        Raises:
            ValueError: a mask or a block of another kind, named.
        """
        _check_mask("mask", mask)
        _check_sizes((int(block[0]), int(block[1])), (mask.shape[2], mask.shape[3]))
        rows, keys = _blocks(mask.shape[2], int(block[0])), _blocks(mask.shape[3], int(block[1]))
        everywhere = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=mask.device)
        return cls.from_block_map(everywhere, block, mask)

    @classmethod
    def _with_bits(cls, block_map: Tensor, mask: Tensor, size: tuple[int, int], sides: tuple[int, int]) -> BlockLists:
        try:
            both = torch.broadcast_shapes(block_map.shape[:2], mask.shape[:2])
        except RuntimeError:
            raise ValueError(
                f"element_mask: expected 1 or as many batches and heads as block_map, {list(block_map.shape[:2])}, "
                f"got {list(mask.shape[:2])}"
            ) from None
        grid = tuple(block_map.shape[2:])
        beyond = (0, grid[1] * size[1] - sides[1], 0, grid[0] * size[0] - sides[0])
        # As blocks: [Bm, Hm, QB, KB, BQ, BK]. What hangs over the edge decides nothing.
        blocks, inside = (
            torch.nn.functional.pad(x, beyond).unflatten(3, (grid[1], size[1])).unflatten(2, (grid[0], size[0]))
            for x in (mask, torch.ones(1, 1, *sides, dtype=torch.bool, device=mask.device))
        )
        some, every = blocks.any(dim=5).any(dim=3), (blocks | ~inside).all(dim=5).all(dim=3)
        full, partial = (block_map & every).expand(*both, -1, -1), (block_map & some & ~every).expand(*both, -1, -1)
        columns, full_counts, counts = _made(_lists, block_lists_reference, full, partial)
        most = int((counts - full_counts).max()) if counts.numel() else 0
        if most == 0:
            return cls(columns, full_counts, counts, None, size, sides)
        bits = pack_bits(blocks.transpose(3, 4)).view(*mask.shape[:2], *grid, size[0], size[1] // 8)
        places = torch.arange(most, device=mask.device, dtype=torch.int32) + full_counts[..., None]
        wanted = columns.gather(3, places.clamp(max=grid[1] - 1).long()).long()
        wanted = wanted[..., None, None].expand(-1, -1, -1, -1, *bits.shape[4:])
        kept = bits.expand(*both, *bits.shape[2:]).gather(3, wanted)
        return cls(columns, full_counts, counts, kept, size, sides)

    def check(self) -> BlockLists:
        """Itself, if its content is right; waits for a GPU.

        Raises:
            ValueError: counts or columns out of range, or columns that do not ascend, named with their place.
        """
        length, keys = self.columns.shape[3], _blocks(self.lengths[1], self.block[1])
        partial = 0 if self.partial_bits is None else self.partial_bits.shape[3]
        full, counts = self.full_counts, self.counts
        _refuse("full_counts", (full < 0) | (full > counts), full, "between 0 and counts")
        _refuse("counts", counts > length, counts, f"at most {length}, the room in columns")
        _refuse("counts", counts - full > partial, counts, f"at most {partial} partial blocks, as partial_bits has")
        entry = torch.arange(length, device=counts.device)
        used = entry < counts[..., None]
        wrong = used & ((self.columns < 0) | (self.columns >= keys))
        _refuse("columns", wrong, self.columns, f"between 0 and {keys - 1}")
        # The first of the partial ones need not follow on the last of the full ones.
        pairs = used[..., 1:] & (entry[1:] != full[..., None])
        wrong = torch.nn.functional.pad(pairs & (self.columns[..., 1:] <= self.columns[..., :-1]), (1, 0))
        _refuse("columns", wrong, self.columns, "ascending among the full and among the partial blocks")
        either = _placed(self.columns, full, counts, keys)[0] + 1
        _refuse("columns", (either > 0).sum(-1) != counts, counts, "no block both full and partial")
        return self

    def transposed(self) -> list[Tensor]:
        """The same by key blocks, made on the device without waiting for it, and remembered (but
        not where a CUDA graph is being captured).

        Returns:
            `[order, columns, full_counts, counts, places, key_order]`, all int32: `order` `[Bm, Hm, QB]` is each
            head's block rows, those with most blocks first; then the lists of each key block, query blocks in the
            place of key blocks: `columns` `[Bm, Hm, KB, QB]`, `full_counts` and `counts` `[Bm, Hm, KB]`; `places`
            `[Bm, Hm, KB, QB]` says for each partial entry which of its block row's `partial_bits` are its own (0 for
            full ones); `key_order` `[Bm, Hm, KB]` is like `order`.
        """
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # What is remembered may be needed for training later on.
            with torch.inference_mode(False):
                return self.transposed()
        if "transposed" not in self._cache:
            keys = _blocks(self.lengths[1], self.block[1])
            lists = (self.columns, self.full_counts, self.counts)
            turned = _made(_transposed, transposed_block_lists_reference, *lists, keys)
            return self._remembered("transposed", [*self.order(), *turned])
        return self._cache["transposed"]

    def order(self) -> list[Tensor]:
        """The first of `transposed()`, `[order]`: all that a forward alone can use of them; remembered."""
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.order()
        if "order" not in self._cache:
            return self._remembered("order", [_made(_order, block_order_reference, self.counts)])
        return self._cache["order"]

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists on another device; itself where they are there."""
        columns, full_counts, counts = (x.to(device) for x in (self.columns, self.full_counts, self.counts))
        bits = None if self.partial_bits is None else self.partial_bits.to(device)
        if columns is self.columns:
            return self
        return BlockLists(columns, full_counts, counts, bits, self.block, self.lengths)

    def density(self) -> float:
        """The share of blocks that are computed, partial ones included; waits for a GPU."""
        blocks = self.counts.numel() * _blocks(self.lengths[1], self.block[1])
        return int(self.counts.sum()) / blocks if blocks else 0.0

    def to_mask(self) -> Tensor:
        """bool `[Bm, Hm, Sq, Sk]`: the scores attended."""
        return lists_to_mask(self.columns, self.full_counts, self.counts, self.partial_bits, self.block, self.lengths)

    def _remembered(self, name: str, made: list[Tensor]) -> list[Tensor]:
        # What a CUDA graph is to make holds nothing before the graph has run: a call beside it would read garbage.
        captured = not torch.compiler.is_compiling() and self.columns.is_cuda
        if not (captured and torch.cuda.is_current_stream_capturing()):
            self._cache[name] = made
        return made

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"columns": self.columns, "full_counts": self.full_counts, "counts": self.counts}
        return tensors if self.partial_bits is None else {**tensors, "partial_bits": self.partial_bits}


def lists_to_mask(
    columns: Tensor,
    full_counts: Tensor,
    counts: Tensor,
    partial_bits: Tensor | None,
    block: Sequence[int],
    lengths: Sequence[int],
) -> Tensor:
    """bool `[Bm, Hm, Sq, Sk]`: the scores that lists (see `BlockLists`) attend; columns beyond Sk are left out."""
    (rows, width), (queries, keys) = block, lengths
    placed, entries = _placed(columns, full_counts, counts, _blocks(keys, width))
    mask = (placed == 0).repeat_interleave(rows, dim=2).repeat_interleave(width, dim=3)
    if partial_bits is not None and partial_bits.numel() > 0:
        elements = unpack_bits(partial_bits.reshape(-1), (*partial_bits.shape[:5], width))
        first = full_counts[..., None] + torch.arange(partial_bits.shape[3], device=columns.device)
        # Entries past the last one go to the column beyond the edge, which is dropped.
        spare = torch.nn.functional.pad(entries, (0, 1), value=placed.shape[3])
        target = spare.gather(3, first.masked_fill(first >= counts[..., None], columns.shape[3]))
        whole = elements.new_zeros(*placed.shape[:3], placed.shape[3] + 1, rows, width)
        whole.scatter_(3, target[..., None, None].expand_as(elements), elements)
        mask = mask | whole[..., :-1, :, :].transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return mask[..., :queries, :keys]


def _placed(columns: Tensor, full_counts: Tensor, counts: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """What each block is, int32 `[Bm, Hm, QB, KB]`: -1 left out, 0 full, i + 1 the row's partial block i.

    And int64 like columns: each entry's column, `keys` for those that are not used.
    """
    entry = torch.arange(columns.shape[3], device=columns.device, dtype=torch.int32)
    used = (entry < counts[..., None]) & (columns >= 0) & (columns < keys)
    entries = torch.where(used, columns, keys).long()
    what = (entry - full_counts[..., None] + 1).clamp(min=0)
    whole = torch.full((*columns.shape[:3], keys + 1), -1, dtype=torch.int32, device=columns.device)
    return whole.scatter_(3, entries, what.int())[..., :-1], entries


def block_lists_reference(full: Tensor, partial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: `(columns, full_counts, counts)` of bool maps of blocks `[Bm, Hm, rows, columns]`.

    Columns that are listed in neither are behind the others.
    """
    width = full.shape[3]
    some = full if partial is None else full | partial
    column = torch.arange(width, device=full.device, dtype=torch.int32)
    rank = torch.where(full, column, torch.where(some, column + width, column + 2 * width))
    columns = rank.sort(dim=3).values % max(width, 1)
    return columns.contiguous(), full.sum(3, dtype=torch.int32), some.sum(3, dtype=torch.int32)


def block_order_reference(counts: Tensor) -> Tensor:
    """The definition: int32 like counts `[Bm, Hm, rows]`, each head's rows, those with most blocks first.

    Stable, so that rows as heavy as each other stay neighbours, and the same lists give the same order.
    """
    return counts.argsort(dim=2, descending=True, stable=True).int()


def transposed_block_lists_reference(
    columns: Tensor, full_counts: Tensor, counts: Tensor, keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The definition: all of `BlockLists.transposed()` but the first, for `keys` key blocks."""
    placed = _placed(columns, full_counts, counts, keys)[0].transpose(2, 3)
    turned, fulls, all_of_them = block_lists_reference(placed == 0, placed > 0)
    places = (placed.gather(3, turned.long()) - 1).clamp_(min=0).contiguous()
    return turned, fulls, all_of_them, places, block_order_reference(all_of_them)


def _made(op: Op, reference: Callable[..., Any], first: Tensor, *rest: Any) -> Any:
    """By the op where it has a kernel, which is in Triton alone, and else by its definition."""
    device = first.device
    return (op.pick(device) if _has_kernels(device.type) else reference)(first, *rest)


@constant_result
def _has_kernels(device: str) -> bool:
    """Whether Triton makes lists there; another backend may be forced, whose operands alone they are."""
    forced = forced_backend()
    return forced in (None, "triton") if device == "cuda" else forced == "triton" and device == "cpu" and _interpreted()


def _fake_lists(full: Tensor, partial: Any) -> tuple[Tensor, Tensor, Tensor]:
    counts = full.new_empty(full.shape[:3], dtype=torch.int32)
    return full.new_empty(full.shape, dtype=torch.int32), counts, torch.empty_like(counts)


def _fake_order(counts: Tensor) -> Tensor:
    return counts.new_empty(counts.shape)


def _fake_transposed(columns: Tensor, full_counts: Any, counts: Any, keys: int) -> tuple[Tensor, ...]:
    batches, heads, blocks, _ = columns.shape
    turned = columns.new_empty(batches, heads, keys, blocks)
    fulls, all_of_them, order = (columns.new_empty(batches, heads, keys) for _ in range(3))
    return turned, fulls, all_of_them, torch.empty_like(turned), order


_lists = Op("block_lists", block_lists_reference, _fake_lists)
_order = Op("block_order", block_order_reference, _fake_order)
_transposed = Op("transposed_block_lists", transposed_block_lists_reference, _fake_transposed)


def _blocks(length: int, size: int) -> int:
    return (length + size - 1) // size


def _shown(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_sizes(block: tuple[int, int], lengths: tuple[int, int]) -> None:
    if len(block) != 2 or any(size not in BLOCK_SIZES for size in block):
        raise ValueError(f"block: expected (query rows, keys), each one of {BLOCK_SIZES}, got {tuple(block)}")
    if len(lengths) != 2 or any(length < 0 for length in lengths):
        raise ValueError(f"lengths: expected (queries, keys), each at least 0, got {tuple(lengths)}")


def _check_mask(name: str, mask: Tensor) -> None:
    if mask.dim() != 4 or mask.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool [batch or 1, heads or 1, queries, keys], got {_shown(mask)}")


def _refuse(name: str, wrong: Tensor, values: Tensor, expected: str) -> None:
    """Raise a ValueError that tells the first wrong place, if there is one."""
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}: expected {expected}, got {int(values[tuple(place)])} at {place}")
