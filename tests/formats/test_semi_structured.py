from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.formats import SemiStructured


def test_by_hand() -> None:
    stored = SemiStructured.from_dense(torch.tensor([[0.0, 2, 0, 3, 0, 0, 0, 4], [5, 6, 0, 0, 0, 0, 0, 0]]))
    # Groups with fewer than two are filled with zeros at the lowest positions left: 0 beside 3, and 0, 1.
    assert stored.values.tolist() == [[2, 3, 0, 4], [5, 6, 0, 0]]
    assert stored.positions.tolist() == [[0b11_00_11_01], [0b01_00_01_00]]
    assert stored.spelling == "semi_structured:2:4" and stored.sparsity == 0.5 and not stored.exact
    assert SemiStructured.from_dense(torch.tensor([[1.0, 2, 0, 0]])).exact


@given(
    m=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 256]),
    share=st.floats(0, 1),
    rows=st.integers(0, 5),
    groups=st.integers(0, 5),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_pattern(m: int, share: float, rows: int, groups: int, density: float, seed: int) -> None:
    n, generator = max(1, round(share * m)), torch.Generator().manual_seed(seed)
    rank = torch.rand(rows, groups, m, generator=generator).argsort(-1).argsort(-1)
    mask = (rank < n).view(rows, groups * m) & (torch.rand(rows, groups * m, generator=generator) < density)
    weight = torch.randn(rows, groups * m, generator=generator)
    stored = SemiStructured.from_dense(weight, mask, pattern=(n, m))
    stored.check()
    assert stored.values.shape == (rows, groups * n)
    bits = 2 if m <= 4 else 4 if m <= 16 else 8
    assert stored.positions.shape == (rows, -(-groups * n * bits // 8))
    assert torch.equal(stored.to_dense(), torch.where(mask, weight, 0.0))
    assert (stored.stored().view(rows, groups, m).sum(2) == n).all()


def test_a_group_with_too_many_is_named() -> None:
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[1, 4:7] = True
    with pytest.raises(ValueError, match=r"mask: 2:4 keeps at most 2 of 4, but row 1, columns 4 to 7 keep 3"):
        SemiStructured.from_dense(torch.ones(3, 8), mask)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ((2, 3), "pattern: 2:3 does not divide the weight's 8 columns"),
        ((0, 4), r"pattern: expected \(n, m\) with 1 <= n <= m <= 256, got \(0, 4\)"),
        ((5, 4), r"pattern: expected \(n, m\)"),
        ((1, 257), r"pattern: expected \(n, m\)"),
        ((4,), r"pattern: expected \(n, m\)"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(pattern: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemiStructured.from_dense(torch.zeros(3, 8), pattern=pattern)
    with pytest.raises(ValueError, match=message):
        SemiStructured.from_dense(torch.zeros(3, 8)).replaced(pattern=pattern).check()


def test_wrong_positions_are_named() -> None:
    for pattern, byte, message in (
        ((2, 4), 0b01_01_01_00, "positions: expected ascending within a group, got 1 at 1"),
        ((1, 3), 0b00_00_00_11, "positions: expected 0 to 2, got 3 at 0"),
        ((1, 3), 0b11_00_00_00, "positions: expected zero bits after the last position, got 192 at 0"),
    ):
        stored = SemiStructured.from_dense(torch.zeros(1, 8 if pattern[1] == 4 else 3), pattern=pattern)
        with pytest.raises(ValueError, match=message):
            stored.replaced(positions=torch.tensor([[byte]], dtype=torch.uint8)).check()
