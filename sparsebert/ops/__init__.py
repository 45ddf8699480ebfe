"""Ops: masks from scores, the layers trained under them, and the losses of distillation."""

from __future__ import annotations

from sparsebert.ops.attention_kl import attention_kl
from sparsebert.ops.attention_mse import attention_mse
from sparsebert.ops.bits import pack_bits, unpack_bits
from sparsebert.ops.hidden_cosine import hidden_cosine
from sparsebert.ops.hidden_mse import hidden_mse
from sparsebert.ops.masked_embedding import masked_embedding
from sparsebert.ops.masked_linear import masked_linear
from sparsebert.ops.masked_weight import masked_weight
from sparsebert.ops.nm_mask import nm_mask
from sparsebert.ops.relation_kl import relation_kl
from sparsebert.ops.select_mask import select_mask, threshold_mask
from sparsebert.ops.soft_cross_entropy import soft_cross_entropy

__all__ = [
    "attention_kl",
    "attention_mse",
    "hidden_cosine",
    "hidden_mse",
    "masked_embedding",
    "masked_linear",
    "masked_weight",
    "nm_mask",
    "pack_bits",
    "relation_kl",
    "select_mask",
    "soft_cross_entropy",
    "threshold_mask",
    "unpack_bits",
]
