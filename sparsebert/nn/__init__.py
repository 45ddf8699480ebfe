"""Modules: training under a mask, and running a pruned weight from its sparse storage."""

from sparsebert.nn.choose import Choice, choose
from sparsebert.nn.masked import MaskedEmbedding, MaskedLinear
from sparsebert.nn.masks import Masks
from sparsebert.nn.sparse_linear import SparseLinear
from sparsebert.nn.sparsify import Replacement, Sparsification, sparsify

__all__ = [
    "Choice",
    "MaskedEmbedding",
    "MaskedLinear",
    "Masks",
    "Replacement",
    "SparseLinear",
    "Sparsification",
    "choose",
    "sparsify",
]
