from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from sparsebert.nn import attention_patterns as patterns
from sparsebert.ops import BlockLists

LENGTHS = st.sampled_from([0, 1, 16, 17, 40, 64, 97])
BLOCKS = st.tuples(*[st.sampled_from([16, 32, 64])] * 2)
few = settings(max_examples=30, deadline=None)


def mask_of(lists: BlockLists) -> Tensor:
    return lists.check().to_mask()


def block_map(lists: BlockLists) -> Tensor:
    """bool `[H, QB, KB]`: the blocks that are listed."""
    _, height, rows, _ = lists.columns.shape
    found = torch.zeros(height, rows, -(-lists.lengths[1] // lists.block[1]), dtype=torch.bool)
    for head in range(height):
        for row in range(rows):
            found[head, row, lists.columns[0, head, row, : lists.counts[0, head, row]].long()] = True
    return found


@few
@given(length=LENGTHS, keys=LENGTHS)
def test_dense_is_everything(length: int, keys: int) -> None:
    lists = patterns.dense(length, keys=keys)
    assert lists.lengths == (length, keys) and bool(mask_of(lists).all())
    assert patterns.dense(length).lengths == (length, length)


def test_dense_takes_small_blocks_for_short_sequences() -> None:
    assert [patterns.dense(length).block[0] for length in (5, 16, 17, 32, 33, 512)] == [16, 16, 32, 32, 64, 64]


@few
@given(length=LENGTHS, window=st.integers(1, 70), globally=st.integers(0, 3), block=BLOCKS)
def test_sliding_window_token_for_token(length: int, window: int, globally: int, block: tuple[int, int]) -> None:
    place = torch.arange(length)
    wanted = (place[:, None] - place).abs() <= window // 2
    wanted = wanted | (place < globally) | (place[:, None] < globally)
    assert torch.equal(mask_of(patterns.sliding_window(length, window, globally, block=block))[0, 0], wanted)
    whole = patterns.sliding_window(length, window, globally, exact=False, block=block)
    assert whole.partial_bits is None and torch.equal(mask_of(whole)[0, 0] & wanted, wanted)
    assert torch.equal(block_map(whole), block_map(patterns.sliding_window(length, window, globally, block=block)))


def test_global_tokens_by_place() -> None:
    mask = mask_of(patterns.sliding_window(50, 1, [0, 30], block=(16, 16)))[0, 0]
    assert bool(mask[30].all()) and bool(mask[:, 30].all()) and int(mask[7].sum()) == 3


def test_strided_takes_every_other_block_and_the_neighbours() -> None:
    found = block_map(patterns.strided(16 * 8, 3, local=1, block=(16, 16)))[0]
    apart = torch.arange(8)[:, None] - torch.arange(8)
    assert torch.equal(found, (apart % 3 == 0) | (apart.abs() <= 1))
    wide = block_map(patterns.strided(16 * 8, 2, local=0, block=(32, 16)))[0]
    assert wide.shape == (4, 8) and all(bool(wide[row, 2 * row + 1]) for row in range(4))


@few
@given(length=LENGTHS, density=st.floats(0.01, 1.0), heads=st.integers(1, 3), seed=st.integers(0, 99), block=BLOCKS)
def test_random_has_as_many_blocks_in_every_row(
    length: int, density: float, heads: int, seed: int, block: tuple[int, int]
) -> None:
    lists = patterns.random(length, density, seed, heads=heads, block=block).check()
    columns = -(-length // block[1])
    assert lists.columns.shape[1] == heads
    assert bool((lists.counts == (max(1, round(density * columns)) if length else 0)).all())
    again = patterns.random(length, density, seed, heads=heads, block=block)
    assert torch.equal(again.columns, lists.columns)


def test_random_has_its_own_block_and_draws_others() -> None:
    first, second = (block_map(patterns.random(16 * 20, 0.2, seed, heads=2, block=(16, 16))) for seed in (1, 2))
    assert bool(first.diagonal(dim1=1, dim2=2).all())
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def maps(heads: int = 2, length: int = 40, batch: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(4 * torch.randn(batch, heads, length, length, generator=generator), -1)


def sums(probs: Tensor, block: int = 16) -> Tensor:
    """`[H, QB, KB]` by hand."""
    mean = probs.mean(0)
    parts = [torch.stack([c.sum((1, 2)) for c in row.split(block, 2)], -1) for row in mean.split(block, 1)]
    return torch.stack(parts, 1)


def test_the_blocks_with_most_attention() -> None:
    probs = maps()
    found = block_map(patterns.from_attention_map(probs, 1, block=(16, 16)))
    assert torch.equal(found, torch.nn.functional.one_hot(sums(probs).argmax(-1), 3).bool())
    assert bool(block_map(patterns.from_attention_map(probs, 99, block=(16, 16))).all())


def test_a_share_of_the_blocks_leaves_no_row_without() -> None:
    probs = maps(length=160)
    probs[:, :, :16] *= 100
    found = block_map(patterns.from_attention_map(probs, 0.1, block=(16, 16)))
    expected = sums(probs).flatten(1)
    top = expected >= expected.sort(-1).values[:, -10:-9]
    assert torch.equal(found[:, 0], top.view(2, 10, 10)[:, 0]) and bool(found.any(-1).all())


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 1.0])
def test_the_fewest_blocks_that_hold_a_share(mass: float) -> None:
    probs = maps(length=160, seed=2)
    found, held = block_map(patterns.from_attention_map(probs, mass=mass, block=(16, 16))), sums(probs)
    assert bool((torch.where(found, held, 0).sum(-1) >= mass * held.sum(-1) * (1 - 1e-5)).all())
    least = torch.where(found, held, torch.inf).min(-1).values
    if mass < 1:
        assert bool(((torch.where(found, held, 0).sum(-1) - least) < mass * held.sum(-1)).all())


def test_maps_are_averaged_over_data() -> None:
    probs = maps(batch=4)
    whole = patterns.from_attention_map(probs, 1, block=(16, 16))
    for parts in (list(probs), iter(probs.split([1, 3]))):
        assert torch.equal(patterns.from_attention_map(parts, 1, block=(16, 16)).columns, whole.columns)


def test_pruned_heads_attend_to_nothing() -> None:
    mask = torch.tensor([True, False, True])
    assert torch.equal(mask_of(patterns.from_head_mask(mask, 40)).any((2, 3))[0], mask)
    window = patterns.sliding_window(40, 9, block=(16, 16))
    found = mask_of(patterns.from_head_mask(mask, blocks=window))
    assert torch.equal(found, mask_of(window) & mask[None, :, None, None])


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


@pytest.mark.parametrize("size", [(16, 32), 64])
@pytest.mark.parametrize("length", [96, 100])
def test_a_block_mask_of_flex_attention(length: int, size: Any) -> None:
    document = torch.arange(length) // 37
    shift = torch.tensor([0, 9, 40])

    def by_document(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (document[q] == document[k]) & (q + shift[h] >= k)

    for mod, heads in ((causal, 1), (by_document, 3)):
        made = create_block_mask(mod, 2, heads, length, length, device="cpu", BLOCK_SIZE=size)
        expected = create_mask(mod, 2, heads, length, length, device="cpu")
        assert torch.equal(mask_of(patterns.from_flex(made)), expected)


def test_a_block_mask_without_full_blocks_or_in_any_order() -> None:
    counts = torch.tensor([[[2, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    made = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(32, 32))
    wanted = torch.ones(32, 32, dtype=torch.bool).tril()
    wanted[16:, 16:] = False
    assert torch.equal(mask_of(patterns.from_flex(made))[0, 0], wanted)


def test_patterns_by_name() -> None:
    for name, settings_of in {"dense": {}, "random": {"density": 0.5}, "sliding_window": {"window": 8}}.items():
        assert patterns.PATTERNS[name](40, **settings_of).check().lengths == (40, 40)
    assert patterns.PATTERNS["strided"](40, 2).lengths == (40, 40)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patterns.dense(-1), "length: expected an int of at least 0, got -1"),
        (lambda: patterns.dense(8, block=(8, 8)), "block: expected"),
        (lambda: patterns.dense(8, block=(0, 16)), "block: expected"),
        (lambda: patterns.sliding_window(8, 0), "window: expected an int of at least 1, got 0"),
        (lambda: patterns.sliding_window(8, 2, -1), "global_tokens: expected an int of at least 0, got -1"),
        (lambda: patterns.sliding_window(8, 2, [8]), "global_tokens: expected places between 0 and 7"),
        (lambda: patterns.strided(8, 0), "stride: expected an int of at least 1"),
        (lambda: patterns.strided(8, 2, local=-1), "local: expected an int of at least 0"),
        (lambda: patterns.random(8, 0.0), "density: expected above 0 and at most 1, got 0.0"),
        (lambda: patterns.random(8, 0.5, heads=0), "heads: expected an int of at least 1"),
        (lambda: patterns.from_attention_map(maps()), "keep, mass: expected exactly one"),
        (lambda: patterns.from_attention_map(maps(), 1, mass=0.5), "keep, mass: expected exactly one"),
        (lambda: patterns.from_attention_map(maps(), 0), "keep: expected an int of at least 1"),
        (lambda: patterns.from_attention_map(maps(), 1.5), "keep: expected above 0 and at most 1"),
        (lambda: patterns.from_attention_map(maps(), mass=0.0), "mass: expected above 0 and at most 1"),
        (lambda: patterns.from_attention_map([], 1), "probs: expected at least one map"),
        (lambda: patterns.from_attention_map(maps()[..., :3], 1), "probs: expected float maps"),
        (lambda: patterns.from_attention_map([maps(), maps(3)], 1), "probs: expected maps of one size"),
        (lambda: patterns.from_head_mask(torch.ones(2), 8), r"head_mask: expected bool \[heads\]"),
        (lambda: patterns.from_head_mask(torch.ones(2).bool()), "length, blocks: expected exactly one"),
        (
            lambda: patterns.from_head_mask(torch.ones(2).bool(), blocks=patterns.random(40, 0.5, heads=3)),
            "blocks: expected lists for 1 or 2 heads, got 3",
        ),
        (lambda: patterns.from_flex("mask"), "block_mask: expected a BlockMask"),
    ],
)
def test_what_cannot_be_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
