from __future__ import annotations

import pytest
import torch
from formats.stored import mask_for, numbered

from sparsebert.formats import Blocks


def test_by_hand() -> None:
    weight = torch.tensor([[0.0, 0, 1, 2], [0, 0, 3, 0], [5, 6, 0, 0], [7, 8, 0, 0]])
    stored = Blocks.from_dense(weight, block=(2, 2))
    assert stored.values.tolist() == [[[1, 2], [3, 0]], [[5, 6], [7, 8]]]
    assert stored.columns.tolist() == [1, 0] and stored.row_starts.tolist() == [0, 1, 2]
    assert stored.columns.dtype == stored.row_starts.dtype == torch.int32
    # One pruned weight is stored as a zero.
    assert not stored.exact and stored.sparsity == 0.5 and stored.spelling == "blocks:2x2"
    assert Blocks.from_dense(weight, weight.bool() | (weight.t() == 100), block=(1, 1)).exact
    assert stored.nbytes == 8 * 4 + 2 * 4 + 3 * 4


@pytest.mark.parametrize("block", [(1, 1), (4, 2), (2, 4), (12, 8), (12, 1), (1, 8), (3, 2)])
def test_the_transposed_structure_is_that_of_the_transposed_weight(block: tuple[int, int]) -> None:
    weight, mask = numbered((12, 8)), mask_for("blocks", (12, 8), 0.2, 1)
    stored = Blocks.from_dense(weight, mask, block=block)
    turned = Blocks.from_dense(weight.t(), mask.t(), block=block[::-1])
    permutation, columns, row_starts = stored.transposed()
    assert permutation.dtype == torch.int64
    assert torch.equal(stored.values[permutation].transpose(1, 2), turned.values)
    for made, expected in ((columns, turned.columns), (row_starts, turned.row_starts)):
        assert made.dtype == torch.int32 and torch.equal(made, expected)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ((5, 2), r"block: 5x2 does not divide the weight \[12, 8\]"),
        ((4, 3), r"block: 4x3 does not divide"),
        ((0, 2), r"block: expected \(R, C\) with both at least 1, got \(0, 2\)"),
        ((4,), r"block: expected \(R, C\)"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(block: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blocks.from_dense(torch.zeros(12, 8), block=block)
    with pytest.raises(ValueError, match=message):
        Blocks.from_dense(torch.zeros(12, 8), block=(4, 2)).replaced(block=block).check()


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("columns", 0, -1, "columns: expected 0 to 3, got -1 at 0"),
        ("columns", 5, 4, "columns: expected 0 to 3, got 4 at 5"),
        ("columns", 1, 0, "columns: expected ascending numbers within a block row, got 0 at 0"),
        ("row_starts", 0, 1, "row_starts: expected to begin with 0 and end with 12, got 1 and 12"),
        ("row_starts", 3, 11, "row_starts: expected to begin with 0 and end with 12, got 0 and 11"),
        ("row_starts", 1, 13, "row_starts: expected numbers that never fall, got 8 at 1"),
        ("row_starts", 1, -4, "row_starts: expected numbers that never fall, got -4 at 0"),
    ],
)
def test_a_wrong_index_is_named(name: str, place: int, value: int, message: str) -> None:
    stored = Blocks.from_dense(torch.ones(12, 8), block=(4, 2))
    changed = getattr(stored, name).clone()
    changed[place] = value
    with pytest.raises(ValueError, match=message):
        stored.replaced(**{name: changed}).check()
