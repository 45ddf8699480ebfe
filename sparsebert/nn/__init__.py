"""Modules: training under a mask."""

from sparsebert.nn.masked import MaskedEmbedding, MaskedLinear
from sparsebert.nn.masks import Masks

__all__ = ["MaskedEmbedding", "MaskedLinear", "Masks"]
