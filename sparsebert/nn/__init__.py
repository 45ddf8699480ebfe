"""Modules: training under a mask, and running a pruned weight from its sparse storage."""

from sparsebert.nn.attention import (
    BlockSparseAttention,
    BlockSparseSelfAttention,
    register_attention,
    use_attention,
)
from sparsebert.nn.choose import Choice, choose
from sparsebert.nn.gpu_timer import measure_captured
from sparsebert.nn.masked import MaskedEmbedding, MaskedLinear
from sparsebert.nn.masks import Masks
from sparsebert.nn.remember import forget_choices
from sparsebert.nn.sparse_linear import SparseLinear
from sparsebert.nn.sparsification import Replacement, Sparsification
from sparsebert.nn.sparsify import load_sparsified, sparsify

__all__ = [
    "BlockSparseAttention",
    "BlockSparseSelfAttention",
    "Choice",
    "MaskedEmbedding",
    "MaskedLinear",
    "Masks",
    "Replacement",
    "SparseLinear",
    "Sparsification",
    "choose",
    "forget_choices",
    "load_sparsified",
    "measure_captured",
    "register_attention",
    "sparsify",
    "use_attention",
]
