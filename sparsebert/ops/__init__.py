"""Ops: masks from scores, the layers trained under them, and the parts of a BERT between its linears."""

from __future__ import annotations

from sparsebert.ops.add_layer_norm import add_layer_norm
from sparsebert.ops.bits import pack_bits, unpack_bits
from sparsebert.ops.masked_embedding import masked_embedding
from sparsebert.ops.masked_linear import masked_linear
from sparsebert.ops.masked_weight import masked_weight
from sparsebert.ops.nm_mask import nm_mask
from sparsebert.ops.select_mask import select_mask, threshold_mask
from sparsebert.ops.varlen_attention import varlen_attention

__all__ = [
    "add_layer_norm",
    "masked_embedding",
    "masked_linear",
    "masked_weight",
    "nm_mask",
    "pack_bits",
    "select_mask",
    "threshold_mask",
    "unpack_bits",
    "varlen_attention",
]
