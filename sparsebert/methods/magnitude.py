"""One-shot magnitude pruning: the smallest weights of the pre-trained model go."""

from __future__ import annotations

from torch import Tensor

from sparsebert.methods.one_shot import OneShot

__all__ = ["Magnitude"]


class Magnitude(OneShot):
    """Scores are mean |W| over a unit (a weight, block, neuron or head)."""

    name = "magnitude"
    summary = "one-shot magnitude pruning, then training under the mask"

    def scores(self) -> list[Tensor]:
        return self.masks.magnitude()
