from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.block_attention import random_mask
from torch import Tensor

from sparsebert.ops import BlockLists, block_sparse_attention
from sparsebert.ops.block_lists import lists_to_mask

SIZES = st.sampled_from([16, 32, 64])
LENGTHS = st.sampled_from([0, 1, 15, 16, 33, 64, 70, 128])
SHARES = st.sampled_from([0.0, 0.3, 1.0])


def make(**changes: Any) -> BlockLists:
    """Two query blocks and three key blocks of 16 x 16; row 0 has block 0 in full and 2 in part, row 1 block 1."""
    parts: dict[str, Any] = {
        "columns": torch.tensor([[[[0, 2], [1, 0]]]], dtype=torch.int32),
        "full_counts": torch.tensor([[[1, 1]]], dtype=torch.int32),
        "counts": torch.tensor([[[2, 1]]], dtype=torch.int32),
        "partial_bits": torch.full((1, 1, 2, 1, 16, 2), 5, dtype=torch.uint8),
        "block": (16, 16),
        "lengths": (32, 48),
    }
    return BlockLists(**{**parts, **changes})


@given(
    own=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]),
    queries=LENGTHS,
    keys=LENGTHS,
    block=st.tuples(SIZES, SIZES),
    density=SHARES,
    partial=SHARES,
    seed=st.integers(0, 99),
)
def test_lists_hold_the_mask_and_are_right(
    own: tuple[int, int], queries: int, keys: int, block: tuple[int, int], density: float, partial: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask((*own, queries, keys), block, density, partial, generator)
    lists = BlockLists.from_mask(mask, block).check()
    assert torch.equal(lists.to_mask(), mask)
    assert int(lists.full_counts.sum()) <= int(lists.counts.sum())
    if density == 1.0 and partial == 0.0 and mask.numel():
        assert lists.density() == 1.0 and torch.equal(lists.full_counts, lists.counts) and lists.partial_bits is None
    if density == 0.0:
        assert lists.density() == 0.0


@given(queries=LENGTHS, keys=LENGTHS, block=st.tuples(SIZES, SIZES), seed=st.integers(0, 99))
def test_transposed_lists_are_those_of_the_transposed_mask(
    queries: int, keys: int, block: tuple[int, int], seed: int
) -> None:
    mask = random_mask((2, 2, queries, keys), block, 0.6, 0.5, torch.Generator().manual_seed(seed))
    lists = BlockLists.from_mask(mask, block)
    order, columns, full_counts, counts, places, key_order = lists.transposed()
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lists.transposed())
    bits = None
    if lists.partial_bits is not None:
        # The bits of each key block's partial entries, turned: places say where they lie.
        bits = torch.zeros(*columns.shape, *reversed(lists.block), dtype=torch.bool)
        for batch, head, key, entry in (full_counts[..., None] <= torch.arange(columns.shape[3])).nonzero().tolist():
            if entry < counts[batch, head, key]:
                at = (batch, head, int(columns[batch, head, key, entry]), int(places[batch, head, key, entry]))
                bits[batch, head, key, entry - full_counts[batch, head, key]] = unpacked(lists.partial_bits[at]).T
        bits = (
            (bits.unflatten(-1, (-1, 8)).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
        )
    turned = lists_to_mask(columns, full_counts, counts, bits, (block[1], block[0]), (keys, queries))
    assert torch.equal(turned, mask.transpose(2, 3))
    assert bool((lists.counts.gather(2, order.long()).diff(dim=2) <= 0).all())
    assert bool((counts.gather(2, key_order.long()).diff(dim=2) <= 0).all())
    assert torch.equal(order.sort(dim=2).values, torch.arange(order.shape[2], dtype=torch.int32).expand_as(order))
    assert lists.transposed()[1] is columns and lists.order()[0] is order


def unpacked(bits: Tensor) -> Tensor:
    return ((bits[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten(-2)


def test_a_map_of_blocks_needs_no_mask() -> None:
    block_map = torch.tensor([[[[True, False, True], [False, False, False]]]])
    lists = BlockLists.from_block_map(block_map, (16, 32)).check()
    assert lists.lengths == (32, 96) and lists.partial_bits is None and lists.density() == 2 / 6
    assert lists.columns[0, 0, 0, :2].tolist() == [0, 2] and lists.counts.tolist() == [[[2, 0]]]
    assert torch.equal(lists.to_mask(), block_map.repeat_interleave(16, 2).repeat_interleave(32, 3))
    ragged = BlockLists.from_block_map(block_map, (16, 32), lengths=(17, 65))
    assert torch.equal(ragged.to_mask(), lists.to_mask()[..., :17, :65])


def test_a_mask_within_a_map() -> None:
    block_map = torch.tensor([[True, False], [True, True]]).expand(1, 2, 2, 2)
    mask = torch.ones(3, 1, 32, 32, dtype=torch.bool).tril()
    lists = BlockLists.from_block_map(block_map, (16, 16), mask).check()
    assert lists.columns.shape[:2] == (3, 2)
    assert torch.equal(lists.to_mask(), (mask & torch.ones(32, 32, dtype=torch.bool)).expand(3, 2, -1, -1))
    # The diagonal ones are partial, the one below is full.
    assert lists.full_counts[0, 0].tolist() == [0, 1] and lists.counts[0, 0].tolist() == [1, 2]


def test_by_hand_and_moved() -> None:
    mask = make().check().to_mask()
    assert mask[0, 0, :16, :16].all() and not mask[0, 0, :16, 16:32].any() and mask[0, 0, 16:, 16:32].all()
    assert torch.equal(mask[0, 0, 3, 32:], torch.tensor([True, False, True, *[False] * 5] * 2))
    lists = make()
    assert lists.to("cpu") is lists and lists.to("meta").columns.device.type == "meta"
    assert "cache" not in repr(lists)


def integers(*rows: Any) -> Tensor:
    return torch.tensor([[list(rows)]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": (16, 24)}, r"block: expected .*16, 32, 64, 128.* got \(16, 24\)"),
        ({"lengths": (-1, 48)}, "lengths: expected"),
        ({"columns": torch.zeros(1, 1, 2, 2)}, "columns: expected int32"),
        ({"columns": torch.zeros(1, 2, 2, dtype=torch.int32)}, "columns: expected int32"),
        ({"columns": torch.zeros(1, 1, 3, 2, dtype=torch.int32)}, "columns: expected 2 rows of blocks for 32 queries"),
        ({"counts": torch.zeros(1, 1, 3, dtype=torch.int32)}, r"counts: expected int32 \[1, 1, 2\]"),
        ({"full_counts": torch.zeros(1, 1, 2)}, r"full_counts: expected int32 \[1, 1, 2\]"),
        (
            {"partial_bits": torch.zeros(1, 1, 2, 1, 16, 3, dtype=torch.uint8)},
            r"partial_bits: expected uint8 \[1, 1, 2",
        ),
        ({"partial_bits": torch.zeros(1, 1, 2, 1, 16, 2)}, "partial_bits: expected uint8"),
        ({"counts": torch.zeros(1, 1, 4, dtype=torch.int32)[..., ::2]}, "counts: expected contiguous"),
        ({"counts": torch.zeros(1, 1, 2, dtype=torch.int32, device="meta")}, "counts: expected contiguous, on cpu"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": integers(3, 1)}, "counts: expected at most 2, the room in columns, got 3"),
        (
            {"counts": integers(2, 2), "full_counts": integers(2, -1)},
            "full_counts: expected between 0 and counts, got -1",
        ),
        ({"full_counts": integers(1, 2)}, "full_counts: expected between 0 and counts, got 2"),
        ({"full_counts": integers(0, 1)}, "counts: expected at most 1 partial blocks, as partial_bits has, got 2"),
        ({"partial_bits": None}, "counts: expected at most 0 partial blocks"),
        ({"columns": integers([0, 3], [1, 0])}, r"columns: expected between 0 and 2, got 3 at \[0, 0, 0, 1\]"),
        ({"columns": integers([-1, 2], [1, 0])}, "columns: expected between 0 and 2, got -1"),
        ({"columns": integers([2, 0], [1, 0]), "full_counts": integers(2, 1)}, r"columns: expected ascending .* got 0"),
        ({"columns": integers([1, 1], [1, 0]), "full_counts": integers(2, 1)}, "columns: expected ascending"),
        ({"columns": integers([1, 1], [1, 0])}, "columns: expected no block both full and partial"),
    ],
)
def test_content_that_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    lists = make(**change)
    with pytest.raises(ValueError, match=message):
        lists.check()


def test_what_stands_after_the_last_block_is_ignored() -> None:
    assert torch.equal(make(columns=integers([0, 2], [1, 99])).check().to_mask(), make().to_mask())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2, dtype=torch.bool),), "block_map: expected bool"),
        ((torch.zeros(1, 1, 2, 2),), "block_map: expected bool"),
        ((torch.zeros(1, 1, 2, 2, dtype=torch.bool), (8, 16)), r"block: expected .* got \(8, 16\)"),
        (
            (torch.zeros(1, 1, 2, 2, dtype=torch.bool), (16, 16), torch.zeros(1, 1, 48, 32, dtype=torch.bool)),
            r"block_map: expected \[3, 2\] blocks of 16 x 16 for 48 queries and 32 keys, got \[2, 2\]",
        ),
        (
            (torch.zeros(2, 1, 1, 1, dtype=torch.bool), (16, 16), torch.zeros(3, 1, 16, 16, dtype=torch.bool)),
            r"element_mask: expected 1 or as many batches and heads as block_map, \[2, 1\], got \[3, 1\]",
        ),
        (
            (torch.zeros(1, 1, 1, 1, dtype=torch.bool), (16, 16), torch.zeros(1, 1, 16, 16)),
            "element_mask: expected bool",
        ),
    ],
)
def test_maps_and_masks_that_do_not_fit_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockLists.from_block_map(*arguments)


def test_a_mask_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="mask: expected bool"):
        BlockLists.from_mask(torch.zeros(16, 16, dtype=torch.bool))
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="element_mask: expected \\[17, 16\\] scores"):
        BlockLists.from_block_map(torch.zeros(1, 1, 2, 1, dtype=torch.bool), (16, 16), mask, lengths=(17, 16))


def test_what_is_remembered_under_inference_mode_serves_training() -> None:
    q, k, v = (torch.randn(1, 2, 32, 32, requires_grad=True) for _ in range(3))
    lists = BlockLists.from_block_map(torch.ones(1, 1, 2, 2, dtype=torch.bool), (16, 16))
    with torch.inference_mode():
        block_sparse_attention(q, k, v, lists)
    block_sparse_attention(q, k, v, lists).sum().backward()
    assert q.grad is not None
