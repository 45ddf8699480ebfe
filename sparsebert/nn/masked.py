"""Modules for training under a mask: a linear and an embedding whose weights are multiplied by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsebert.ops.masked_embedding import masked_embedding
from sparsebert.ops.masked_linear import masked_linear
from sparsebert.ops.masked_weight import masked_weight

__all__ = ["MaskedEmbedding", "MaskedLinear"]


class _Masked(nn.Module):
    """What both share: the weight, its packed mask, the cached product, and the score tensor that shapes the mask.

    The product W * mask is kept in the compute dtype and made anew once per optimiser step (`refresh`), not in every
    forward. The score tensor is shared with `Masks`, which owns it: it is held outside of the module's own registry
    so that it appears once among the parameters.
    """

    weight: Tensor
    masked_weight: Tensor
    bits: Tensor

    def _setup(self, weight: Tensor, bits: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> None:
        self.weight = weight
        self.grid = grid
        self._score: list[Tensor] = []
        self.register_buffer("bits", bits, persistent=False)
        product = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.register_buffer("masked_weight", product, persistent=False)
        self.refresh()

    @property
    def score(self) -> Tensor | None:
        """The score tensor as this matrix's grid, or None where the mask is fixed."""
        return self._score[0].view(self.grid) if self._score else None

    def hold_score(self, score: Tensor | None) -> None:
        """Shares the score tensor that receives this matrix's mask gradient; None for a fixed mask."""
        self._score = [] if score is None else [score]

    def set_bits(self, bits: Tensor, *, refresh: bool = True) -> None:
        """Takes a new mask; `refresh=False` where the caller has written `masked_weight` itself."""
        self.bits = bits
        if refresh:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the cached product of weight and mask anew."""
        masked_weight(self.weight, self.bits, self.grid, out=self.masked_weight)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"[{rows}, {columns}], grid={self.grid}, compute={self.masked_weight.dtype}"


class MaskedLinear(_Masked):
    """`nn.Linear` under a mask. Gradients: inputs, scores (straight through the mask), and the kept weights.

    Args:
        linear: the module it takes the place of; its parameters are shared, not copied.
        bits: packed mask over `grid`, see `sparsebert.ops.select_mask`.
        grid: how many blocks the mask has along rows and columns.
        dtype: compute dtype of the product (fp32, bf16, fp16).
    """

    def __init__(self, linear: nn.Linear, bits: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._setup(linear.weight, bits, grid, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the compute dtype."""
        bits = self.bits if self.weight.requires_grad else None
        return masked_linear(x, self.weight, self.masked_weight, self.score, bits, self.bias, grid=self.grid)

    def plain(self) -> nn.Linear:
        """An `nn.Linear` with the same parameters; pruned weights are set to zero in place."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = _zeroed(self), self.bias
        return linear.train(self.training)


class MaskedEmbedding(_Masked):
    """`nn.Embedding` under a mask; arguments as for `MaskedLinear`."""

    def __init__(self, embedding: nn.Embedding, bits: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self._setup(embedding.weight, bits, grid, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids of any shape to `[..., width]`, in the weight's dtype as `nn.Embedding` gives it."""
        bits = self.bits if self.weight.requires_grad else None
        out = masked_embedding(ids, self.weight, self.masked_weight, self.score, bits, self.padding_idx, grid=self.grid)
        return out.to(self.weight.dtype)

    def plain(self) -> nn.Embedding:
        """An `nn.Embedding` with the same weight; pruned weights are set to zero in place."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=_zeroed(self).data)
        embedding.weight = self.weight
        return embedding.train(self.training)


@torch.no_grad()
def _zeroed(module: _Masked) -> Tensor:
    module.weight.copy_(masked_weight(module.weight, module.bits, module.grid))
    return module.weight
