"""The patterns themselves: `unstructured`, `n:m`, `block:RxC`, `neurons`, `heads`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor

from sparsebert.errors import UserError, unknown
from sparsebert.ops.bits import unpack_bits
from sparsebert.ops.nm_mask import nm_mask
from sparsebert.patterns.base import Allocation, GridPattern, Pattern, prune_smallest, single_views
from sparsebert.patterns.matrix import Matrix, ScoreGroup, View

__all__ = ["PATTERNS", "Block", "Heads", "Neurons", "NofM", "Unstructured", "parse_pattern"]

PATTERNS = ("unstructured", "2:4", "n:m", "block:RxC", "neurons", "heads")
"""The spellings, as help and errors show them."""

_ROUNDING = 1e-6  # how far a sparsity written in decimals may be from n:m's own


class Unstructured(GridPattern):
    """Any weight on its own."""

    spec = "unstructured"

    def groups(self, matrices: Sequence[Matrix]) -> list[ScoreGroup]:
        return single_views(matrices, [matrix.shape for matrix in matrices])


class Block(GridPattern):
    """Blocks of `rows` x `columns` weights, `rows` along a linear's outputs."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.spec = f"block:{rows}x{columns}"

    def groups(self, matrices: Sequence[Matrix]) -> list[ScoreGroup]:
        for matrix in matrices:
            if matrix.shape[0] % self.rows or matrix.shape[1] % self.columns:
                raise UserError(
                    f"pattern {self.spec}: a {self.rows}x{self.columns} block does not divide {matrix.name} "
                    f"({matrix.shape[0]}x{matrix.shape[1]}); choose a block that does, or mask other matrices"
                )
        return single_views(matrices, [(m.shape[0] // self.rows, m.shape[1] // self.columns) for m in matrices])


class NofM(Pattern):
    """At most `n` of every `m` consecutive weights along a linear's inputs (2:4 is the one GPUs run)."""

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self.spec = f"{n}:{m}"
        # Not 1 - n/m: this is the very number that (pruned units) / (all units) gives.
        self.default_sparsity = (m - n) / m

    def check_sparsity(self, sparsity: float) -> None:
        super().check_sparsity(sparsity)
        if abs(sparsity - self.default_sparsity) > _ROUNDING:
            raise UserError(
                f"sparsity {sparsity:g}: pattern {self.spec} keeps {self.n} of every {self.m} weights, so its sparsity "
                f"is {self.default_sparsity:g}; leave --sparsity out, or choose another pattern"
            )

    def groups(self, matrices: Sequence[Matrix]) -> list[ScoreGroup]:
        for matrix in matrices:
            if matrix.shape[1] % self.m:
                raise UserError(
                    f"pattern {self.spec}: groups of {self.m} do not divide the {matrix.shape[1]} inputs of "
                    f"{matrix.name}; choose another pattern, or mask other matrices"
                )
        return single_views(matrices, [matrix.shape for matrix in matrices])

    def select(
        self, groups: Sequence[ScoreGroup], scores: Sequence[Tensor], sparsity: float, allocation: Allocation
    ) -> list[Tensor]:
        """As `Pattern.select`; sparsities below the pattern's own are taken too, on the way to it.

        Then a group of m keeps more than n, and never fewer.
        """
        super().check_sparsity(sparsity)
        bits = [nm_mask(score, self.n, self.m) for score in scores]
        if sparsity >= self.default_sparsity - _ROUNDING:
            self.check_sparsity(sparsity)
            return bits
        # The n best of a group are never candidates.
        ranked = [
            score.masked_fill(unpack_bits(packed, tuple(score.shape)), math.inf)
            for packed, score in zip(bits, scores, strict=True)
        ]
        return prune_smallest(ranked, sparsity, allocation)

    def above(self, groups: Sequence[ScoreGroup], scores: Sequence[Tensor], threshold: float) -> list[Tensor]:
        return [nm_mask(score, self.n, self.m, threshold) for score in scores]


_ATTENTION = ("query", "key", "value", "attention_output")


class Neurons(GridPattern):
    """Whole intermediate neurons of a feed-forward block: a row of its first linear with a column of its second."""

    spec = "neurons"

    def groups(self, matrices: Sequence[Matrix]) -> list[ScoreGroup]:
        groups = []
        for layer, (first, second) in _parts(matrices, self.spec, ("ffn_in", "ffn_out")).items():
            width = first.shape[0]
            views = (View(first, (width, 1)), View(second, (1, width)))
            groups.append(ScoreGroup(f"layer{layer}.neurons", (width,), views))
        return groups


class Heads(GridPattern):
    """Whole attention heads: their rows of query, key and value with their columns of the attention output."""

    spec = "heads"

    def groups(self, matrices: Sequence[Matrix]) -> list[ScoreGroup]:
        groups = []
        for layer, (*inputs, output) in _parts(matrices, self.spec, _ATTENTION).items():
            heads = output.heads
            views = (*(View(matrix, (heads, 1)) for matrix in inputs), View(output, (1, heads)))
            groups.append(ScoreGroup(f"layer{layer}.heads", (heads,), views))
        return groups


def _parts(matrices: Sequence[Matrix], spec: str, wanted: Sequence[str]) -> dict[int, list[Matrix]]:
    """By encoder layer, the matrices of the `wanted` components in that order; other encoder matrices do not matter."""
    layers: dict[int, dict[str, Matrix]] = {}
    for matrix in matrices:
        if matrix.layer is None:
            raise UserError(
                f"pattern {spec}: removes structure of encoder layers, and {matrix.name} is in none "
                "(use --masked encoder, or another pattern)"
            )
        layers.setdefault(matrix.layer, {})[matrix.component] = matrix
    used = {layer: parts for layer, parts in layers.items() if not parts.keys().isdisjoint(wanted)}
    for layer, parts in used.items():
        if missing := [name for name in wanted if name not in parts]:
            raise UserError(
                f"pattern {spec}: layer {layer} is masked without its {' and '.join(missing)}, which go together with "
                "the rest (use --masked encoder)"
            )
    if not used:
        raise UserError(f"pattern {spec}: needs {', '.join(wanted)} among the masked matrices (use --masked encoder)")
    return {layer: [parts[name] for name in wanted] for layer, parts in used.items()}


def parse_pattern(spec: str) -> Pattern:
    """The pattern that a spelling names: `unstructured`, `2:4` (any n:m), `block:16x16`, `neurons`, `heads`.

    Raises:
        UserError: an unknown spelling, with the nearest known one, or numbers that make no sense.
    """
    plain: dict[str, type[GridPattern]] = {"unstructured": Unstructured, "neurons": Neurons, "heads": Heads}
    if spec in plain:
        return plain[spec]()
    if match := re.fullmatch(r"(\d+):(\d+)", spec):
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m <= 32:
            raise UserError(f"pattern {spec}: n:m keeps n of every m weights, with 0 < n < m <= 32")
        return NofM(n, m)
    if match := re.fullmatch(r"block:(\d+)x(\d+)", spec):
        rows, columns = int(match[1]), int(match[2])
        if rows < 1 or columns < 1:
            raise UserError(f"pattern {spec}: block sides must be at least 1")
        return Block(rows, columns)
    if spec in PATTERNS:
        raise UserError(f"pattern {spec}: expected numbers in place of the letters, e.g. 2:4 or block:16x16")
    raise unknown("pattern", spec, PATTERNS)
