"""The order of examples: a permutation that seed and epoch alone decide, in batches of like length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from sparsebert.data import Encoded
from sparsebert.training.batches import LengthGrouped


@dataclass
class Lengths:
    """As much of `Encoded` as an order needs."""

    lengths: list[int]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index}


def grouped(lengths: list[int], batch: int, seed: int) -> LengthGrouped:
    return LengthGrouped(cast(Encoded, Lengths(lengths)), batch, seed)


@given(st.lists(st.integers(1, 40), max_size=120), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_example_once_whatever_came_before(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    data, again = grouped(lengths, batch, seed), grouped(lengths, batch, seed)
    for earlier in range(epoch):
        data.set_epoch(earlier)
    data.set_epoch(epoch)
    again.set_epoch(epoch)
    assert data.order == again.order
    assert sorted(data.order) == list(range(len(lengths)))
    assert len(data) == len(lengths)
    if lengths:
        assert data[0] == {"index": data.order[0]}


def test_batches_hold_like_lengths_and_epochs_differ() -> None:
    lengths = [number % 50 + 1 for number in range(1600)]
    data = grouped(lengths, 32, 0)
    first = list(data.order)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
              for batch in (first[start : start + 32] for start in range(0, 1600, 32))]  # fmt: skip
    assert max(spread) <= 2
    data.set_epoch(1)
    assert data.order != first
    assert grouped(lengths, 32, 1).order != first
    means = [sum(lengths[i] for i in first[start : start + 32]) for start in range(0, 1600, 32)]
    assert means != sorted(means) and means != sorted(means, reverse=True)
