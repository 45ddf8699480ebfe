"""Gradual magnitude pruning: the cubic schedule, and nothing that comes back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.methods import Method, Phase
from sparsebert.methods.gmp import cubic_sparsity
from sparsebert.patterns import units_to_prune

SHARES = st.floats(0, 1)


@given(SHARES, SHARES)
def test_the_cubic_schedule_goes_from_the_first_sparsity_to_the_last(first: float, last: float) -> None:
    assert cubic_sparsity(0.0, last, first) == pytest.approx(first)
    assert cubic_sparsity(1.0, last, first) == last
    assert cubic_sparsity(0.5, last, first) == pytest.approx(last + (first - last) / 8)


@given(st.lists(SHARES, min_size=2), SHARES)
def test_the_cubic_schedule_never_falls(progress: list[float], final: float) -> None:
    levels = [cubic_sparsity(share, final) for share in sorted(progress)]
    assert levels == sorted(levels)


def test_beyond_its_ends_the_schedule_stays() -> None:
    assert cubic_sparsity(-1.0, 0.8, 0.1) == pytest.approx(0.1)
    assert cubic_sparsity(2.0, 0.8, 0.1) == 0.8


def history(method: Method, steps: int) -> tuple[list[float], list[list[torch.Tensor]]]:
    """Sparsity and masks after each step of the pruning phase, the start included."""
    levels: list[float] = []
    masks: list[list[torch.Tensor]] = []

    def watch(phase: Phase, step: int) -> None:
        if phase.name == "prune":
            levels.append(phase.logs()["sparsity"])
            masks.append(method.masks.units())

    tiny.by_hand(method, steps, watch)
    return levels, masks


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "neurons", "2:4"])
@pytest.mark.parametrize(
    "settings", [{}, {"prune_from": 0.2, "prune_until": 1.0, "initial_sparsity": 0.1}, {"prunings": 3}]
)
def test_sparsity_follows_the_schedule_and_no_unit_comes_back(pattern: str, settings: dict[str, Any]) -> None:
    method, steps = tiny.build("gmp", pattern, **settings), 20
    levels, masks = history(method, steps)
    total = method.masks.counts()[1]
    # A large learning rate moves pruned weights off zero between the steps, if anything lets it.
    for before, after in pairwise(masks):
        assert not any(bool((new & ~old).any()) for old, new in zip(before, after, strict=True))
    first = max(1, int(settings.get("prune_from", 0.0) * steps))
    last = int(settings.get("prune_until", 0.7) * steps)
    initial = settings.get("initial_sparsity", 0.0)
    expected = {
        step: units_to_prune(cubic_sparsity((step - first) / (last - first), method.context.sparsity, initial), total)
        for step in range(first, last + 1)
    }
    counts = [round(level * total) for level in levels]
    assert counts == sorted(counts)
    assert counts[0] == 0 and counts[first - 1] == 0
    assert counts[last] == counts[-1] == units_to_prune(method.context.sparsity, total)
    changes = [step for step in range(1, steps + 1) if counts[step] != counts[step - 1]]
    for step in changes:
        assert counts[step] == expected[step]
    assert len(changes) <= settings.get("prunings", 100) + 1
    if "prunings" not in settings:
        assert [counts[step] for step in range(first, last + 1)] == list(expected.values())


@pytest.mark.parametrize(("prunings", "steps"), [(1, 50), (3, 50), (7, 50), (30, 50), (100, 50), (100, 7)])
def test_the_mask_is_chosen_as_often_as_asked_or_once_a_step(prunings: int, steps: int) -> None:
    method = tiny.build("gmp", sparsity=0.9, prunings=prunings, prune_until=1.0)
    chosen: list[float] = []
    select = method.masks.select
    method.masks.select = lambda scores, s, how: (chosen.append(s), select(scores, s, how))  # type: ignore[assignment]
    tiny.by_hand(method, steps)
    on_the_way = chosen[1:-1]  # without the first, at the initial sparsity, and the last, at the end of the phase
    assert len(on_the_way) == min(prunings, steps - 1)
    assert on_the_way[-1] == 0.9


def test_weights_that_are_zero_by_chance_bring_nothing_back() -> None:
    method = tiny.build("gmp", sparsity=0.5, masked=("encoder", "word_embeddings"))
    with torch.no_grad():
        method.context.model.base.get_input_embeddings().weight[:12] = 0.0
    _, masks = history(method, 10)
    for before, after in pairwise(masks):
        assert not any(bool((new & ~old).any()) for old, new in zip(before, after, strict=True))
    assert method.masks.sparsity() == 0.5


def test_the_smallest_weights_go() -> None:
    method = tiny.build("gmp", sparsity=0.5, prune_until=1.0)
    seen: list[tuple[float, float]] = []
    select = method.masks.select

    def watch_select(scores: list[torch.Tensor], sparsity: float, how: Any) -> None:
        alive = [unit.clone() for unit in method.masks.units()]
        select(scores, sparsity, how)
        weights = list(method.masks.weights().values())
        units = zip(weights, alive, method.masks.units(), strict=True)
        gone, stay = [], []
        for weight, old, new in units:
            gone.append(weight.detach().abs()[old & ~new])
            stay.append(weight.detach().abs()[new])
        if torch.cat(gone).numel():
            seen.append((float(torch.cat(gone).max()), float(torch.cat(stay).min())))

    method.masks.select = watch_select  # type: ignore[method-assign,assignment]
    tiny.by_hand(method, 6)
    assert len(seen) >= 4
    assert all(largest_gone <= smallest_kept for largest_gone, smallest_kept in seen)
