"""What may be zero: from scores to an exact mask at a target sparsity."""

from sparsebert.patterns.base import Allocation, Pattern, units_to_prune
from sparsebert.patterns.kinds import PATTERNS, parse_pattern
from sparsebert.patterns.matrix import COMPONENTS, Matrix, ScoreGroup, View

__all__ = [
    "COMPONENTS",
    "PATTERNS",
    "Allocation",
    "Matrix",
    "Pattern",
    "ScoreGroup",
    "View",
    "parse_pattern",
    "units_to_prune",
]
