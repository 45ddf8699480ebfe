"""Ops: masks from scores, layers trained under them or over stored weights, what lies between, distillation losses."""

from __future__ import annotations

from sparsebert.ops.add_layer_norm import add_layer_norm
from sparsebert.ops.attention_kl import attention_kl
from sparsebert.ops.attention_mse import attention_mse
from sparsebert.ops.bitmap_decode import bitmap_decode
from sparsebert.ops.bitmap_gather import bitmap_gather
from sparsebert.ops.bitmap_linear import bitmap_linear
from sparsebert.ops.bits import pack_bits, unpack_bits
from sparsebert.ops.block_cluster_linear import block_cluster_linear
from sparsebert.ops.block_lists import BlockLists
from sparsebert.ops.block_sparse_attention import block_sparse_attention
from sparsebert.ops.block_sparse_ffn import block_sparse_ffn
from sparsebert.ops.block_sparse_linear import block_sparse_linear
from sparsebert.ops.block_sparse_sddmm import block_sparse_sddmm
from sparsebert.ops.dense_linear import dense_linear
from sparsebert.ops.hidden_cosine import hidden_cosine
from sparsebert.ops.hidden_mse import hidden_mse
from sparsebert.ops.linear_soft_cross_entropy import linear_soft_cross_entropy
from sparsebert.ops.masked_embedding import masked_embedding
from sparsebert.ops.masked_linear import masked_linear
from sparsebert.ops.masked_weight import masked_weight, masked_weights
from sparsebert.ops.nm_mask import nm_mask
from sparsebert.ops.relation_kl import relation_kl
from sparsebert.ops.select_mask import select_mask, threshold_mask
from sparsebert.ops.semi_structured_linear import semi_structured_linear
from sparsebert.ops.semi_structured_pack import semi_structured_pack
from sparsebert.ops.semi_structured_packed_linear import semi_structured_packed_linear
from sparsebert.ops.semi_structured_residue import packed_residue
from sparsebert.ops.soft_cross_entropy import soft_cross_entropy
from sparsebert.ops.two_four_linear import two_four_linear
from sparsebert.ops.unstructured_linear import unstructured_linear
from sparsebert.ops.unstructured_sddmm import unstructured_sddmm
from sparsebert.ops.varlen_attention import varlen_attention

__all__ = [
    "BlockLists",
    "add_layer_norm",
    "attention_kl",
    "attention_mse",
    "bitmap_decode",
    "bitmap_gather",
    "bitmap_linear",
    "block_cluster_linear",
    "block_sparse_attention",
    "block_sparse_ffn",
    "block_sparse_linear",
    "block_sparse_sddmm",
    "dense_linear",
    "hidden_cosine",
    "hidden_mse",
    "linear_soft_cross_entropy",
    "masked_embedding",
    "masked_linear",
    "masked_weight",
    "masked_weights",
    "nm_mask",
    "pack_bits",
    "packed_residue",
    "relation_kl",
    "select_mask",
    "semi_structured_linear",
    "semi_structured_pack",
    "semi_structured_packed_linear",
    "soft_cross_entropy",
    "threshold_mask",
    "two_four_linear",
    "unpack_bits",
    "unstructured_linear",
    "unstructured_sddmm",
    "varlen_attention",
]
