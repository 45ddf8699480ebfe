from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.formats import TwoFour


@given(
    shape=st.sampled_from([(1, 4), (9, 16), (33, 132), (0, 8), (3, 0)]),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_no_more_is_left_over_than_must_be_and_the_smallest(
    shape: tuple[int, int], density: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < density
    stored = TwoFour.from_dense(weight, mask)
    counts = mask.view(shape[0], shape[1] // 4, 4).sum(2)
    assert len(stored.places) == int((counts - 2).clamp(min=0).sum())
    left = torch.zeros(mask.numel(), dtype=torch.bool)
    left[stored.places] = True
    left = left.view(shape)
    assert not (left & ~mask).any()
    # What is left over is no larger than what stayed in its four.
    groups = weight.abs().view(shape[0], shape[1] // 4, 4)
    if counts.numel():
        least = torch.where((mask & ~left).view_as(groups), groups, torch.inf).amin(2, keepdim=True)
        assert ((groups <= least) | ~left.view_as(groups)).all()


def test_of_a_random_weight_little_is_left_over() -> None:
    generator = torch.Generator().manual_seed(0)
    for density in (0.1, 0.05, 0.5):
        mask = torch.rand(768, 768, generator=generator) < density
        stored = TwoFour.from_dense(torch.randn(768, 768, generator=generator), mask)
        # 3 of 4 kept leave one over, 4 of 4 two.
        share = (4 * density**3 * (1 - density) + 2 * density**4) / 4
        assert abs(len(stored.places) / mask.numel() - share) < 0.1 * share + 1e-4


def test_a_nan_stays_and_odd_columns_are_refused() -> None:
    stored = TwoFour.from_dense(torch.tensor([[1.0, float("nan"), 3.0, torch.inf]]))
    assert stored.places.tolist() == [0, 2] and stored.values[2:].tolist() == [1, 3]
    assert stored.values[0].isnan() and stored.values[1] == torch.inf and stored.exact
    with pytest.raises(ValueError, match=r"weight: expected a multiple of 4 columns, got \[2, 6\]"):
        TwoFour.from_dense(torch.ones(2, 6))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([2, 2], "places: expected ascending ones, got 2 at 0"),
        ([3, 2], "places: expected ascending ones, got 2 at 0"),
        ([2, 8], "places: expected 0 to 7, got 8 at 1"),
        ([-1, 2], "places: expected 0 to 7, got -1 at 0"),
        ([1, 3], "places: expected none that is a position of 2:4, got 1 at 0"),
    ],
)
def test_places_that_cannot_be_are_named(places: list[int], message: str) -> None:
    stored = TwoFour.from_dense(torch.tensor([[3.0, 4, 1, 2, 5, 6, 0, 0]]))
    assert stored.places.tolist() == [2, 3]
    stored.check()
    with pytest.raises(ValueError, match=message):
        stored.replaced(places=torch.tensor(places)).check()
