"""Connection recovery: which of the kept units some earlier mask had pruned."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.models.prunable import prunable_matrices
from sparsebert.nn import Masks
from sparsebert.patterns import parse_pattern


def masks_of(pattern: str = "unstructured", seed: int = 0) -> Masks:
    base = tiny.base(seed=seed)
    return Masks(base, prunable_matrices(base), parse_pattern(pattern), torch.float32)


def scores_of(masks: Masks, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(group.shape, generator=generator) for group in masks.groups]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "neurons", "heads"])
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=4))
def test_it_counts_the_kept_units_that_any_mask_before_had_pruned(
    pattern: str, history: list[tuple[int, bool]]
) -> None:
    masks = masks_of(pattern)
    ever = [torch.zeros(group.shape, dtype=torch.bool) for group in masks.groups]
    for seed, by_threshold in history:
        scores = scores_of(masks, seed)
        if by_threshold:
            masks.above(scores, 0.2)
        else:
            masks.select(scores, masks.pattern.default_sparsity, "global")
        ever = [before | ~kept for before, kept in zip(ever, masks.units(), strict=True)]
    found = masks.recovery()
    counts = [int((before & kept).sum()) for before, kept in zip(ever, masks.units(), strict=True)]
    kept = [int(unit.sum()) for unit in masks.units()]
    assert (found["recovered"], found["kept"]) == (sum(counts), sum(kept))
    assert found["share"] == sum(counts) / max(1, sum(kept))
    names = [group.name for group in masks.groups]
    assert found["by_group"] == {
        name: part / max(1, whole) for name, part, whole in zip(names, counts, kept, strict=True)
    }


def test_nothing_is_recovered_where_pruning_only_goes_on() -> None:
    masks = masks_of()
    for sparsity in (0.2, 0.5, 0.9):
        masks.select(masks.magnitude(), sparsity, "global")
        masks.refresh()
    assert masks.recovery()["recovered"] == 0
    assert masks.recovery()["kept"] == masks.counts()[1] - masks.counts()[0]


def test_a_saved_state_remembers() -> None:
    masks, other = masks_of(), masks_of(seed=3)
    for seed in (1, 2):
        masks.select(scores_of(masks, seed), 0.5, "global")
    other.select(scores_of(other, 7), 0.9, "global")
    other.load_state_dict(masks.state_dict())
    other.refresh()
    assert other.recovery() == masks.recovery() and masks.recovery()["recovered"] > 0
