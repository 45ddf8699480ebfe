"""Random masks: what a sparsity costs when nothing is known."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebert.methods.one_shot import OneShot

__all__ = ["RandomMask"]


class RandomMask(OneShot):
    """Scores are drawn uniformly, by the run's seed."""

    name = "random"
    summary = "a random mask, then training under it"

    def scores(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.context.seed)
        return [torch.rand(group.shape, generator=generator).to(bits.device)
                for group, bits in zip(self.masks.groups, self.masks.bits, strict=True)]  # fmt: skip
