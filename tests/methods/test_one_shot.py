"""Magnitude and random masks: chosen at once."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from sparsebert.methods import Method


def masks_of(method: Method) -> list[Tensor]:
    tiny.by_hand(method, 2)
    return method.masks.units()


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "neurons", "heads"])
def test_random_masks_are_those_of_the_seed(pattern: str) -> None:
    first, again, other = (masks_of(tiny.build("random", pattern, seed=seed)) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)


def test_random_masks_do_not_depend_on_what_was_drawn_before() -> None:
    first = masks_of(tiny.build("random", seed=3))
    torch.rand(100)
    assert same(first, masks_of(tiny.build("random", seed=3, untouched=True)))


def test_random_masks_look_at_no_weight() -> None:
    first = masks_of(tiny.build("random", seed=3))
    method = tiny.build("random", seed=3)
    with torch.no_grad():
        for weight in method.masks.weights().values():
            weight.mul_(torch.linspace(0, 5, weight.shape[1]))
    assert same(first, masks_of(method))


@pytest.mark.parametrize("weights", ["trained", "pretrained"])
def test_magnitude_prunes_the_smallest_pretrained_weights(weights: str) -> None:
    method = tiny.build("magnitude", sparsity=0.3, weights=weights)
    before = {name: weight.detach().abs().clone() for name, weight in method.masks.weights().items()}
    tiny.by_hand(method, 3)
    dense = method.masks.dense()
    kept = torch.cat([before[name][mask] for name, mask in dense.items()])
    pruned = torch.cat([before[name][~mask] for name, mask in dense.items()])
    assert float(pruned.max()) <= float(kept.min())


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_the_mask_stays_while_the_weights_train(name: str) -> None:
    method = tiny.build(name)
    seen: list[list[Tensor]] = []
    tiny.by_hand(method, 4, lambda phase, step: seen.append(method.masks.units()))
    assert all(same(seen[0], units) for units in seen)
    assert method.masks.sparsity() == 0.5
