"""Mixup of a batch with its own reverse, at the embedding outputs (Zhang et al., 2018; for distillation Liang et al.,
2021, and Ko et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Mixup", "both_masks", "mixed_embeddings"]


class Mixup:
    """Draws how much of the batch itself is in the mix: lam ~ Beta(alpha, alpha), then the larger of lam and 1 - lam.

    A draw is a function of the seed and the number of draws before it, which lies in a module's memory: a resumed run
    goes on with the next one, and all ranks draw the same.

    Args:
        seed: of the draws.
        memory: float64, in every checkpoint.
        place: where in it the draws are counted.
        alpha: of the Beta distribution.
    """

    def __init__(self, seed: int, memory: Tensor, place: int = 0, alpha: float = 1.0) -> None:
        self.seed, self.memory, self.place, self.alpha = seed, memory, place, alpha

    def draw(self) -> float:
        """The next share, in [0.5, 1]."""
        count = int(self.memory[self.place])
        self.memory[self.place] = count + 1
        share = float(np.random.RandomState([self.seed, count]).beta(self.alpha, self.alpha))
        return max(share, 1.0 - share)


@contextmanager
def mixed_embeddings(base: PreTrainedModel, share: float) -> Iterator[None]:
    """While it lasts, the base's layers see `share` of each example's embedding output and 1 - `share` of that of its
    partner: the first example's is the last, and so on."""

    def mix(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.lerp(output.flip(0), output, share)

    handle = base.get_submodule("embeddings").register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()


def both_masks(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with an attention mask that is 1 where an example or its partner has a token."""
    mask = batch.get("attention_mask")
    return dict(batch) if mask is None else {**batch, "attention_mask": torch.maximum(mask, mask.flip(0))}
