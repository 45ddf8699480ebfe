"""What a sparsity pattern sees of a model: its prunable matrices, and how score tensors cover them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMPONENTS", "Matrix", "ScoreGroup", "View"]

COMPONENTS = (
    "query",
    "key",
    "value",
    "attention_output",
    "ffn_in",
    "ffn_out",
    "pooler",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
)


@dataclass(frozen=True)
class Matrix:
    """One prunable weight of a model."""

    name: str
    """Module name in the base model; its parameter is `name + ".weight"`."""
    shape: tuple[int, int]
    """`[out, in]` for a linear, `[rows, width]` for an embedding."""
    component: str
    """One of `COMPONENTS`."""
    layer: int | None = None
    """Index of the encoder layer; None outside the encoder."""
    heads: int = 0
    """Attention heads of the layer; 0 outside attention."""


@dataclass(frozen=True)
class View:
    """How a score tensor covers one matrix: entry (i, j) of `grid` stands for one equal block of it."""

    matrix: Matrix
    grid: tuple[int, int]


@dataclass(frozen=True)
class ScoreGroup:
    """One score tensor and the matrices it covers; more than one where units span matrices (neurons, heads)."""

    name: str
    shape: tuple[int, ...]
    views: tuple[View, ...]

    @property
    def elements(self) -> int:
        """Weights that the group covers."""
        return sum(view.matrix.shape[0] * view.matrix.shape[1] for view in self.views)
