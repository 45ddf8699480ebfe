"""Iterative magnitude pruning: rounds, rewinding, nested masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.methods import Phase
from sparsebert.methods.imp import rounds_to
from sparsebert.patterns import units_to_prune


def test_each_round_takes_a_fifth_of_what_is_left_and_the_last_ends_at_the_target() -> None:
    assert rounds_to(0.7, 0.2) == pytest.approx([0.2, 0.36, 0.488, 0.5904, 0.67232, 0.7])


@given(st.floats(0.001, 0.9999), st.floats(0.05, 0.95))
def test_rounds_follow_1_minus_the_kept_share_to_the_power_of_the_round(sparsity: float, rate: float) -> None:
    levels = rounds_to(sparsity, rate)
    assert levels[-1] == sparsity
    assert levels == sorted(levels)
    for number, level in enumerate(levels[:-1], 1):
        assert level == pytest.approx(1 - (1 - rate) ** number)
    # No round is left out, and none is made of rounding errors alone.
    assert 1 - (1 - rate) ** len(levels) > sparsity - 1e-8
    assert len(levels) == 1 or sparsity - levels[-2] > 1e-10


@pytest.mark.parametrize(
    ("sparsity", "rate", "rounds"), [(0.2, 0.2, 1), (0.36, 0.2, 2), (0.488, 0.2, 3), (0.75, 0.5, 2)]
)
def test_a_target_that_a_round_meets_needs_no_further_round(sparsity: float, rate: float, rounds: int) -> None:
    assert len(rounds_to(sparsity, rate)) == rounds
    assert rounds_to(sparsity, rate)[-1] == sparsity


def test_a_target_of_zero_needs_no_rounds() -> None:
    assert rounds_to(0.0, 0.2) == []


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "neurons"])
@pytest.mark.parametrize("weights", ["trained", "pretrained"])
def test_rounds_rewind_weights_and_nest_masks(pattern: str, weights: str) -> None:
    method = tiny.build("imp", pattern, weights=weights)
    first = {name: tensor.detach().clone() for name, tensor in method.context.model.base.named_parameters()}
    head = {name: tensor.clone() for name, tensor in method.context.model.head.state_dict().items()}
    begins: dict[str, dict[str, Tensor]] = {}
    levels: list[int] = []
    masks: list[list[Tensor]] = []

    def watch(phase: Phase, step: int) -> None:
        if step == 0:
            begins[phase.name] = {n: t.detach().clone() for n, t in method.context.model.base.named_parameters()}
            masks.append(method.masks.units())
            levels.append(method.masks.counts()[0])
            dense = method.masks.dense()
            for name, weight in begins[phase.name].items():
                kept = dense.get(name.removesuffix(".weight"), torch.ones_like(weight, dtype=torch.bool))
                rewound = torch.where(kept, first[name].view(torch.int32), 0)
                assert torch.equal(weight.view(torch.int32), rewound), f"{phase.name}: {name}"
            assert all(torch.equal(t, head[n]) for n, t in method.context.model.head.state_dict().items())

    tiny.by_hand(method, 3, watch)
    rounds = rounds_to(method.context.sparsity, 0.2)
    last = "finetune" if weights == "trained" else "head"
    assert list(begins) == [*(f"round{number}" for number in range(1, len(rounds) + 1)), last]
    total = method.masks.counts()[1]
    assert levels == [0, *(units_to_prune(level, total) for level in rounds)]
    for before, after in pairwise(masks):
        assert not any(bool((new & ~old).any()) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(masks[-1], method.masks.units(), strict=True))


def test_a_round_prunes_by_the_trained_weights_not_the_rewound_ones() -> None:
    method = tiny.build("imp", sparsity=0.2)
    phase = method.phases()[0]
    phase.start()
    phase.loaded()
    name, weight = next(iter(method.masks.weights().items()))
    with torch.no_grad():
        weight.fill_(9.0)  # training made all of this matrix important
    phase.finish()
    assert bool(method.masks.dense()[name].all())
    assert method.masks.sparsity() == pytest.approx(0.2, abs=1e-3)
