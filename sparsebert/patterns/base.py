"""Sparsity patterns: which weights may only go together, and exact masks at a target sparsity.

Every pattern lays a grid on each matrix it prunes: one score decides one block of the grid (a single weight for
`unstructured`, a row for `neurons`, the rows of one head for `heads`). Masks are bits over scores, see
`sparsebert.ops.select_mask`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from sparsebert.errors import UserError, unknown
from sparsebert.ops.bits import block_sum
from sparsebert.ops.select_mask import select_mask, threshold_mask
from sparsebert.patterns.matrix import Matrix, ScoreGroup, View

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "GridPattern",
    "Pattern",
    "prune_smallest",
    "single_views",
    "units_to_prune",
]

Allocation = Literal["global", "matrix"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)


def units_to_prune(sparsity: float, total: int) -> int:
    """How many of `total` units a sparsity prunes: the nearest whole number, halves up."""
    return math.floor(sparsity * total + 0.5)


def prune_smallest(scores: Sequence[Tensor], sparsity: float, allocation: Allocation) -> list[Tensor]:
    """Bits that prune exactly `sparsity` of the scores, the smallest: of all together, or of each tensor.

    Raises:
        UserError: an unknown allocation.
    """
    if allocation == "global":
        return select_mask(scores, units_to_prune(sparsity, sum(score.numel() for score in scores)))
    if allocation == "matrix":
        return [select_mask([score], units_to_prune(sparsity, score.numel()))[0] for score in scores]
    raise unknown("allocation", allocation, ALLOCATIONS)


class Pattern(ABC):
    """One sparsity pattern; `sparsebert.patterns.parse_pattern` makes it from its spelling."""

    spec: str
    """The pattern as a user writes it, e.g. `block:16x16`."""
    default_sparsity: float = 0.5

    @abstractmethod
    def groups(self, matrices: Sequence[Matrix]) -> list[ScoreGroup]:
        """The score tensors that cover `matrices`.

        Raises:
            UserError: a matrix that the pattern does not fit, named.
        """

    @abstractmethod
    def select(
        self, groups: Sequence[ScoreGroup], scores: Sequence[Tensor], sparsity: float, allocation: Allocation
    ) -> list[Tensor]:
        """Bits of the mask with exactly `sparsity` of the units pruned, those with the smallest scores.

        Args:
            groups: as returned by `groups`.
            scores: fp32, one per group, of the group's shape.
            sparsity: in [0, 1); the count pruned is the nearest whole number of units.
            allocation: `global` ranks all units together, `matrix` each score tensor on its own.

        Returns:
            One uint8 tensor of packed bits per group, 1 = kept; equal scores: the earliest is pruned first.

        Raises:
            UserError: a sparsity that the pattern cannot have, or an unknown allocation.
        """

    @abstractmethod
    def above(self, groups: Sequence[ScoreGroup], scores: Sequence[Tensor], threshold: float) -> list[Tensor]:
        """Bits of the mask that keeps every unit with a score above `threshold` (and what the pattern never prunes)."""

    def check_sparsity(self, sparsity: float) -> None:
        """Raises a UserError for a sparsity that the pattern cannot have."""
        if not 0.0 <= sparsity < 1.0:
            raise UserError(f"sparsity {sparsity:g}: expected a number in [0, 1), e.g. 0.5 to prune half")

    def magnitude(self, groups: Sequence[ScoreGroup], weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Magnitude scores: the mean of |W| over a unit, fp32, one tensor per group, on the weights' device."""
        scores = []
        for group in groups:
            sums = [
                block_sum(weights[view.matrix.name].detach().abs().float(), view.grid).reshape(group.shape)
                for view in group.views
            ]
            unit = group.elements // math.prod(group.shape)
            scores.append(sum(sums[1:], sums[0]) / unit)
        return scores


class GridPattern(Pattern):
    """A pattern whose units are ranked freely: everything but n:m."""

    def select(
        self, groups: Sequence[ScoreGroup], scores: Sequence[Tensor], sparsity: float, allocation: Allocation
    ) -> list[Tensor]:
        self.check_sparsity(sparsity)
        return prune_smallest(scores, sparsity, allocation)

    def above(self, groups: Sequence[ScoreGroup], scores: Sequence[Tensor], threshold: float) -> list[Tensor]:
        return threshold_mask(scores, threshold)


def single_views(matrices: Sequence[Matrix], grids: Sequence[tuple[int, int]]) -> list[ScoreGroup]:
    """One score group for each matrix."""
    return [ScoreGroup(matrix.name, grid, (View(matrix, grid),)) for matrix, grid in zip(matrices, grids, strict=True)]
