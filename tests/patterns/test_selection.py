"""Scores to masks: the target met to the last unit, ties and order, n:m on the way and at its end."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.ops import unpack_bits
from sparsebert.patterns import Matrix, Pattern, ScoreGroup, parse_pattern, units_to_prune

Allocation = Literal["global", "matrix"]
ALLOCATIONS = st.sampled_from(["global", "matrix"])
SPARSITIES = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.99, 0.9999]))
FREE = st.sampled_from(["unstructured", "block:2x4", "neurons", "heads"])


def encoder(layers: int, width: int, neurons: int, heads: int) -> list[Matrix]:
    matrices = []
    for index in range(layers):
        for name in ("query", "key", "value", "attention_output"):
            matrices.append(Matrix(f"{index}.{name}", (width, width), name, index, heads))
        matrices.append(Matrix(f"{index}.ffn_in", (neurons, width), "ffn_in", index))
        matrices.append(Matrix(f"{index}.ffn_out", (width, neurons), "ffn_out", index))
    return matrices


@st.composite
def encoders(draw: st.DrawFn) -> list[Matrix]:
    heads = draw(st.sampled_from([1, 2, 4]))
    return encoder(draw(st.integers(1, 3)), 4 * heads, draw(st.sampled_from([4, 12, 20])), heads)


@st.composite
def scores_for(draw: st.DrawFn, groups: list[ScoreGroup]) -> list[Tensor]:
    """Scores without ties, with many, or all the same."""
    levels = draw(st.sampled_from([1, 2, 5, 10_000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [torch.from_numpy(random.integers(-levels, levels, group.shape) / 8).float() for group in groups]


def kept(pattern: Pattern, groups: list[ScoreGroup], bits: list[Tensor]) -> list[Tensor]:
    return [unpack_bits(packed, group.shape) for packed, group in zip(bits, groups, strict=True)]


def select(pattern: Pattern, groups: list[ScoreGroup], scores: list[Tensor], s: float, how: Allocation) -> list[Tensor]:
    return kept(pattern, groups, pattern.select(groups, scores, s, how))


def check_exact(masks: list[Tensor], scores: list[Tensor], sparsity: float) -> None:
    """The nearest number of units is pruned, none larger than a kept one, of equals the earliest."""
    mask, score = torch.cat([m.flatten() for m in masks]), torch.cat([s.flatten() for s in scores])
    pruned = int((~mask).sum())
    assert abs(pruned - sparsity * mask.numel()) <= 0.5 + 1e-9
    order = np.argsort(score.numpy(), kind="stable")
    assert sorted(order[:pruned]) == torch.nonzero(~mask).flatten().tolist()


@given(st.data(), encoders(), FREE, SPARSITIES, ALLOCATIONS)
@settings(deadline=None, max_examples=150)
def test_the_smallest_units_go_and_exactly_as_many_as_asked(
    data: st.DataObject, matrices: list[Matrix], spec: str, sparsity: float, allocation: Allocation
) -> None:
    pattern = parse_pattern(spec)
    groups = pattern.groups(matrices)
    scores = data.draw(scores_for(groups))
    masks = select(pattern, groups, scores, sparsity, allocation)
    if allocation == "global":
        check_exact(masks, scores, sparsity)
    else:
        for mask, score in zip(masks, scores, strict=True):
            check_exact([mask], [score], sparsity)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 10**8))
def test_the_number_of_units_is_the_nearest(sparsity: float, total: int) -> None:
    count = units_to_prune(sparsity, total)
    assert 0 <= count <= total
    assert abs(count - sparsity * total) <= 0.5 + 1e-7


@given(st.integers(1, 10**6), st.data())
def test_a_number_of_units_written_as_a_share_comes_back(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total - 1))
    assert units_to_prune(count / total, total) == count


@pytest.mark.parametrize("allocation", ["global", "matrix"])
def test_equal_scores_are_pruned_from_the_first_on(allocation: Allocation) -> None:
    pattern = parse_pattern("unstructured")
    groups = pattern.groups([Matrix("a", (2, 4), "pooler"), Matrix("b", (3, 4), "pooler")])
    first, second = select(pattern, groups, [torch.ones(2, 4), torch.ones(3, 4)], 0.5, allocation)
    expected = {"global": (8, 2), "matrix": (4, 6)}[allocation]
    assert first.flatten().tolist() == [False] * expected[0] + [True] * (8 - expected[0])
    assert second.flatten().tolist() == [False] * expected[1] + [True] * (12 - expected[1])


def test_global_ranks_matrices_together_and_matrix_does_not() -> None:
    pattern = parse_pattern("unstructured")
    groups = pattern.groups([Matrix("low", (4, 4), "pooler"), Matrix("high", (4, 4), "pooler")])
    scores = [torch.rand(4, 4), torch.rand(4, 4) + 2]
    low, high = select(pattern, groups, scores, 0.5, "global")
    assert not low.any() and high.all()
    low, high = select(pattern, groups, scores, 0.5, "matrix")
    assert int(low.sum()) == int(high.sum()) == 8


@pytest.mark.parametrize("spec", ["unstructured", "block:2x2", "neurons", "heads", "2:4"])
@pytest.mark.parametrize("sparsity", [-0.25, 1.0, 2.0, math.nan])
def test_select_refuses_a_sparsity_out_of_range(spec: str, sparsity: float) -> None:
    pattern = parse_pattern(spec)
    groups = pattern.groups(encoder(1, 8, 12, 2))
    with pytest.raises(UserError, match="sparsity"):
        pattern.select(groups, [torch.rand(group.shape) for group in groups], sparsity, "global")


@pytest.mark.parametrize(("spec", "sparsity"), [("unstructured", 0.5), ("neurons", 0.5), ("2:4", 0.3)])
def test_select_refuses_an_unknown_allocation(spec: str, sparsity: float) -> None:
    pattern = parse_pattern(spec)
    groups = pattern.groups(encoder(1, 8, 12, 2))
    with pytest.raises(UserError, match=r"'layer'.*global, matrix"):
        pattern.select(groups, [torch.rand(group.shape) for group in groups], sparsity, "layer")  # type: ignore[arg-type]


def test_n_of_m_refuses_more_than_its_own_sparsity() -> None:
    pattern = parse_pattern("2:4")
    groups = pattern.groups(encoder(1, 8, 12, 2))
    with pytest.raises(UserError, match=r"0\.6.*2:4"):
        pattern.select(groups, [torch.rand(group.shape) for group in groups], 0.6, "global")


N_OF_M = st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (1, 3), (5, 16), (31, 32)])


def groups_of(masks: list[Tensor], m: int) -> Tensor:
    """`[groups, m]`: every run of m entries along the inputs."""
    return torch.cat([mask.reshape(-1, m) for mask in masks])


@st.composite
def n_of_m(draw: st.DrawFn) -> tuple[int, int, Pattern, list[ScoreGroup], list[Tensor]]:
    n, m = draw(N_OF_M)
    pattern = parse_pattern(f"{n}:{m}")
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3))
    groups = pattern.groups([Matrix(f"m{i}", (rows, m * runs), "pooler") for i, (rows, runs) in enumerate(shapes)])
    return n, m, pattern, groups, draw(scores_for(groups))


@given(n_of_m(), ALLOCATIONS)
@settings(deadline=None)
def test_n_of_m_keeps_the_n_best_of_every_m(
    case: tuple[int, int, Pattern, list[ScoreGroup], list[Tensor]], allocation: Allocation
) -> None:
    n, m, pattern, groups, scores = case
    masks = groups_of(select(pattern, groups, scores, pattern.default_sparsity, allocation), m)
    assert masks.sum(1).tolist() == [n] * len(masks)
    for mask, score in zip(masks, groups_of(scores, m), strict=True):
        check_exact([mask], [score], 1 - n / m)


@given(n_of_m(), ALLOCATIONS, st.lists(st.floats(0, 1), min_size=1, max_size=5))
@settings(deadline=None)
def test_the_way_to_n_of_m_is_nested_and_exact(
    case: tuple[int, int, Pattern, list[ScoreGroup], list[Tensor]], allocation: Allocation, shares: list[float]
) -> None:
    n, m, pattern, groups, scores = case
    before = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    for sparsity in [*(share * pattern.default_sparsity for share in sorted(shares)), pattern.default_sparsity]:
        masks = select(pattern, groups, scores, sparsity, allocation)
        assert not any(bool((mask & ~old).any()) for mask, old in zip(masks, before, strict=True)), "a unit came back"
        counted = [masks] if allocation == "global" else [[mask] for mask in masks]
        for part in counted:
            total = sum(mask.numel() for mask in part)
            assert abs(sum(int((~mask).sum()) for mask in part) - sparsity * total) <= 0.5 + 1e-6
        assert int(groups_of(masks, m).sum(1).min()) >= n
        before = masks
    assert groups_of(before, m).sum(1).unique().tolist() == [n]


@given(n_of_m(), st.one_of(st.floats(-2, 2), st.sampled_from([-math.inf, math.inf])))
@settings(deadline=None)
def test_above_a_threshold_n_of_m_still_keeps_n(
    case: tuple[int, int, Pattern, list[ScoreGroup], list[Tensor]], threshold: float
) -> None:
    n, m, pattern, groups, scores = case
    masks = kept(pattern, groups, pattern.above(groups, scores, threshold))
    best = select(pattern, groups, scores, pattern.default_sparsity, "global")
    for mask, score, chosen in zip(masks, scores, best, strict=True):
        assert torch.equal(mask, chosen | (score.double() > threshold))
    assert int(groups_of(masks, m).sum(1).min()) >= n


@given(st.data(), encoders(), FREE, st.floats(-2, 2))
@settings(deadline=None)
def test_above_a_threshold_every_larger_score_is_kept(
    data: st.DataObject, matrices: list[Matrix], spec: str, threshold: float
) -> None:
    pattern = parse_pattern(spec)
    groups = pattern.groups(matrices)
    scores = data.draw(scores_for(groups))
    for mask, score in zip(kept(pattern, groups, pattern.above(groups, scores, threshold)), scores, strict=True):
        assert torch.equal(mask, score.double() > threshold)


@pytest.mark.parametrize("spec", ["unstructured", "2:4", "neurons"])
def test_a_score_that_is_no_number_is_refused(spec: str) -> None:
    pattern = parse_pattern(spec)
    groups = pattern.groups(encoder(1, 8, 12, 2))
    scores = [torch.rand(group.shape) for group in groups]
    scores[-1].flatten()[1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        pattern.select(groups, scores, pattern.default_sparsity, "global")


def weights_of(matrices: list[Matrix], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {matrix.name: torch.randn(matrix.shape, generator=generator).to(dtype) for matrix in matrices}


def test_magnitude_of_a_weight_is_its_absolute_value() -> None:
    matrices = encoder(1, 8, 12, 2)
    weights = weights_of(matrices)
    pattern = parse_pattern("unstructured")
    for score, matrix in zip(pattern.magnitude(pattern.groups(matrices), weights), matrices, strict=True):
        assert torch.equal(score, weights[matrix.name].abs())


def test_magnitude_of_a_block_is_the_mean_over_it() -> None:
    matrices = [Matrix("a", (4, 6), "pooler")]
    weights = weights_of(matrices)
    pattern = parse_pattern("block:2x3")
    (score,) = pattern.magnitude(pattern.groups(matrices), weights)
    expected = [[float(weights["a"][r : r + 2, c : c + 3].abs().mean()) for c in (0, 3)] for r in (0, 2)]
    torch.testing.assert_close(score, torch.tensor(expected))


def test_magnitude_of_a_neuron_is_the_mean_over_its_row_and_its_column() -> None:
    matrices = encoder(2, 8, 12, 2)
    weights = weights_of(matrices)
    pattern = parse_pattern("neurons")
    for index, score in enumerate(pattern.magnitude(pattern.groups(matrices), weights)):
        row, column = weights[f"{index}.ffn_in"].abs(), weights[f"{index}.ffn_out"].abs()
        expected = [float(torch.cat([row[j], column[:, j]]).mean()) for j in range(12)]
        torch.testing.assert_close(score, torch.tensor(expected))


def test_magnitude_of_a_head_is_the_mean_over_its_four_parts() -> None:
    matrices = encoder(1, 8, 12, 2)
    weights = weights_of(matrices)
    pattern = parse_pattern("heads")
    (score,) = pattern.magnitude(pattern.groups(matrices), weights)
    expected = []
    for rows in (slice(0, 4), slice(4, 8)):
        parts = [weights[f"0.{name}"][rows].flatten() for name in ("query", "key", "value")]
        expected.append(float(torch.cat([*parts, weights["0.attention_output"][:, rows].flatten()]).abs().mean()))
    torch.testing.assert_close(score, torch.tensor(expected))


@pytest.mark.parametrize("spec", ["unstructured", "block:2x2", "neurons", "heads"])
def test_magnitude_is_fp32_and_takes_no_gradient(spec: str) -> None:
    matrices = encoder(1, 8, 12, 2)
    weights = {name: w.requires_grad_() for name, w in weights_of(matrices, torch.bfloat16).items()}
    pattern = parse_pattern(spec)
    groups = pattern.groups(matrices)
    for score, group in zip(pattern.magnitude(groups, weights), groups, strict=True):
        assert score.dtype == torch.float32
        assert score.shape == group.shape
        assert not score.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", ["unstructured", "2:4", "block:2x4", "neurons", "heads"])
def test_scores_stay_on_the_weights_device(spec: str) -> None:
    matrices = encoder(1, 8, 12, 2)
    weights = weights_of(matrices)
    pattern = parse_pattern(spec)
    groups = pattern.groups(matrices)
    there = pattern.magnitude(groups, {name: weight.cuda() for name, weight in weights.items()})
    assert all(score.is_cuda for score in there)
    here = pattern.magnitude(groups, weights)
    for gpu, cpu in zip(
        pattern.select(groups, there, 0.5, "global"), pattern.select(groups, here, 0.5, "global"), strict=True
    ):
        assert torch.equal(gpu.cpu(), cpu)
